// What both sides of a benchmark run: plain data, so that the parent can hand the same job to any child process. A side is
// a program that answers `open` once and then `run` any number of times; bench/child.ts is its loop.

export type WeightMode = 'parity' | 'faithful';

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
}

/** A LoRA adapter made of seeded numbers (adapter-numbers.ts), on all seven projections. */
export interface AdapterSpec {
  readonly seed: number;
  readonly rank: number;
  /** The same numbers as a GGUF file, for llama.cpp. */
  readonly ggufPath: string;
}

export type Job =
  /** Prompts of every stream, then `newTokens` greedy tokens of each, all streams at once. `adapters[i]` is the adapter of
   *  stream i: an index into SideOptions.adapters and how many of its ranks to use, or null. */
  | {
      readonly kind: 'generate';
      readonly prompts: ReadonlyArray<readonly number[]>;
      readonly newTokens: number;
      readonly adapters: ReadonlyArray<AdapterUse | null>;
      /** llama.cpp only: in which order it serves streams whose LoRA sets differ. */
      readonly order: 'one-after-another' | 'round-robin';
    }
  /** One prompt of which only the last token's logits are wanted, from an empty cache. */
  | { readonly kind: 'prefill'; readonly prompt: readonly number[] };

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
}

export interface Side {
  /** e.g. `llama.cpp 0.4.0 by its C API, zen4, 2 threads`. */
  readonly description: string;
  run(job: Job): Promise<RawResult> | RawResult;
  close(): Promise<void> | void;
}

/** What a side measures itself; child.ts adds the CPU figures. */
export type RawResult = Omit<JobResult, 'cpuMs' | 'idleCpuMs'>;

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
