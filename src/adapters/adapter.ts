// What an adapter is once it has been accepted: immutable, content-addressed, rank-ordered. A *name* is a registry key;
// a *generation* is the hash of one packed file; a name points at one generation at a time.
//
// The packed file is safetensors (v0.5 format: u64 header length, JSON header, data) with one `__metadata__` entry
// `manifest` (the JSON of AdapterManifest) and, per adapted module, two F16 tensors cut into pages of 8 ranks so that a
// prefix of the rank is one contiguous range and the engine copies it without converting:
//   blk.{block}.{projection}.a  [pages, 8, in]    row i of page p is rank 8p+i; ranks beyond the module's are zero
//   blk.{block}.{projection}.b  [pages, 8, out]
// The served delta at rank k is y += B[:, :k] · A[:k, :] · x: the scale (alpha/r, rsLoRA, patterns) is folded in at import.

import { ranksPerPage } from '../kernels/kernels.ts';
import type { Projection } from '../model/decoder-config.ts';

/** Ranks per page. The unit in which adapters occupy the engine's memory and in which a row's cost grows. */
export const pageRanks: number = ranksPerPage;
/** Largest rank that is accepted anywhere. */
export const rankMaxLimit = 256;

/** `sha256:` + 64 lower-case hex digits of the packed file. */
export type Generation = `sha256:${string}`;
const generationPattern = /^sha256:[0-9a-f]{64}$/;
export function isGeneration(text: string): text is Generation {
  return generationPattern.test(text);
}

const namePattern = /^[a-z0-9][a-z0-9._-]{0,63}$/;
/** Names are registry keys, never paths (faults.md B36). No comma: metrics list names in a CSV (peers.md 5.1). */
export function isAdapterName(text: string): boolean {
  return namePattern.test(text) && !text.includes('..');
}

export interface AdaptedModule {
  readonly block: number;
  readonly projection: Projection;
  /** Ranks stored for this module, 1…rankMax. */
  readonly rank: number;
  readonly in: number;
  readonly out: number;
}

export interface AdapterManifest {
  readonly format: 'rankgate-adapter/2';
  readonly kind: 'lora';
  /** SHA-256 of the base model file this was checked against. */
  readonly baseHash: string;
  /** R: the largest rank of any module. */
  readonly rankMax: number;
  readonly modules: readonly AdaptedModule[];
  /** rankCurve[k-1] = share of Σσ² over all modules kept at uniform rank k, k = 1…R; non-decreasing, ends at 1. */
  readonly rankCurve: readonly number[];
  readonly source: {
    readonly format: 'peft';
    readonly rank: number;
    readonly alpha: number;
    readonly rslora: boolean;
    readonly targetModules: readonly string[];
    /** base_model_name_or_path as the adapter's config had it: opaque text, never fetched. */
    readonly baseName: string | null;
  };
}
