import type { ModuleRef, PageData } from '../model/stepper.ts';
import type { AdapterManifest, Generation } from './adapter.ts';

/** A verified packed file in memory. Its pages are views of the file's bytes: read them, never write. */
export interface PackedAdapter {
  readonly generation: Generation;
  readonly manifest: AdapterManifest;
  /** Pages that the widest module has: ceil(rankMax / 8). */
  readonly pages: number;
  /** `a` [8, in], `b` [out, 8]; null when the adapter leaves this module alone, or has no ranks left in this page. */
  page(module: ModuleRef, index: number): PageData | null;
}
