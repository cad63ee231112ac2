// `bench adapters`: eight streams with eight different rank-16 adapters on all seven projections, all there at time zero.
// llama.cpp cannot mix LoRA sets in a batch; it is measured serving them one after another (as llama-server does) and
// round robin (better first token, every step eight batches of one), and the better throughput is the opponent.

import { writeAdapters } from './gguf-lora.ts';
import type { AdapterUse, GenerateJob, JobResult, SideOptions } from './job.ts';
import {
  agreement,
  type Entrant,
  idleShareMax,
  median,
  probeDistance,
  type Report,
  round,
  runRounds,
  type Series,
  seriesOf,
} from './measure.ts';
import { takePrompts } from './prompts.ts';
import { type SideName, SideProcess } from './side-process.ts';

export interface AdaptersSizes {
  /** As many adapters. */
  readonly streams: number;
  readonly promptTokens: number;
  readonly newTokens: number;
}

const fullAdapters: AdaptersSizes = { streams: 8, promptTokens: 64, newTokens: 128 };
export const adapterRank = 16;

/** All streams' tokens over the whole time, prompts included. */
const throughput = ({ ids, totalMs }: JobResult): number => (1000 * ids.flat().length) / totalMs;

export async function benchAdapters(
  // The folder takes the adapters: 10 MB each for the default model.
  { folder, ...options }: Pick<SideOptions, 'modelPath' | 'threads'> & { readonly folder: string },
  rounds: number,
  sizes: AdaptersSizes = fullAdapters,
): Promise<Report> {
  const { streams } = sizes;
  const adapters = writeAdapters(folder, options.modelPath, { count: streams, rank: adapterRank });
  const common = { ...options, adapters, streamsMax: streams, streamTokensMax: 256 };
  const open = (name: SideName, weights: SideOptions['weights']): Promise<SideProcess> =>
    SideProcess.open(name, { ...common, weights });
  const sides = new Map<string, SideProcess>();
  try {
    sides.set('llamacpp', await open('llamacpp', 'parity'));
    sides.set('parity', await open('rankgate', 'parity'));
    sides.set('faithful', await open('rankgate', 'faithful'));
    sides.set('fast', await open('rankgate', 'fast'));
    const results = await runRounds(entrantsOf(sides, sizes), rounds);
    return {
      ...summariseAdapters(results),
      sides: Object.fromEntries([...sides].map(([name, side]) => [name, side.description])),
    };
  } finally {
    for (const side of sides.values()) await side.close();
  }
}

function entrantsOf(
  sides: ReadonlyMap<string, SideProcess>,
  { streams, promptTokens, newTokens }: AdaptersSizes,
): Entrant[] {
  const withAdapters: GenerateJob = {
    kind: 'generate',
    prompts: takePrompts(streams, promptTokens),
    newTokens,
    adapters: Array.from(
      { length: streams },
      (_, adapter): AdapterUse => ({ adapter, rank: adapterRank }),
    ),
    order: 'one-after-another',
  };
  const withoutAdapters: GenerateJob = {
    ...withAdapters,
    adapters: withAdapters.adapters.map(() => null),
  };
  const side = (name: string): SideProcess => sides.get(name)!;
  const [llamacpp, parity, faithful] = [side('llamacpp'), side('parity'), side('faithful')];
  return [
    { name: 'llamacpp_serial', side: llamacpp, job: withAdapters },
    {
      name: 'llamacpp_round_robin',
      side: llamacpp,
      job: { ...withAdapters, order: 'round-robin' },
    },
    { name: 'llamacpp_no_adapter', side: llamacpp, job: withoutAdapters },
    { name: 'parity', side: parity, job: withAdapters },
    { name: 'parity_no_adapter', side: parity, job: withoutAdapters },
    { name: 'faithful', side: faithful, job: withAdapters },
    { name: 'faithful_no_adapter', side: faithful, job: withoutAdapters },
    { name: 'fast', side: side('fast'), job: withAdapters },
  ];
}

export function summariseAdapters(
  results: ReadonlyMap<string, readonly JobResult[]>,
): Omit<Report, 'sides'> {
  const series: Record<string, Series> = {};
  for (const [name, all] of results) {
    series[name] = seriesOf('tokens/s', all.map(throughput));
    series[`${name}_ttft_p50`] = seriesOf(
      'ms',
      all.map((result) => median(result.ttftMs)),
    );
    series[`${name}_ttft_worst`] = seriesOf(
      'ms',
      all.map((result) => Math.max(...result.ttftMs)),
    );
    series[`${name}_cpu`] = seriesOf(
      'CPU ms',
      all.map((result) => result.cpuMs),
    );
  }
  const value = (name: string): number => series[name]!.median;
  const opponent = Math.max(value('llamacpp_serial'), value('llamacpp_round_robin'));
  const opponentCpu = Math.min(value('llamacpp_serial_cpu'), value('llamacpp_round_robin_cpu'));
  const last = (name: string): JobResult => results.get(name)!.at(-1)!;
  const distance = (name: string): number =>
    probeDistance(last('llamacpp_serial'), last(name), last('llamacpp_no_adapter'));
  return {
    bench: 'adapters',
    figures: {
      parity_ratio_to_llamacpp: round(value('parity') / opponent),
      faithful_ratio_to_llamacpp: round(value('faithful') / opponent),
      fast_ratio_to_llamacpp: round(value('fast') / opponent),
      ratio_to_no_adapter: round(value('faithful') / value('faithful_no_adapter')),
      parity_ratio_to_no_adapter: round(value('parity') / value('parity_no_adapter')),
      llamacpp_ratio_to_no_adapter: round(opponent / value('llamacpp_no_adapter')),
      ttft_p50_ratio: round(value('faithful_ttft_p50') / value('llamacpp_serial_ttft_p50')),
      ttft_p50_ratio_round_robin: round(
        value('faithful_ttft_p50') / value('llamacpp_round_robin_ttft_p50'),
      ),
      parity_cpu_ratio_to_llamacpp: round(opponentCpu / value('parity_cpu')),
      faithful_cpu_ratio_to_llamacpp: round(opponentCpu / value('faithful_cpu')),
      fast_cpu_ratio_to_llamacpp: round(opponentCpu / value('fast_cpu')),
      cpu_ratio_to_no_adapter: round(value('faithful_no_adapter_cpu') / value('faithful_cpu')),
      ids_equal_parity: agreement(last('parity'), last('llamacpp_serial')),
      first_logits_distance_parity: distance('parity'),
      first_logits_distance_faithful: distance('faithful'),
      first_logits_distance_fast: distance('fast'),
      idle_core_share_max: idleShareMax(results),
    },
    series,
    notes: [
      'throughput ratios: against the better of llamacpp_serial and llamacpp_round_robin',
      'fast rounds activations to 8 bits as llama.cpp does (bench fidelity: the same divergence); parity has its very kernels',
      'ttft_p50_ratio: faithful against llamacpp_serial, the order in which llama-server serves different LoRA sets',
      'first_logits_distance: RMS to llamacpp_serial over the RMS that the adapters cause: ≪ 1, both sides applied the same',
    ],
  };
}
