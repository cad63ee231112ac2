// `bench ranks`: does a row pay for its own rank? Eight rows decode, all at rank 4, all at rank 64, and one at rank 64
// among seven at rank 4. If cost follows rank, the odd row costs an eighth of the way from all-4 to all-64: a millisecond
// where a shared machine's speed changes by several within a minute. So runs are short and many, and differences are taken
// within a cycle of all four.

import { writeAdapters } from './gguf-lora.ts';
import type { GenerateJob, JobResult, SideOptions } from './job.ts';
import {
  type Entrant,
  median,
  type Report,
  round,
  runRounds,
  type Series,
  seriesOf,
} from './measure.ts';
import { takePrompts } from './prompts.ts';
import { SideProcess } from './side-process.ts';

export interface RanksSizes {
  readonly streams: number;
  readonly newTokens: number;
}

const fullRanks: RanksSizes = { streams: 8, newTokens: 12 };
/** A round of the command line; each is four runs of a fifth of a second. */
const cyclesPerRound = 12;
const small = 4;
const large = 64;

function decode(ranks: readonly number[], newTokens: number): GenerateJob {
  return {
    kind: 'generate',
    prompts: takePrompts(ranks.length, 16),
    newTokens,
    adapters: ranks.map((rank, adapter) => ({ adapter, rank })),
    order: 'round-robin',
  };
}

/** Median step of a run: the first steps after a prefill and the odd interruption do not move it. */
const stepMs = (result: JobResult): number => median(result.stepMs);

export async function benchRanks(
  // The folder takes the adapters: 39 MB each for the default model.
  {
    folder,
    ...options
  }: Pick<SideOptions, 'modelPath' | 'threads' | 'weights'> & { readonly folder: string },
  rounds: number,
  { streams, newTokens }: RanksSizes = fullRanks,
): Promise<Report> {
  const adapters = writeAdapters(folder, options.modelPath, { count: streams, rank: large });
  const side = await SideProcess.open('rankgate', {
    ...options,
    adapters,
    streamsMax: streams,
    streamTokensMax: 128,
  });
  try {
    const fill = (rank: number): number[] => Array.from({ length: streams }, () => rank);
    const all4 = decode(fill(small), newTokens);
    const jobs = {
      none: { ...all4, adapters: all4.adapters.map(() => null) },
      all_4: all4,
      one_64: decode([large, ...fill(small).slice(1)], newTokens),
      all_64: decode(fill(large), newTokens),
    };
    const entrants: Entrant[] = Object.entries(jobs).map(([name, job]) => ({ name, side, job }));
    const results = await runRounds(entrants, cyclesPerRound * rounds);
    return { ...summariseRanks(results, streams), sides: { rankgate: side.description } };
  } finally {
    await side.close();
  }
}

export function summariseRanks(
  results: ReadonlyMap<string, readonly JobResult[]>,
  streams: number,
): Omit<Report, 'sides'> {
  const steps = new Map([...results].map(([name, all]) => [name, all.map(stepMs)]));
  /** Of each cycle: how much longer a step is than with all rows at rank 4. */
  const extra = (name: string): number[] =>
    steps.get(name)!.map((ms, cycle) => ms - steps.get('all_4')![cycle]!);
  const [one, all] = [extra('one_64'), extra('all_64')];
  const series: Record<string, Series> = {};
  for (const [name, ms] of steps) series[name] = seriesOf('ms/step', ms);
  series.one_64_extra = seriesOf('ms/step', one);
  series.all_64_extra = seriesOf('ms/step', all);
  return {
    bench: 'ranks',
    figures: { row_cost_ratio: round(median(one) / (median(all) / streams)) },
    series,
    notes: [
      `row_cost_ratio: the median over all cycles of one_64 − all_4, divided by 1/${streams} of the median of all_64 − all_4`,
    ],
  };
}
