// rankgate's decoder as the engine's loop drives it: one Stepper, every stream a segment of one step, whatever adapter and
// rank it uses. No scheduler, text or HTTP on top, as there is none on llama.cpp's side (llama-cpp-side.ts). The only file
// of bench/ that knows rankgate's own modules.

import { ranksPerPage } from '../src/kernels/kernels.ts';
import { type DecoderConfig, readDecoderConfig } from '../src/model/decoder-config.ts';
import { openGguf } from '../src/model/gguf.ts';
import { openDecoder } from '../src/model/open-decoder.ts';
import { scrapCells } from '../src/model/step-inputs.ts';
import type { AdapterRows, Segment, Stepper } from '../src/model/stepper.ts';
import { type AdapterModule, adapterModules } from './adapter-numbers.ts';
import {
  type AdapterUse,
  type Job,
  probeOf,
  type RawResult,
  type Side,
  type SideOptions,
} from './job.ts';

type GenerateJob = Extract<Job, { kind: 'generate' }>;

export function readConfig(modelPath: string): DecoderConfig {
  using file = openGguf(modelPath);
  return readDecoderConfig(file);
}

export async function openSide(options: SideOptions): Promise<Side> {
  const pagesOf = options.adapters.map(({ rank }) => Math.ceil(rank / ranksPerPage));
  const { decoder, config, description } = await openDecoder({
    modelPath: options.modelPath,
    modelHash: '',
    mode: options.weights,
    backend: 'ggml',
    threads: options.threads,
    cacheDirectory: null,
    cells: scrapCells + options.streamsMax * options.streamTokensMax,
    pages: 1 + pagesOf.reduce((sum, count) => sum + count, 0),
    tokensMax: 512,
    segmentsMax: options.streamsMax,
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
    use === null ? null : { pages: pages[use.adapter]!, rank: use.rank, scale: 1 };
  return {
    description: `rankgate on ${description}`,
    run(job) {
      const runner = new Runner(stepper, options.streamTokensMax);
      return job.kind === 'prefill' ? runner.prefill(job.prompt) : runner.generate(job, rowsOf);
    },
    close() {
      stepper[Symbol.dispose]();
    },
  };
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
    return { totalMs, decodeMs: 0, ttftMs: [totalMs], stepMs: [], ids, probes };
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
    return { totalMs, decodeMs: totalMs - Math.max(...ttftMs), ttftMs, stepMs, ids, probes };
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
