// `bench ranks`: does a row pay for its own rank? Eight rows decode, all at rank 4, all at rank 64, and one at rank 64
// among seven at rank 4. If cost follows rank, the odd row costs an eighth of the way from all-4 to all-64.

import type { AdapterSpec, Job, JobResult, SideOptions } from './job.ts';
import { type Entrant, median, type Report, round, runRounds, seriesOf } from './measure.ts';
import { takePrompts } from './prompts.ts';
import { SideProcess } from './side-process.ts';

const streams = 8;
const small = 4;
export const largeRank = 64;

function decode(ranks: readonly number[]): Job {
  return {
    kind: 'generate',
    prompts: takePrompts(streams, 16),
    newTokens: 64,
    adapters: ranks.map((rank, adapter) => ({ adapter, rank })),
    order: 'round-robin',
  };
}

/** Median step of a run: the first steps after a prefill and the odd interruption do not move it. */
const stepMs = (result: JobResult): number => median(result.stepMs);

export async function benchRanks(
  options: Omit<SideOptions, 'adapters' | 'streamsMax' | 'streamTokensMax'>,
  adapters: readonly AdapterSpec[],
  rounds: number,
): Promise<Report> {
  const side = await SideProcess.open('rankgate', {
    ...options,
    adapters,
    streamsMax: streams,
    streamTokensMax: 128,
  });
  try {
    const fill = (rank: number): number[] => Array.from({ length: streams }, () => rank);
    const jobs = {
      none: { ...decode(fill(small)), adapters: fill(small).map(() => null) },
      all_4: decode(fill(small)),
      one_64: decode([largeRank, ...fill(small).slice(1)]),
      all_64: decode(fill(largeRank)),
    };
    const entrants: Entrant[] = Object.entries(jobs).map(([name, job]) => ({ name, side, job }));
    const results = await runRounds(entrants, rounds);
    const series = Object.fromEntries(
      [...results].flatMap(([name, all]) => [
        [name, seriesOf('ms/step', all.map(stepMs))],
        [
          `${name}_cpu`,
          seriesOf(
            'CPU ms',
            all.map((result) => result.cpuMs),
          ),
        ],
      ]),
    );
    const ratio = (suffix: string): number => {
      const value = (name: string): number => series[`${name}${suffix}`]!.median;
      const eighth = (value('all_64') - value('all_4')) / streams;
      return round((value('one_64') - value('all_4')) / eighth);
    };
    return {
      bench: 'ranks',
      figures: { row_cost_ratio: ratio(''), row_cost_ratio_cpu: ratio('_cpu') },
      series,
      sides: { rankgate: side.description },
      notes: [
        'row_cost_ratio: (one_64 − all_4) / ((all_64 − all_4) / 8), medians of the rounds; _cpu: the same from CPU time',
      ],
    };
  } finally {
    await side.close();
  }
}
