// `bench residency`: what it costs that not all adapters fit. 64 adapters of rank 16, requests by Zipf's law, and an engine
// with room for 8 of them against one with room for all; both read the same packed files and get the same requests.

import { createRandom } from './adapter-numbers.ts';
import { adapterRank } from './adapters.ts';
import type { EngineSizes, JobResult, ServedRequest, ServeJob, SideOptions } from './job.ts';
import { type Entrant, median, type Report, round, runRounds, seriesOf } from './measure.ts';
import { type PackedBase, readBase, storePackedAdapters } from './packed-adapters.ts';
import { takeTokens } from './prompts.ts';
import { SideProcess } from './side-process.ts';

export interface ResidencySizes {
  readonly adapters: number;
  readonly room: number;
  readonly streams: number;
  readonly requests: number;
  readonly promptTokens: number;
  /** Answers have half to one and a half times as many: equal ones would all end in the same step, and load at once. */
  readonly newTokens: number;
}

export const fullResidency: ResidencySizes = {
  adapters: 64,
  room: 8,
  streams: 8,
  requests: 128,
  promptTokens: 32,
  newTokens: 64,
};

export type EngineSettings = Pick<SideOptions, 'modelPath' | 'threads' | 'weights'> & {
  /** Takes the packed adapters: 10 MB each for the default model. */
  readonly folder: string;
};

/** Ranks 1 … count with probability ∝ 1/rank, by inversion of the cumulative sum. */
export function zipf(count: number, draws: number, seed: number): number[] {
  const cumulative: number[] = [];
  for (let rank = 1; rank <= count; rank++) cumulative.push((cumulative.at(-1) ?? 0) + 1 / rank);
  const random = createRandom(seed);
  return Array.from({ length: draws }, () => {
    const drawn = (random() / 2 ** 32) * cumulative.at(-1)!;
    return 1 + cumulative.findIndex((sum) => drawn < sum);
  });
}

export async function benchResidency(
  settings: EngineSettings,
  rounds: number,
  sizes: ResidencySizes = fullResidency,
): Promise<Report> {
  const { folder, ...common } = settings;
  const { adapters, room, streams, requests, promptTokens, newTokens } = sizes;
  const base: PackedBase = await readBase(settings.modelPath);
  const stored = { count: adapters, rank: adapterRank };
  const generations = await storePackedAdapters(folder, base, stored);
  const sides: SideProcess[] = [];
  const open = async (resident: number): Promise<SideProcess> => {
    const engine: EngineSizes = {
      modelHash: base.hash,
      blobDirectory: folder,
      generations,
      rank: adapterRank,
      pages: resident * Math.ceil(adapterRank / 8),
    };
    const streamTokensMax = promptTokens + 2 * newTokens;
    const sizesOfSide = { adapters: [], streamsMax: streams, streamTokensMax, engine };
    const side = await SideProcess.open('engine', { ...common, ...sizesOfSide });
    sides.push(side);
    return side;
  };
  try {
    const traffic = zipf(adapters, requests, 1).map(
      (rank, i): ServedRequest => ({ adapter: rank - 1, prompt: takeTokens(promptTokens, 7 * i) }),
    );
    const random = createRandom(2);
    const lengths = traffic.map(() => Math.ceil(newTokens / 2) + (random() % newTokens));
    const job: ServeJob = { kind: 'serve', streams, newTokens: lengths, requests: traffic };
    const entrants: Entrant[] = [
      { name: 'few', side: await open(room), job },
      { name: 'all', side: await open(adapters), job },
    ];
    return {
      ...summariseResidency(await runRounds(entrants, rounds), sizes),
      sides: Object.fromEntries(entrants.map(({ name, side }) => [name, side.description])),
    };
  } finally {
    for (const side of sides) await side.close();
  }
}

export function summariseResidency(
  results: ReadonlyMap<string, readonly JobResult[]>,
  { adapters, room, streams }: ResidencySizes,
): Omit<Report, 'sides'> {
  const rates = (name: string): number[] =>
    results.get(name)!.map(({ samples }) => (1000 * samples.tokens![0]!) / samples.busyMs![0]!);
  const queue = (name: string): number[] =>
    results.get(name)!.map(({ samples }) => median(samples.queueMs!));
  const cpu = (name: string): number[] => results.get(name)!.map(({ cpuMs }) => cpuMs);
  const [few, all] = [rates('few'), rates('all')];
  const figures = {
    ratio: round(median(few) / median(all)),
    cpu_ratio: round(median(cpu('all')) / median(cpu('few'))),
  };
  return {
    bench: 'residency',
    figures: { ...figures, adapters, room, streams },
    series: {
      few: seriesOf('tokens/s', few),
      all: seriesOf('tokens/s', all),
      ratio: seriesOf(
        '×',
        few.map((rate, i) => rate / all[i]!),
      ),
      few_cpu: seriesOf('CPU ms', cpu('few')),
      all_cpu: seriesOf('CPU ms', cpu('all')),
      few_queue_p50: seriesOf('ms', queue('few')),
      all_queue_p50: seriesOf('ms', queue('all')),
    },
    notes: [
      'ratio: median tokens/s with room for few over that with all resident, both over the time in which every stream has a request; series ratio: the same per round',
      'cpu_ratio: CPU time of the whole job with all resident over that with few: what loads cost in work',
      'Zipf 1.0, seeded; the round that is thrown away leaves memory as the traffic leaves it; packed files come from the page cache',
    ],
  };
}
