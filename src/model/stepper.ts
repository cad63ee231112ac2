// The contract between the engine's loop (when) and the decoder (what): one step of a mixed batch over shared memory.
// Implemented by decoder.ts over any Kernels; fakes implement it in tests. Not thread-safe: one loop owns it.
//
// KV memory is `cells` cells; a sequence owns one contiguous run of them, so attention reads a view and a row pays for
// its own cells only (figures.md, "Attention over one pool of cells"). Adapter memory is `pages` pages of 8 ranks
// (adapters/adapter.ts); page 0 stays zero.

import type { DecoderConfig, Projection } from './decoder-config.ts';

export interface AdapterRows {
  /** Pages in rank order, enough for `rank`: ceil(rank / 8) of them. */
  readonly pages: readonly number[];
  /** Active ranks, ≥ 1. */
  readonly rank: number;
  readonly scale: number;
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
}

export interface ModuleRef {
  readonly block: number;
  readonly projection: Projection;
}

export interface PageData {
  readonly a: Uint16Array;
  readonly b: Uint16Array;
}
