// `bench load`: how long an adapter takes from disk to its first use while eight streams with adapters of their own run,
// and what those streams notice. Each visitor brings an adapter that is not in memory.

import { createRandom } from './adapter-numbers.ts';
import { adapterRank } from './adapters.ts';
import type { JobResult, ServedRequest, VisitJob } from './job.ts';
import { quantile, type Report, round, runRounds, seriesOf } from './measure.ts';
import { readBase, storePackedAdapters } from './packed-adapters.ts';
import { takeTokens } from './prompts.ts';
import type { EngineSettings } from './residency.ts';
import { SideProcess } from './side-process.ts';

export interface LoadSizes {
  readonly streams: number;
  /** Adapters that take turns as visitors, and how many of them fit: less than half, so that each has been evicted. */
  readonly visitors: number;
  readonly room: number;
  readonly visits: number;
  readonly newTokens: number;
}

const fullLoad: LoadSizes = {
  streams: 8,
  visitors: 16,
  room: 4,
  visits: 120,
  newTokens: 1900,
};

const promptTokens = 32;

export async function benchLoad(
  settings: EngineSettings,
  rounds: number,
  sizes: LoadSizes = fullLoad,
): Promise<Report> {
  const { folder, ...common } = settings;
  const { streams, visitors, room, newTokens } = sizes;
  const base = await readBase(settings.modelPath);
  const stored = { count: streams + visitors, rank: adapterRank };
  const generations = await storePackedAdapters(folder, base, stored);
  const side = await SideProcess.open('engine', {
    ...common,
    adapters: [],
    streamsMax: streams + 1,
    streamTokensMax: promptTokens + newTokens,
    engine: {
      modelHash: base.hash,
      blobDirectory: folder,
      generations,
      rank: adapterRank,
      pages: (streams + room) * Math.ceil(adapterRank / 8),
    },
  });
  try {
    const cold = visitJob(sizes, (i) => streams + (i % visitors));
    const warm = visitJob(sizes, (i) => i % streams);
    const results = await runRounds(
      [
        { name: 'cold', side, job: cold },
        { name: 'warm', side, job: warm },
      ],
      rounds,
    );
    return { ...summariseLoad(results), sides: { engine: side.description } };
  } finally {
    await side.close();
  }
}

/** Visits of one token each; a prompt of one token too, so that a visit costs the others as little as can be. */
function visitJob(sizes: LoadSizes, adapterOf: (visit: number) => number): VisitJob {
  const random = createRandom(1);
  const indices = Array.from({ length: sizes.visits }, (_, i) => i);
  return {
    kind: 'visit',
    newTokens: sizes.newTokens,
    streams: Array.from(
      { length: sizes.streams },
      (_, adapter): ServedRequest => ({ adapter, prompt: takeTokens(promptTokens, 7 * adapter) }),
    ),
    visits: indices.map((i) => ({ adapter: adapterOf(i), prompt: takeTokens(1, i) })),
    pauses: indices.map(() => 2 + (random() % 4)),
  };
}

export function summariseLoad(
  results: ReadonlyMap<string, readonly JobResult[]>,
): Omit<Report, 'sides'> {
  const all = (name: string, sample: string): number[] =>
    results.get(name)!.flatMap(({ samples }) => samples[sample]!);
  const p99 = (name: string, sample: string): number => quantile(all(name, sample), 0.99);
  const quiet = p99('cold', 'quietGapMs');
  return {
    bench: 'load',
    figures: {
      load_p99_ms: round(p99('cold', 'queueMs')),
      load_p50_ms: round(quantile(all('cold', 'queueMs'), 0.5)),
      gap_p99_ratio: round(p99('cold', 'gapMs') / quiet),
      gap_p99_ms: round(p99('cold', 'gapMs')),
      quiet_gap_p99_ms: round(quiet),
      quiet_gap_p50_ms: round(quantile(all('cold', 'quietGapMs'), 0.5)),
      warm_p99_ms: round(p99('warm', 'queueMs')),
      warm_gap_p99_ratio: round(p99('warm', 'gapMs') / p99('warm', 'quietGapMs')),
      loads: all('cold', 'queueMs').length,
    },
    series: {
      load: seriesOf('ms', all('cold', 'queueMs')),
      warm: seriesOf('ms', all('warm', 'queueMs')),
    },
    notes: [
      'load: from the moment the loop hears of a request whose adapter is not in memory to the step that uses it; packed files come from the page cache, and are read, hashed and checked each time',
      'gap_p99_ratio: p99 of the gaps between a stream’s tokens that a load overlaps over p99 of those, in the same jobs, that no visit overlaps',
      'warm: the same visits with adapters in memory',
    ],
  };
}
