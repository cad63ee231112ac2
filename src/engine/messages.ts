// What crosses between the gateway and the engine process: the closed union of messages and the request and event types
// that both sides share. Plain data only (structured clone); no tensors, no functions.

import type { Generation } from '../adapters/adapter.ts';
import type { ResidentKey } from '../adapters/residency.ts';
import type { DecoderConfig } from '../model/decoder-config.ts';

export interface Sampling {
  /** 0 = greedy. */
  readonly temperature: number;
  readonly topP: number; // (0, 1], 1 = off
  readonly topK: number; // 0 = off
  readonly minP: number; // [0, 1], 0 = off
  /** Draw i of a sequence depends on (seed, i) only, so that a resumed sequence continues as it would have. */
  readonly seed: number; // uint32
  readonly presencePenalty: number;
  readonly frequencyPenalty: number;
  readonly repetitionPenalty: number; // 1 = off
  readonly logitBias: ReadonlyArray<readonly [token: number, bias: number]>;
}

/** One adapter of a use, at one rank. */
export interface AdapterPart {
  readonly generation: Generation;
  /** Active ranks, 0…its own largest. Rank 0 is as if it were not there. */
  readonly rank: number;
  readonly weight: number;
}

/** How parts become one delta, as LoRAX names it. */
export const merges = ['linear', 'ties', 'dare_linear', 'dare_ties'] as const;
export type Merge = (typeof merges)[number];
/** Adapters that one request may blend, and the largest weight that one of them may have. */
export const partsMax = 8;
export const weightMax = 16;

/** Everything that decides what adapters do to a row. All ranks 0 is the base model's answer. */
export interface AdapterUse {
  readonly parts: readonly AdapterPart[]; // 0…partsMax
  readonly merge: Merge;
  /** Share of each part's numbers that a merge keeps, (0, 1]; 1 for linear. */
  readonly density: number;
  /** Ranks that fly parts keep per row, instead of their own number. */
  readonly flyTopK: number | null;
  /** Queryable parts: which atoms the instruction's words speak for, and how loudly. */
  readonly prior: { readonly tokens: readonly number[]; readonly strength: number } | null;
  /** Repairs the base under whatever the parts do to it; no part of the merge. */
  readonly system: AdapterPart | null;
}

/** How soon an answer is wanted, and what may be given up for that. Times count from the submission and may have passed. */
export interface Urgency {
  /** To the last token. */
  readonly deadlineMs: number | null;
  readonly ttftMs: number | null;
  readonly perTokenMs: number | null;
  /** 0…9, larger first. */
  readonly priority: number;
  /** The governor (governor.ts) goes no lower. */
  readonly rankMin: number;
  /** By the caller: no governor. */
  readonly rankIsFixed: boolean;
  /** Late is of no use: dropped when a time has passed before it had room. */
  readonly strict: boolean;
}

export const noUrgency: Urgency = {
  deadlineMs: null,
  ttftMs: null,
  perTokenMs: null,
  priority: 5,
  rankMin: 0,
  rankIsFixed: false,
  strict: false,
};

/** From which token of the answer on a sequence had another rank than planned. */
export interface RankChange {
  /** Tokens of the answer before it. */
  readonly afterTokens: number;
  readonly rank: number;
}

export interface GenerateRequest {
  /** Unique while the request lives. */
  readonly id: string;
  readonly tokens: Int32Array;
  readonly tokensMax: number; // new tokens, ≥ 1
  readonly sampling: Sampling;
  readonly stop: readonly string[];
  /** Alternatives to report per token, 0…20; null = no log-probabilities at all. */
  readonly topLogprobs: number | null;
  readonly adapter: AdapterUse | null;
  /** Part of the prefix-cache identity: tenants never share cells. */
  readonly tenant: string;
  readonly urgency: Urgency;
  /** Tokens that the answer will hardly exceed (answer-length.ts); tokensMax when absent. */
  readonly tokensLikely?: number;
}

export interface TokenLogprob {
  readonly token: number;
  /** The token's own bytes as base64 would lose nothing: text may be half a character. */
  readonly bytes: Uint8Array;
  readonly logprob: number;
}

export interface GeneratedToken extends TokenLogprob {
  /** NaN logprob and no alternatives when the request did not ask. */
  readonly top: readonly TokenLogprob[];
}

export type FinishReason = 'stop' | 'length';

export type EngineEvent =
  /** Once, when the sequence gets its cells: the wait before it, and the prompt tokens that needed no compute. */
  | { readonly kind: 'start'; readonly queueMs: number; readonly cachedTokens: number }
  /** What comes after the tokens told so far is computed at another rank: lower, because the sequence is late, or higher,
   *  because it has time. Never when the caller fixed the rank. */
  | { readonly kind: 'rank'; readonly rank: number; readonly reason: 'late' | 'slack' }
  /** After a step that produced tokens. `text` is what may be shown now: it lags while a character is incomplete or a
   *  stop string could still match, and the texts of all pieces concatenate to the whole answer. */
  | { readonly kind: 'piece'; readonly text: string; readonly tokens: readonly GeneratedToken[] }
  | {
      readonly kind: 'end';
      readonly reason: FinishReason;
      /** The stop string that ended it, when one did. */
      readonly stopString: string | null;
      readonly completionTokens: number;
      readonly ttftMs: number;
      readonly totalMs: number;
      /** Over the tokens of the answer; the plan's when there are none. */
      readonly rankMean: number;
      /** Of a queryable adapter: per block of layers, the mean weight of each atom over the tokens of this engine's life. */
      readonly atoms?: readonly (readonly number[])[];
    };

/** What one engine step had to do. */
export interface StepWork {
  /** Rows that decoded: one a sequence, and one a guess. */
  readonly decodeRows: number;
  /** Prompt tokens processed. */
  readonly prefillTokens: number;
  /** Σ active rank over decode rows, and over prefill tokens. */
  readonly decodeRanks: number;
  readonly prefillRanks: number;
  /** Σ cells attended over all rows. */
  readonly kvCells: number;
}

/** One engine step as the latency model sees it. */
export interface StepReport extends StepWork {
  readonly ms: number;
}

/** What a step takes, by what it does, in ms per unit: the gateway learns it (router/step-time.ts). */
export interface StepCosts {
  readonly step: number;
  readonly decodeRow: number;
  readonly prefillToken: number;
  readonly decodeRank: number;
  readonly prefillRank: number;
  readonly kvCell: number;
}

export interface ResidentAdapter {
  readonly generation: ResidentKey;
  readonly rank: number;
  readonly bytes: number;
  /** Sequences that use it now. */
  readonly uses: number;
}

export interface EngineStats {
  readonly running: number;
  readonly waiting: number;
  readonly kvCellsUsed: number;
  readonly kvCellsMax: number;
  readonly residents: readonly ResidentAdapter[];
  /** Packed files that are kept in memory beside the pages. Absent in a message: as it was told before. */
  readonly hosted?: readonly ResidentKey[];
  readonly adapterSlotsMax: number;
  /** Sequences that gave their cells to others, so far. */
  readonly preemptions: number;
  /** Adapters loaded because they were hot, and those of them that a sequence found there, so far. */
  readonly prewarms: number;
  readonly prewarmsUsed: number;
  /** Of the kernels, now: fewer than configured while others want the cores. */
  readonly threads: number;
  readonly steps: number;
  readonly tokensGenerated: number;
  /** Guesses computed, and those of them that came true (speculation.ts). */
  readonly draftTokens: number;
  readonly draftTokensAccepted: number;
  readonly prefixTokensQueried: number;
  readonly prefixTokensHit: number;
}

/** An adapter that will be asked for soon: so many of its ranks, in so many pages. */
export interface HotAdapter {
  readonly generation: Generation;
  readonly rank: number;
  readonly pages: number;
}

/** What the gateway must know of the base model, sent once when the engine is ready. */
export interface BaseInfo {
  readonly config: DecoderConfig;
  /** SHA-256 of the model file, hex. */
  readonly hash: string;
  /** Longest prompt + answer that the engine accepts, in tokens. */
  readonly contextMax: number;
  readonly endTokens: readonly number[];
  /** e.g. `ggml 0.21.0, cpu zen4, 2 threads, faithful (bf16)`: for doctor, logs and system_fingerprint. */
  readonly backend: string;
}

export type ToEngine =
  | {
      readonly kind: 'submit';
      readonly request: GenerateRequest;
      /** Tokens of the answer that its reader has: not empty when it resumes after an engine death. */
      readonly generated: Int32Array;
      readonly rankChanges: readonly RankChange[];
    }
  | { readonly kind: 'cancel'; readonly id: string }
  /** Forget a generation as soon as no sequence uses it. */
  | { readonly kind: 'unload'; readonly generation: Generation }
  /** These, and no others, stay in memory once loaded. */
  | { readonly kind: 'pin'; readonly generations: readonly Generation[] }
  /** The hottest first. */
  | { readonly kind: 'prewarm'; readonly hot: readonly HotAdapter[] }
  /** Before the first of them nothing is sized by time. */
  | { readonly kind: 'coefficients'; readonly costs: StepCosts }
  | { readonly kind: 'shutdown' };

export type FromEngine =
  | { readonly kind: 'ready'; readonly base: BaseInfo }
  | { readonly kind: 'refused'; readonly code: string; readonly message: string } // cannot start at all
  | { readonly kind: 'events'; readonly batch: ReadonlyArray<{ id: string; event: EngineEvent }> }
  | {
      readonly kind: 'failed';
      readonly id: string;
      readonly code: string;
      readonly message: string;
    }
  | { readonly kind: 'step'; readonly report: StepReport; readonly stats: EngineStats }
  /** Something changed without a step: a cancel, a loaded adapter, an unload. */
  | { readonly kind: 'stats'; readonly stats: EngineStats };
