// `bench swap`: what streams notice while the names they came by are swapped to other generations all the time. The whole
// gateway over HTTP: eight streams, each asked for again when it ends, over four adapters of three generations each, with
// room in memory for eight. Seconds without swaps and seconds with them alternate. Afterwards streams of the swapped seconds
// are compared, token by token, with the model alone under the generation that each says it had.

import { join } from 'node:path';
import type { Generation } from '../src/adapters/adapter.ts';
import { openDecoder } from '../src/model/open-decoder.ts';
import { type GatewayProcess, startGatewayProcess } from '../test/support/gateway-process.ts';
import { type Heard, IdleOracle, readTokens } from '../test/support/idle-oracle.ts';
import { writePeftAdapter } from '../test/support/make-peft-adapter.ts';
import { createRandom } from './adapter-numbers.ts';
import type { WeightMode } from './job.ts';
import { median, quantile, type Report, round, type Series, seriesOf } from './measure.ts';
import { takeTokens } from './prompts.ts';
import { readConfig } from './rankgate-side.ts';

export interface SwapSizes {
  readonly names: number;
  readonly generations: number;
  readonly rank: number;
  readonly streams: number;
  readonly seconds: number;
  readonly swapsPerSecond: number;
  readonly newTokens: number;
  /** Streams that are compared with the model alone, of each round. */
  readonly checked: number;
}

const fullSwap: SwapSizes = {
  names: 4,
  generations: 3,
  rank: 16,
  streams: 8,
  seconds: 15,
  swapsPerSecond: 100,
  newTokens: 64,
  checked: 24,
};

export interface SwapSettings {
  readonly modelPath: string;
  readonly threads: number;
  readonly weights: WeightMode;
}

/** One phase of a round. */
export interface Phase {
  readonly gapsMs: readonly number[];
  readonly heard: readonly Heard[];
  readonly failures: readonly string[];
  readonly swaps: number;
  readonly ms: number;
}

const promptTokens = 32;
/** Nats: the last bits that differ with a batch's shape; another generation or rank misses by 1 and more (hot-swap.test.ts). */
const epsilon = 0.25;

export async function benchSwap(
  settings: SwapSettings,
  rounds: number,
  sizes: SwapSizes = fullSwap,
): Promise<Report> {
  const { modelPath, threads, weights } = settings;
  const pages = Math.ceil(sizes.rank / 8);
  await using gateway = await startGatewayProcess({
    modelPath,
    flags: [
      ...['--threads', String(threads), '--weights', weights, '--log', 'none'],
      ...['--adapter-pages', String(1 + sizes.streams * pages), '--speculation', 'off'],
    ],
  });
  const generations = await addAdapters(gateway, modelPath, sizes);
  const phases: Record<'quiet' | 'swapped', Phase[]> = { quiet: [], swapped: [] };
  for (let index = -1; index < rounds; index++) {
    const order =
      index % 2 === 0 ? (['quiet', 'swapped'] as const) : (['swapped', 'quiet'] as const);
    for (const kind of order) {
      const phase = await runPhase(gateway, generations, sizes, kind === 'swapped');
      if (index >= 0) phases[kind].push(phase);
    }
  }
  const all = generations.flat();
  const { decoder, description } = await openDecoder({
    ...{ modelPath, modelHash: 'bench', mode: weights, backend: 'ggml', threads },
    ...{ cacheDirectory: null, cells: 512, pages: 1 + all.length * pages },
    ...{ tokensMax: 256, segmentsMax: 8 },
  });
  using oracle = IdleOracle.open(decoder, modelPath, join(gateway.dataDir, 'blobs'), all);
  const gaps = phases.swapped.map(({ heard }) =>
    heard.slice(0, sizes.checked).map((one) => oracle.worstGap(one)),
  );
  return { ...summariseSwap(phases, gaps), sides: { gateway: description } };
}

async function addAdapters(
  gateway: GatewayProcess,
  modelPath: string,
  { names, generations, rank }: SwapSizes,
): Promise<Generation[][]> {
  const shape = readConfig(modelPath);
  const added: Generation[][] = [];
  for (let name = 0; name < names; name++) {
    added.push([]);
    for (let version = 0; version < generations; version++) {
      const source = `a${name}-${version}`;
      const seed = 100 * name + version;
      writePeftAdapter(join(gateway.adaptersRoot, source), {
        shape,
        seed,
        rank,
        alpha: rank,
        gain: 0.3,
      });
      const answer = await gateway.post('/v1/adapters', {
        ...{ source, name: `a${name}`, replace: version > 0 },
        accept_base_name: 'HuggingFaceTB/SmolLM2-135M-Instruct',
      });
      if (!answer.ok) throw new Error(await answer.text());
      added[name]!.push(((await answer.json()) as { generation: Generation }).generation);
    }
  }
  return added;
}

async function runPhase(
  gateway: GatewayProcess,
  generations: readonly Generation[][],
  { streams, seconds, swapsPerSecond, newTokens }: SwapSizes,
  swapping: boolean,
): Promise<Phase> {
  const startMs = performance.now();
  const isOver = (): boolean => performance.now() - startMs > 1000 * seconds;
  const [gapsMs, heard, failures]: [number[], Heard[], string[]] = [[], [], []];
  let swaps = 0;
  const stream = async (index: number): Promise<void> => {
    for (let i = 0; !isOver(); i++) {
      const prompt = takeTokens(promptTokens, 31 * index + 7 * i);
      let lastMs: number | null = null;
      const onChunk = (): void => {
        const nowMs = performance.now();
        if (lastMs !== null) gapsMs.push(nowMs - lastMs);
        lastMs = nowMs;
      };
      const response = await gateway.post('/v1/completions', {
        ...{ model: `a${index % generations.length}`, prompt, stream: true, temperature: 0 },
        ...{ max_tokens: newTokens, logprobs: 1 },
      });
      if (response.status !== 200) throw new Error(`${response.status}: ${await response.text()}`);
      const { generation, rank, tokens } = (await readTokens(response, 1, null, onChunk))!;
      heard.push({ generation, rank, prompt, tokens: tokens[0]! });
    }
  };
  const swap = async (): Promise<void> => {
    const random = createRandom(1);
    for (; !isOver(); swaps++) {
      const dueMs = startMs + (1000 * (swaps + 1)) / swapsPerSecond;
      const name = random() % generations.length;
      const generation = generations[name]![random() % generations[name]!.length]!;
      const answer = await gateway.fetch(`/v1/adapters/a${name}`, {
        method: 'PUT',
        headers: { 'content-type': 'application/json' },
        body: JSON.stringify({ generation }),
      });
      if (answer.status !== 200) failures.push(`${answer.status}: ${await answer.text()}`);
      else await answer.arrayBuffer();
      const restMs = dueMs - performance.now();
      if (restMs > 0) await new Promise((resolve) => setTimeout(resolve, restMs));
    }
  };
  const working = Array.from({ length: streams }, (_, index) =>
    stream(index).catch((error: unknown) => failures.push(String(error))),
  );
  await Promise.all([...working, ...(swapping ? [swap()] : [])]);
  return { gapsMs, heard, failures, swaps, ms: performance.now() - startMs };
}

/** `gaps`: per round with swaps, how far below the idle best the worst token of each checked stream was, in nats. */
export function summariseSwap(
  { quiet, swapped }: Readonly<Record<'quiet' | 'swapped', readonly Phase[]>>,
  gaps: readonly (readonly number[])[],
): Omit<Report, 'sides'> {
  const p99 = (phases: readonly Phase[]): number[] =>
    phases.map(({ gapsMs }) => quantile(gapsMs, 0.99));
  const rate = ({ swaps, ms }: Phase): number => (1000 * swaps) / ms;
  const speed = ({ heard, ms }: Phase): number =>
    (1000 * heard.reduce((sum, { tokens }) => sum + tokens.length, 0)) / ms;
  const flat = gaps.flat();
  const series: Record<string, Series> = {
    gap_p99_quiet: seriesOf('ms', p99(quiet)),
    gap_p99_swapped: seriesOf('ms', p99(swapped)),
    gap_p50_quiet: seriesOf(
      'ms',
      quiet.map(({ gapsMs }) => median(gapsMs)),
    ),
    gap_p50_swapped: seriesOf(
      'ms',
      swapped.map(({ gapsMs }) => median(gapsMs)),
    ),
    swaps: seriesOf('1/s', swapped.map(rate)),
    tokens_quiet: seriesOf('tokens/s', quiet.map(speed)),
    tokens_swapped: seriesOf('tokens/s', swapped.map(speed)),
  };
  return {
    bench: 'swap',
    figures: {
      swaps_per_second: series.swaps!.median,
      gap_p99_ratio: round(series.gap_p99_swapped!.median / series.gap_p99_quiet!.median),
      throughput_ratio: round(series.tokens_swapped!.median / series.tokens_quiet!.median),
      failures: [...quiet, ...swapped].flatMap(({ failures }) => failures).length,
      mismatches: flat.filter((gap) => gap > epsilon).length,
      streams_checked: flat.length,
      worst_gap_nats: round(Math.max(0, ...flat)),
    },
    series,
    notes: [
      'gap_p99_ratio: 99th percentile of the time between two tokens of a stream, at the client, with swaps over without; medians of the rounds',
      `mismatches: streams with a token more than ${epsilon} nats below the best of an idle, teacher-forced run of the generation and rank that the answer named`,
      'a swap is an HTTP PUT that is durable (SQLite, synchronous FULL) before it is answered; the next request of that name loads what is not in memory',
    ],
  };
}
