// `bench decode`: one stream's decoding, a prompt of 512 tokens, and eight streams' batched decoding, without adapters,
// against llama.cpp on the same file with the same threads; then what a long context costs (context.ts). The opponent of
// a ratio is the faster of llama.cpp's two drivers (its C API, node-llama-cpp).

import { benchContext, type ContextSizes, fullContext } from './context.ts';
import type { Job, JobResult, SideOptions, WeightMode } from './job.ts';
import {
  agreement,
  type Entrant,
  idleShareMax,
  type Report,
  round,
  runRounds,
  type Series,
  seriesOf,
} from './measure.ts';
import { takePrompts } from './prompts.ts';
import { isServed } from './rankgate-side.ts';
import { SideProcess } from './side-process.ts';

export interface DecodeSizes {
  readonly streams: number;
  readonly newTokens: number;
  readonly promptTokens: number;
  readonly opponents: ReadonlyArray<'llamacpp' | 'node-llama-cpp'>;
  readonly context: ContextSizes;
}

export const fullDecode: DecodeSizes = {
  streams: 8,
  newTokens: 128,
  promptTokens: 512,
  opponents: ['llamacpp', 'node-llama-cpp'],
  context: fullContext,
};

type CommonOptions = Pick<SideOptions, 'modelPath' | 'threads'>;
type Results = ReadonlyMap<string, readonly JobResult[]>;

const ourModes = ['parity', 'faithful', 'fast'] as const satisfies readonly WeightMode[];

/** Tokens per second of what the job is about: prompt tokens, or all streams' tokens after the first. */
function rateOf(job: Job, result: JobResult): number {
  if (job.kind === 'prefill') return (1000 * job.prompt.length) / result.totalMs;
  if (job.kind !== 'generate') throw new Error(`no rate of ${job.kind}`);
  return (1000 * job.prompts.length * (job.newTokens - 1)) / result.decodeMs;
}

export async function benchDecode(
  options: CommonOptions,
  rounds: number,
  sizes: DecodeSizes = fullDecode,
): Promise<Report> {
  const common = {
    ...options,
    adapters: [],
    streamsMax: sizes.streams,
    streamTokensMax: 512,
  };
  const sides = new Map<string, SideProcess>();
  try {
    for (const name of sizes.opponents) {
      const side = await SideProcess.open(name, { ...common, weights: 'parity' });
      sides.set(name.replaceAll('-', '_'), side);
    }
    for (const weights of ourModes.filter(isServed)) {
      sides.set(weights, await SideProcess.open('rankgate', { ...common, weights }));
    }
    const report = await measure(sides, rounds, jobsOf(sizes));
    for (const side of sides.values()) await side.close();
    const context = await benchContext(options, rounds, sizes.context);
    return {
      bench: 'decode',
      figures: { ...report.figures, ...context.figures },
      series: { ...report.series, ...context.series },
      sides: { ...report.sides, ...context.sides },
      notes: [...report.notes, ...context.notes],
    };
  } finally {
    for (const side of sides.values()) await side.close();
  }
}

function jobsOf({ streams, newTokens, promptTokens }: DecodeSizes): Record<string, Job> {
  const generate = (prompts: number[][]): Job => {
    const adapters = prompts.map(() => null);
    return { kind: 'generate', prompts, newTokens, adapters, order: 'round-robin' };
  };
  return {
    decode: generate(takePrompts(1, 16)),
    prefill: { kind: 'prefill', prompt: takePrompts(1, promptTokens)[0]! },
    batch8: generate(takePrompts(streams, 32)),
  };
}

async function measure(
  sides: ReadonlyMap<string, SideProcess>,
  rounds: number,
  jobs: Readonly<Record<string, Job>>,
): Promise<Report> {
  const series: Record<string, Series> = {};
  const figures: Record<string, number> = {};
  for (const [name, job] of Object.entries(jobs)) {
    const entrants: Entrant[] = [...sides].map(([sideName, side]) => ({
      name: sideName,
      side,
      job,
    }));
    const summary = summarise(name, job, await runRounds(entrants, rounds));
    Object.assign(series, summary.series);
    Object.assign(figures, summary.figures);
  }
  return {
    bench: 'decode',
    figures,
    series,
    sides: Object.fromEntries([...sides].map(([name, side]) => [name, side.description])),
    notes: [
      'ratios: median tokens/s over the faster median of llamacpp and node_llama_cpp; *_ratio series: the same per round',
      '*_cpu_ratio: CPU time of the opponent that needs less over ours: holds on a machine with other load, one thread',
      'ids_equal: share of tokens before the first difference; llama.cpp parts from itself at near ties too',
    ],
  };
}

/** One job's rates, and every side of ours against the faster opponent. `decode_parity_ratio` is called `parity_ratio`. */
export function summarise(
  name: string,
  job: Job,
  results: Results,
): Pick<Report, 'series' | 'figures'> {
  const series: Record<string, Series> = {};
  const figures: Record<string, number> = {};
  const rates = new Map<string, readonly number[]>();
  for (const [side, all] of results) {
    const own = all.map((result) => rateOf(job, result));
    rates.set(side, own);
    series[`${name}_${side}`] = seriesOf('tokens/s', own);
    const cpu = all.map((result) => result.cpuMs);
    series[`${name}_${side}_cpu`] = seriesOf('CPU ms', cpu);
  }
  const ours = [...results.keys()].filter((side) => (ourModes as readonly string[]).includes(side));
  const opponents = [...results.keys()].filter((side) => !ours.includes(side));
  const rate = (side: string): number => series[`${name}_${side}`]!.median;
  const cpu = (side: string): number => series[`${name}_${side}_cpu`]!.median;
  const best = opponents.reduce((a, b) => (rate(a) >= rate(b) ? a : b));
  const key = name === 'decode' ? '' : `${name}_`;
  for (const side of ours) {
    figures[`${key}${side}_ratio`] = round(rate(side) / rate(best));
    figures[`${name}_${side}_cpu_ratio`] = round(Math.min(...opponents.map(cpu)) / cpu(side));
    series[`${name}_${side}_ratio`] = seriesOf(
      '×',
      rates.get(side)!.map((value, i) => value / rates.get(best)![i]!),
    );
  }
  const last = (side: string): JobResult => results.get(side)!.at(-1)!;
  for (const side of ['parity', 'node_llama_cpp']) {
    if (!results.has(side)) continue;
    figures[`${name}_ids_equal_${side}`] = agreement(last(side), last('llamacpp'));
  }
  figures[`${name}_idle_core_share_max`] = idleShareMax(results);
  return { series, figures };
}
