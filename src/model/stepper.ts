// The contract between the engine's loop (when) and the decoder (what): one step of a mixed batch over shared memory.
// Implemented by decoder.ts over any Kernels; fakes implement it in tests. Not thread-safe: one loop owns it.
//
// KV memory is `cells` cells; a sequence owns one contiguous run of them, so attention reads a view and a row pays for
// its own cells only (figures.md, "Attention over one pool of cells"). Adapter memory is `pages` pages of 8 ranks
// (adapters/adapter.ts); page 0 stays zero.

import type { DecoderConfig, Projection } from './decoder-config.ts';

/** What a row's adapters are to a step. The same object for the same use, and never changed: the decoder writes what a use
 *  says only when it meets another object. Gates and biases are 8 ranks a page of `pages`. */
export interface AdapterRows {
  /** Whole pages of each part, one part after another: a part's ranks in order. */
  readonly pages: readonly number[];
  /** Active ranks, ≥ 1; of several parts together, which is what the latency model is told. */
  readonly rank: number;
  /** What the first `rank` ranks are multiplied with, where there are no gates. */
  readonly scale: number;
  /** [M, 8·pages] of the M modules (moduleIndex), 0 for ranks that do not count. null: `scale` in all modules. */
  readonly gates: Float32Array | null;
  readonly routing: RankRouting | null;
  readonly atoms: AtomRouting | null;
}

/** Ranks that a token chooses by their own values (Ops.routeRanks), which the gates have multiplied already. */
export interface RankRouting {
  /** In the order of their pages, which they do not share. */
  readonly groups: readonly RankGroup[];
  /** [M, 8·pages]: added to |h| in fly's groups, a factor of it in mora's. */
  readonly bias: Float32Array;
}

export interface RankGroup {
  /** Index in the use's pages. */
  readonly firstPage: number;
  readonly pages: number;
  /** Ranks that stay. */
  readonly topK: number;
  /** 0: fly's choice, the values as they are. Above: mora's, weighted by their softmax at this temperature. */
  readonly temperature: number;
}

/** A token's mix of shared maps of the use's first r ranks, chosen per block of layers (Ops.routeAtoms). */
export interface AtomRouting {
  /** The id of the bank that the stepper has, or of one that it covers. */
  readonly bank: string;
  /** Of the bank's first K atoms; the others are no choice. */
  readonly keys: Float32Array; // [K, dq]
  /** [K], added to the logits: instruction and prior. */
  readonly bias: Float32Array;
  readonly topK: number;
}

/** What all queryable adapters of a base share (algorithms.md section 6). */
export interface AtomBank {
  readonly id: string;
  /** Ids of banks that this one begins with, atom for atom: what is for them is computed with it. It may gain some. */
  readonly covers?: ReadonlySet<string>;
  readonly atoms: Float32Array; // [K, r, r]
  readonly query: Float32Array; // [dq, r], W_q
  readonly summary: Float32Array; // [r, r], W_s
  readonly context: Float32Array; // [dq, r], W_c
  readonly r: number;
  readonly dq: number;
  readonly K: number;
  /** Layers of one block: they share a choice. */
  readonly blockLayers: number;
}

/** The first `rank` ranks of one adapter in every module, as they are stored. */
export function uniformRows(pages: readonly number[], rank: number): AdapterRows {
  return { pages, rank, scale: 1, gates: null, routing: null, atoms: null };
}

/** `count` consecutive tokens of one sequence in this step. */
export interface Segment {
  readonly tokens: Int32Array; // [count], count ≥ 1
  /** First cell of the sequence's run. */
  readonly cellBase: number;
  /** Tokens of the sequence already in its cells; this segment fills cellBase+position … +count-1. */
  readonly position: number;
  readonly adapter: AdapterRows | null;
  /** Whether the last token's logits are wanted (the end of a prompt, or a decode row). */
  readonly wantsLogits: boolean;
  /** So many of the last tokens are guesses: logits are wanted for each of them and for the token before them. */
  readonly drafts?: number;
}

export interface StepResult {
  /** Index in the batch's segments → arg max of its last token's logits; -1… never: absent when not wanted. */
  argmax(segment: number): number;
  /** [V] f32 after the last token that is no draft, or after draft `draft` (1 = the first); valid until the next step.
   *  Throws when the segment did not want them. */
  logits(segment: number, draft?: number): Float32Array;
  /** [blocks of layers, K]: the use's atoms as the last token that is no draft weighted them; null without `atoms`. */
  atomWeights(segment: number): Float32Array | null;
}

export interface Stepper extends Disposable {
  readonly config: DecoderConfig;
  readonly cells: number;
  readonly pages: number;
  /** Memory that a page takes in all modules together. */
  readonly pageBytes: number;
  /** Most tokens in one step; most segments, and most rows of logits. */
  readonly tokensMax: number;
  readonly segmentsMax: number;
  /** Runs one step. Throws SHAPE_MISMATCH when the batch breaks a limit above, before anything is computed. */
  step(segments: readonly Segment[]): StepResult;
  /** Copies cells [from, from+count) to [to, to+count) in every layer; the ranges do not overlap. */
  copyCells(from: number, to: number, count: number): void;
  /** Writes one page of one module, rounded to the type that its pool is kept in; f16 bits. `a` [8, in], `b` [8, out]. null zeroes the module's page. */
  writePage(page: number, module: ModuleRef, data: PageData | null): void;
  /** The bank of rows with `atoms` from now on. One at a time: nobody may be using the one before. Throws SHAPE_MISMATCH, or
   *  UNSUPPORTED for what the kernels cannot do; the one before then stays. */
  setAtomBank(bank: AtomBank | null): void;
  /** [ids, width] of the token embedding, a copy. Not between a step and the reading of its results. */
  embeddings(ids: Int32Array): Float32Array;
}

export interface ModuleRef {
  readonly block: number;
  readonly projection: Projection;
}

export interface PageData {
  readonly a: Uint16Array;
  readonly b: Uint16Array;
}
