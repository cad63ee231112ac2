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

const namePattern = /^(?:([a-z0-9][a-z0-9._-]{0,63})\/)?[a-z0-9][a-z0-9._-]{0,63}$/;
/** `name`, shared by all, or `tenant/name`. Registry keys, never paths (faults.md B36). No comma: metrics list names in a
 *  CSV (peers.md 5.1). */
export function isAdapterName(text: string): boolean {
  return namePattern.test(text) && !text.includes('..');
}
/** Whose an adapter is: null for what all share. */
export function tenantOf(name: string): string | null {
  return namePattern.exec(name)?.[1] ?? null;
}

export interface AdaptedModule {
  readonly block: number;
  readonly projection: Projection;
  /** Ranks stored for this module, 1…rankMax. */
  readonly rank: number;
  readonly in: number;
  readonly out: number;
}

/** How an adapter came to be, which decides how it is served: design.md section 3. */
export const adapterKinds = [
  'lora',
  'matryoshka',
  'queryable',
  'fly',
  'svfit',
  'hydra',
  'flexmore',
  'mora',
  'salt',
  'triangular',
  'eora',
] as const;
export type AdapterKind = (typeof adapterKinds)[number];
/** Two kinds are no adapters but what adapters of one base share: `basis` for svfit, `bank` for queryable. */
export type PackedKind = AdapterKind | 'basis' | 'bank';

/** What some kinds need beyond their numbers; null where a kind has no use for it. */
export interface FamilyOptions {
  /** The file of shared tensors that this adapter cannot be served without: svfit's basis, queryable's bank. */
  readonly needs: Generation | null;
  /** fly: A is made from it and never stored; 16 hex digits. */
  readonly seed: string | null;
  /** fly, mora: ranks that stay on for a token. queryable: atoms that are mixed for a token. */
  readonly topK: number | null;
  /** mora: τ of the softmax over the ranks that stay. */
  readonly temperature: number | null;
  /** queryable: the text of each atom's label. */
  readonly labels: readonly string[] | null;
  /** bank: layers that share one routing decision. */
  readonly blockLayers: number | null;
}

export const noOptions: FamilyOptions = {
  needs: null,
  seed: null,
  topK: null,
  temperature: null,
  labels: null,
  blockLayers: null,
};

export interface PeftSource {
  readonly format: 'peft';
  readonly rank: number;
  readonly alpha: number;
  readonly rslora: boolean;
  readonly targetModules: readonly string[];
  /** base_model_name_or_path as the adapter's config had it: opaque text, never fetched. */
  readonly baseName: string | null;
}

/** Made by rankgate: squeezed, extracted, compensated, or a family's own files. */
export interface MadeSource {
  readonly format: 'rankgate';
  /** Which of these, in a few words. */
  readonly by: string;
  readonly from: readonly Generation[];
  /** Hash of the file beside it that says what training from here must leave as it is. */
  readonly keeps?: Generation;
}

export interface AdapterManifest {
  readonly format: 'rankgate-adapter/3';
  readonly kind: PackedKind;
  /** What it is, for people. */
  readonly describe: string;
  /** SHA-256 of the base model file this was checked against. */
  readonly baseHash: string;
  /** R: the largest rank of any module, and the highest level. */
  readonly rankMax: number;
  readonly modules: readonly AdaptedModule[];
  /** rankCurve[k-1] = share of Σσ² over all modules kept at level k, k = 1…R; non-decreasing, ends at 1. Empty for a bank. */
  readonly rankCurve: readonly number[];
  /** null: level k is the first k ranks of every module. Else, per module, the level from which each rank is on,
   *  non-decreasing: a level's ranks are a prefix in every module, and level R has all. */
  readonly levels: readonly (readonly number[])[] | null;
  readonly options: FamilyOptions;
  readonly source: PeftSource | MadeSource;
}
