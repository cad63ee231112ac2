// rankgate's decoder as the engine's loop drives it: one Stepper, every stream a segment of one step, whatever adapter and
// rank it uses. No scheduler, text or HTTP on top, as there is none on llama.cpp's side (llama-cpp-side.ts). The only file
// of bench/ that knows rankgate's own modules.

import { createKernels } from '../src/kernels/create-kernels.ts';
import { type Kernels, ranksPerPage } from '../src/kernels/kernels.ts';
import { type DecoderConfig, readDecoderConfig } from '../src/model/decoder-config.ts';
import { openGguf } from '../src/model/gguf.ts';
import { openDecoder } from '../src/model/open-decoder.ts';
import { scrapCells } from '../src/model/step-inputs.ts';
import { type AdapterRows, type Segment, type Stepper, uniformRows } from '../src/model/stepper.ts';
import type { WeightMode as ServedMode } from '../src/model/weights.ts';
import { type AdapterModule, adapterModules } from './adapter-numbers.ts';
import {
  type AdapterUse,
  type ContextJob,
  type GenerateJob,
  probeOf,
  type RawResult,
  type Side,
  type SideOptions,
  sampled,
  unsupported,
  type WeightMode,
} from './job.ts';

const servedModes: readonly ServedMode[] = ['parity', 'faithful', 'fast', 'exact'];

/** Whether this checkout has the mode: the benches leave out the sides that it has not. */
export function isServed(mode: WeightMode): mode is ServedMode {
  return (servedModes as readonly string[]).includes(mode);
}

export function readConfig(modelPath: string): DecoderConfig {
  using file = openGguf(modelPath);
  return readDecoderConfig(file);
}

const tokensMax = 512;

export async function openSide(options: SideOptions): Promise<Side> {
  const { weights: mode } = options;
  if (!isServed(mode)) throw new Error(`weights: ${mode} is not there yet`);
  const pagesOf = options.adapters.map(({ rank }) => Math.ceil(rank / ranksPerPage));
  const { decoder, config, description } = await openDecoder({
    modelPath: options.modelPath,
    modelHash: '',
    mode,
    backend: 'ggml',
    threads: options.threads,
    cacheDirectory: null,
    cells: scrapCells + options.streamsMax * options.streamTokensMax,
    pages: 1 + pagesOf.reduce((sum, count) => sum + count, 0),
    tokensMax,
    // Rows of logits count as segments: a window that is scored wants one for each of its tokens.
    segmentsMax: options.streamsMax === 1 ? tokensMax : options.streamsMax,
  });
  const stepper: Stepper = decoder;
  const pages: number[][] = [];
  let nextPage = 1;
  options.adapters.forEach(({ seed, rank }, index) => {
    const own = Array.from({ length: pagesOf[index]! }, () => nextPage++);
    for (const module of adapterModules(config, seed, rank)) writePages(stepper, own, rank, module);
    pages.push(own);
  });
  const rowsOf = (use: AdapterUse | null): AdapterRows | null =>
    use === null ? null : uniformRows(pages[use.adapter]!, use.rank);
  const runner = new Runner(stepper, options.streamTokensMax);
  const reader = new BufferReader(options.threads);
  return {
    description: `rankgate on ${description}`,
    run(job) {
      switch (job.kind) {
        case 'prefill':
          return runner.prefill(job.prompt);
        case 'generate':
          return runner.generate(job, rowsOf);
        case 'context':
          return runner.context(job);
        case 'bandwidth':
          return reader.read(job.bytes, job.reads);
        default:
          throw unsupported('rankgate', job);
      }
    },
    windowLogits: (tokens) => runner.windowLogits(tokens),
    close() {
      reader.close();
      stepper[Symbol.dispose]();
    },
  };
}

/** How fast the side's threads read memory: one row times a matrix of f32 larger than the caches, so that there is one
 *  multiplication for every four bytes and the reading is what takes the time. Kernels of its own: a second thread pool,
 *  idle while the decoder's works, and the other way round. */
class BufferReader {
  readonly #threads: number;
  #kernels: Kernels | null = null;
  #run: (() => void) | null = null;
  #bytes = 0;

  constructor(threads: number) {
    this.#threads = threads;
  }

  async read(bytes: number, reads: number): Promise<RawResult> {
    const run = this.#run ?? (await this.#open(bytes));
    const rates: number[] = [];
    const start = performance.now();
    for (let i = 0; i < reads; i++) {
      const before = performance.now();
      run();
      rates.push(this.#bytes / (performance.now() - before));
    }
    return sampled(performance.now() - start, { bytesPerMs: rates });
  }

  async #open(bytes: number): Promise<() => void> {
    const width = 4096;
    const kernels = await createKernels('ggml', { threads: this.#threads });
    this.#kernels = kernels;
    // Zeroed, not undefined: pages that were never written are one page of zeroes and no memory is read.
    const matrix = kernels.store('f32', [Math.ceil(bytes / (4 * width)), width], 'zero');
    this.#bytes = matrix.bytes;
    const program = kernels.compile(
      (ops) => ({ y: ops.linear(ops.input('x', 'f32', [1, width]), matrix) }),
      { segments: 0 },
    );
    program.write('x', new Float32Array(width).fill(1));
    this.#run = () => program.run([]);
    return this.#run;
  }

  close(): void {
    this.#kernels?.[Symbol.dispose]();
  }
}

function writePages(
  stepper: Stepper,
  pages: readonly number[],
  rank: number,
  module: AdapterModule,
): void {
  const { block, projection, in: inputs, out } = module;
  pages.forEach((page, index) => {
    const from = index * ranksPerPage;
    const count = Math.min(ranksPerPage, rank - from);
    const a = new Uint16Array(ranksPerPage * inputs); // [8, in]
    a.set(module.a.subarray(from * inputs, (from + count) * inputs));
    const b = new Uint16Array(ranksPerPage * out); // [8, out]
    for (let row = 0; row < out; row++) {
      for (let r = 0; r < count; r++) b[r * out + row] = module.b[row * rank + from + r]!;
    }
    stepper.writePage(page, { block, projection }, { a, b });
  });
}

/** Runs jobs over a Stepper; stream i owns the cells from `scrapCells + i · streamTokensMax`. */
class Runner {
  readonly #stepper: Stepper;
  readonly #streamTokensMax: number;
  /** Tokens that the cells of every stream hold for `context`. */
  #filledTokens = 0;

  constructor(stepper: Stepper, streamTokensMax: number) {
    this.#stepper = stepper;
    this.#streamTokensMax = streamTokensMax;
  }

  #segment(stream: number, position: number, tokens: readonly number[]): Segment {
    return {
      tokens: Int32Array.from(tokens),
      cellBase: scrapCells + stream * this.#streamTokensMax,
      position,
      adapter: null,
      wantsLogits: true,
    };
  }

  prefill(prompt: readonly number[]): RawResult {
    const start = performance.now();
    const result = this.#stepper.step([this.#segment(0, 0, prompt)]);
    const ids = [[result.argmax(0)]];
    const totalMs = performance.now() - start;
    const probes = [probeOf(result.logits(0))];
    return { totalMs, decodeMs: 0, ttftMs: [totalMs], stepMs: [], ids, probes, samples: {} };
  }

  windowLogits(tokens: readonly number[]): Float32Array[] {
    const drafts = tokens.length - 1; // every token but the first as a guess: logits after each of them
    const result = this.#stepper.step([{ ...this.#segment(0, 0, tokens), drafts }]);
    return tokens.map((_, draft) => result.logits(0, draft));
  }

  context({ tokens, streams, steps }: ContextJob): RawResult {
    if (tokens.length > this.#filledTokens) this.#fill(tokens, streams);
    const stepMs: number[] = [];
    const start = performance.now();
    for (let position = tokens.length - steps; position < tokens.length; position++) {
      const before = performance.now();
      const segments = Array.from({ length: streams }, (_, stream) =>
        this.#segment(stream, position, [tokens[(position + stream) % tokens.length]!]),
      );
      const result = this.#stepper.step(segments);
      for (let stream = 0; stream < streams; stream++) result.argmax(stream);
      stepMs.push(performance.now() - before);
    }
    return { ...sampled(performance.now() - start, {}), stepMs };
  }

  /** One stream's cells by prefill, the others' by copying them: what they hold does not change what reading it costs. */
  #fill(tokens: readonly number[], streams: number): void {
    const { tokensMax } = this.#stepper;
    for (let position = 0; position < tokens.length; position += tokensMax) {
      const part = tokens.slice(position, position + tokensMax);
      this.#stepper.step([{ ...this.#segment(0, position, part), wantsLogits: false }]);
    }
    const first = this.#segment(0, 0, []).cellBase;
    for (let stream = 1; stream < streams; stream++) {
      this.#stepper.copyCells(first, this.#segment(stream, 0, []).cellBase, tokens.length);
    }
    this.#filledTokens = tokens.length;
  }

  generate(job: GenerateJob, rowsOf: (use: AdapterUse | null) => AdapterRows | null): RawResult {
    const adapters = job.adapters.map(rowsOf);
    const start = performance.now();
    const ids: number[][] = job.prompts.map(() => []);
    const ttftMs: number[] = job.prompts.map(() => 0);
    const probes: number[][] = job.prompts.map(() => []);
    const streams = job.prompts.map((_, stream) => stream);
    for (const group of this.#admissions(job.prompts)) {
      const segments = group.map((stream) => ({
        ...this.#segment(stream, 0, job.prompts[stream]!),
        adapter: adapters[stream]!,
      }));
      const result = this.#stepper.step(segments);
      group.forEach((stream, index) => {
        ids[stream]!.push(result.argmax(index));
        ttftMs[stream] = performance.now() - start;
        probes[stream] = probeOf(result.logits(index));
      });
    }
    const stepMs: number[] = [];
    for (let i = 1; i < job.newTokens; i++) {
      const before = performance.now();
      const segments = streams.map((stream) => ({
        ...this.#segment(stream, job.prompts[stream]!.length + i - 1, [ids[stream]!.at(-1)!]),
        adapter: adapters[stream]!,
      }));
      const result = this.#stepper.step(segments);
      for (const stream of streams) ids[stream]!.push(result.argmax(stream));
      stepMs.push(performance.now() - before);
    }
    const totalMs = performance.now() - start;
    const decodeMs = totalMs - Math.max(...ttftMs);
    return { totalMs, decodeMs, ttftMs, stepMs, ids, probes, samples: {} };
  }

  /** Streams whose prompts fit into one step together, in order. */
  #admissions(prompts: GenerateJob['prompts']): number[][] {
    const groups: number[][] = [];
    let room = 0;
    prompts.forEach((prompt, stream) => {
      if (prompt.length > room) {
        groups.push([]);
        room = this.#stepper.tokensMax;
      }
      groups.at(-1)!.push(stream);
      room -= prompt.length;
    });
    return groups;
  }
}
