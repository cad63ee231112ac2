// What both sides of a benchmark run: plain data, so that the parent can hand the same job to any child process. A side is
// a program that answers `open` once and then `run` any number of times; bench/child.ts is its loop.

import type { Generation } from '../src/adapters/adapter.ts';

export type WeightMode = 'parity' | 'faithful' | 'fast' | 'exact';

/** How a side is opened. Everything a side holds between jobs (weights, cells, adapters) is made here, untimed. */
export interface SideOptions {
  readonly modelPath: string;
  readonly threads: number;
  /** Most streams at once, and most tokens that one stream holds. */
  readonly streamsMax: number;
  readonly streamTokensMax: number;
  readonly adapters: readonly AdapterSpec[];
  /** Ours only. */
  readonly weights: WeightMode;
  /** llama.cpp only: type of its KV cells; ours are f32 in `exact` and f16 otherwise. */
  readonly kvType?: 'f16' | 'f32'; // f16
  /** llama.cpp only: `modelPath` is written first, as this file's weights dequantised to f32. */
  readonly f32From?: string;
  /** The engine side only. */
  readonly engine?: EngineSizes;
}

/** What the engine of the engine side may hold, and the packed adapters that its requests name by index. */
export interface EngineSizes {
  /** SHA-256 of the model file, which the adapters name as their base. */
  readonly modelHash: string;
  readonly blobDirectory: string;
  readonly generations: readonly Generation[];
  /** Of every adapter; all of it is used. */
  readonly rank: number;
  readonly pages: number;
}

/** A LoRA adapter made of seeded numbers (adapter-numbers.ts), on all seven projections. */
export interface AdapterSpec {
  readonly seed: number;
  readonly rank: number;
  /** The same numbers as a GGUF file, for llama.cpp. */
  readonly ggufPath: string;
}

/** Prompts of every stream, then `newTokens` greedy tokens of each, all streams at once. `adapters[i]` is the adapter of
 *  stream i: an index into SideOptions.adapters and how many of its ranks to use, or null. */
export interface GenerateJob {
  readonly kind: 'generate';
  readonly prompts: ReadonlyArray<readonly number[]>;
  readonly newTokens: number;
  readonly adapters: ReadonlyArray<AdapterUse | null>;
  /** llama.cpp only: in which order it serves streams whose LoRA sets differ. */
  readonly order: 'one-after-another' | 'round-robin';
}

/** Decoding steps of `streams` streams that all have tokens.length tokens, or up to `steps` fewer, in their cells already:
 *  the first run fills them (untimed), and later ones only step. */
export interface ContextJob {
  readonly kind: 'context';
  readonly tokens: readonly number[];
  readonly streams: number;
  readonly steps: number;
}

/** Logits after each token of each window, written to a file or compared with it: `kl` and `same` of JobResult.samples. */
export interface ScoreJob {
  readonly kind: 'score';
  readonly windows: ReadonlyArray<readonly number[]>;
  readonly referencePath: string;
  readonly role: 'write' | 'compare';
}

/** Requests to an engine's loop by index of their adapter. */
export interface ServedRequest {
  readonly adapter: number;
  readonly prompt: readonly number[];
}

/** So many streams always busy until the requests are used up, each with its own `newTokens`: `tokens` and `busyMs` of the time before the first place
 *  stays empty, and `queueMs` of each request. */
export interface ServeJob {
  readonly kind: 'serve';
  readonly streams: number;
  /** Of each request. */
  readonly newTokens: readonly number[];
  readonly requests: readonly ServedRequest[];
}

/** Streams that go on, and beside them single-token requests, each `pauses[i]` steps after the one before has ended:
 *  `queueMs` of each, from when the loop hears of it until it is in a step, and the gaps between the tokens of the streams:
 *  `gapMs` of those that a visitor's wait for its adapter overlaps, `quietGapMs` of those that no visit does. */
export interface VisitJob {
  readonly kind: 'visit';
  readonly streams: readonly ServedRequest[];
  /** Of each stream: enough for all visits, or the job fails. */
  readonly newTokens: number;
  readonly visits: readonly ServedRequest[];
  readonly pauses: readonly number[];
}

export type Job =
  | GenerateJob
  /** One prompt of which only the last token's logits are wanted, from an empty cache. */
  | { readonly kind: 'prefill'; readonly prompt: readonly number[] }
  | ContextJob
  /** Streaming reads of a buffer by the side's own threads: `bytesPerMs` of each. */
  | { readonly kind: 'bandwidth'; readonly bytes: number; readonly reads: number }
  | ScoreJob
  | ServeJob
  | VisitJob;

export interface AdapterUse {
  readonly adapter: number;
  readonly rank: number;
}

export interface JobResult {
  /** From the job's start to its last token. */
  readonly totalMs: number;
  /** From the first moment at which every stream has its first token to the end: what is left is decoding alone. */
  readonly decodeMs: number;
  /** Per stream, from the job's start to its first token. */
  readonly ttftMs: readonly number[];
  /** Milliseconds of each decoding step of the whole batch; empty where streams are served one after another. */
  readonly stepMs: readonly number[];
  /** CPU milliseconds of all threads of this process during the job. */
  readonly cpuMs: number;
  /** CPU milliseconds between the end of the job before and the start of this one: shows that an idle side was idle. */
  readonly idleCpuMs: number;
  /** The generated ids of each stream: the sides must agree, or one of them did other work. */
  readonly ids: ReadonlyArray<readonly number[]>;
  /** Logits of each stream's first token at the ids of `probeOf`: what the sides computed, before any choice. */
  readonly probes: ReadonlyArray<readonly number[]>;
  /** What else a kind of job measures, by the names given there. */
  readonly samples: Readonly<Record<string, readonly number[]>>;
}

export interface Side {
  /** e.g. `llama.cpp 0.4.0 by its C API, zen4, 2 threads`. */
  readonly description: string;
  run(job: Job): Promise<RawResult> | RawResult;
  /** [T, V]: logits after each token of a window, from an empty cache; valid until the next call. */
  windowLogits?(tokens: readonly number[]): readonly Float32Array[];
  close(): Promise<void> | void;
}

/** What a side measures itself; child.ts adds the CPU figures. */
export type RawResult = Omit<JobResult, 'cpuMs' | 'idleCpuMs'>;

/** The result of a job that generates nothing to compare. */
export function sampled(totalMs: number, samples: RawResult['samples']): RawResult {
  return { totalMs, decodeMs: 0, ttftMs: [], stepMs: [], ids: [], probes: [], samples };
}

export function unsupported(side: string, job: Job): Error {
  return new Error(`${side}: no job of kind ${job.kind}`);
}

const probeStride = 768; // 64 of SmolLM2's 49,152

export function probeOf(row: Float32Array): number[] {
  const values: number[] = [];
  for (let id = 0; id < row.length; id += probeStride) values.push(row[id]!);
  return values;
}

export function argmax(row: Float32Array): number {
  let best = 0;
  for (let i = 1; i < row.length; i++) if (row[i]! > row[best]!) best = i;
  return best;
}
