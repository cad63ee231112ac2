// Contract of the adapter registry: which names exist, which generation each points at, and who uses a generation now.
// Implemented over SQLite in sql-registry.ts.

import type { AdapterManifest, Generation } from './adapter.ts';
import type { SqueezeTarget } from './pack-pairs.ts';

export interface AdapterRecord {
  readonly name: string;
  readonly generation: Generation;
  readonly manifest: AdapterManifest;
  /** Generations this name pointed at before, each once, the last used first: what rollback returns to. */
  readonly previous: readonly Generation[];
  /** Unix seconds of the last change. */
  readonly updatedS: number;
  /** Bytes of the packed file. */
  readonly bytes: number;
  /** Names that follow this one, sorted. */
  readonly aliases: readonly string[];
  /** What the name points at stays in memory once loaded, and the name stays until it is unpinned. */
  readonly isPinned: boolean;
}

/** The right to use one generation. Its blob is not deleted while a lease is open. `release` is idempotent. */
export interface Lease extends Disposable {
  readonly name: string;
  readonly generation: Generation;
  readonly manifest: AdapterManifest;
  release(): void;
}

/** A name may be an alias wherever it is read. What changes a name takes the name itself: INVALID_REQUEST for an alias. */
export interface Registry {
  list(): readonly AdapterRecord[];
  /** null when the name is unknown. */
  find(name: string): AdapterRecord | null;
  /** Leases what `name` points at now, or the fixed generation of `name@sha256:…`. Throws ADAPTER_NOT_FOUND. */
  lease(reference: string): Lease;
  leases(generation: Generation): number;
  /** What is known of a stored generation, named or not. */
  stored(generation: Generation): StoredGeneration | null;
  /** Does a name point at it now? */
  isNamed(generation: Generation): boolean;
  /** Points a new name at a stored generation. Throws ADAPTER_EXISTS. */
  create(name: string, generation: Generation): AdapterRecord;
  /** Atomic compare-and-swap; `expected` null accepts any. Throws ADAPTER_NOT_FOUND or GENERATION_MISMATCH. */
  swap(name: string, generation: Generation, expected: Generation | null): AdapterRecord;
  /** Back to the previous generation. Throws ADAPTER_NOT_FOUND, or GENERATION_MISMATCH when there is none. */
  rollback(name: string): AdapterRecord;
  /** A second name that follows `target`, or an existing alias that follows it from now on. Both are of one tenant;
   *  an alias of an alias is refused, so there are no cycles. Throws ADAPTER_EXISTS for the name of an adapter. */
  alias(name: string, target: string): AdapterRecord;
  pin(name: string): AdapterRecord;
  unpin(name: string): AdapterRecord;
  /** Generations that pinned names point at, each once. */
  pinned(): readonly Generation[];
  /** Removes the name, or the alias alone. Running sequences keep their generation; the blob goes at its last lease.
   *  ADAPTER_IN_USE while aliases follow the name or it is pinned. */
  remove(name: string, expected: Generation | null): void;
  /** A packed file that is in the blob store becomes known. Idempotent. Throws ADAPTER_NOT_FOUND when it or the file that
   *  it needs is not there. */
  store(generation: Generation, manifest: AdapterManifest, bytes: number): void;
  /** Resolves when every change made so far survives a loss of power: nothing is acknowledged before. */
  durable(): Promise<void>;
  /** The same, holding the event loop. */
  durableNow(): void;
  close(): void;
}

export interface StoredGeneration {
  readonly manifest: AdapterManifest;
  readonly bytes: number;
}

/** Turns an outside file into a stored generation, off the main thread: validate, rank-order, pack, store. */
export interface Importer {
  /** A PEFT directory (adapter_config.json + adapter_model.safetensors). Throws INVALID_ADAPTER, BASE_MISMATCH,
   *  DISK_FULL. Registers the generation with the registry; names are the caller's business. */
  importPeft(directory: string, options?: ImportOptions): Promise<ImportedAdapter>;
  /** The PEFT files of level `rank`, as it would be served; of a queryable adapter, whole, its own files. Throws
   *  ADAPTER_NOT_FOUND, or UNSUPPORTED for a kind that has neither. */
  exportPeft(generation: Generation, rank: number): Promise<ExportedFiles>;
  /** A stored adapter with fewer ranks, as a generation of its own. Throws ADAPTER_NOT_FOUND, or UNSUPPORTED for a kind whose
   *  ranks are no plain pairs. The caller leases `generation` meanwhile. */
  squeeze(generation: Generation, target: SqueezeTarget): Promise<ImportedAdapter>;
  close(): Promise<void>;
}

export interface ImportOptions {
  /** Accept an adapter whose config names another base model; shapes must match all the same. */
  readonly acceptBaseName?: string;
  /** Level k is rank k in every module, instead of what keeps most at the same bytes. */
  readonly levels?: 'uniform';
}

export interface ImportedAdapter {
  readonly generation: Generation;
  readonly manifest: AdapterManifest;
  readonly bytes: number;
  readonly warnings: readonly string[];
}

export interface PeftFiles {
  readonly config: string;
  readonly weights: Uint8Array; // adapter_model.safetensors
}

export interface ExportedFiles extends PeftFiles {
  readonly configName: 'adapter_config.json' | 'rankgate.json';
}
