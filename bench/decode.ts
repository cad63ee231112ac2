// `bench decode`: one stream's decoding, a prompt of 512 tokens, and eight streams' batched decoding, without adapters,
// against llama.cpp on the same file with the same threads. The opponent of a ratio is the faster of llama.cpp's two
// drivers (its C API, node-llama-cpp).

import type { Job, JobResult, SideOptions } from './job.ts';
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
import { type SideName, SideProcess } from './side-process.ts';

const streams = 8;
const newTokens = 128;

const jobs: Readonly<Record<'decode' | 'prefill' | 'batch8', Job>> = {
  decode: generate(takePrompts(1, 16)),
  prefill: { kind: 'prefill', prompt: takePrompts(1, 512)[0]! },
  batch8: generate(takePrompts(streams, 32)),
};

function generate(prompts: number[][]): Job {
  const adapters = prompts.map(() => null);
  return { kind: 'generate', prompts, newTokens, adapters, order: 'round-robin' };
}

/** Tokens per second of what the job is about: prompt tokens, or all streams' tokens after the first. */
function rateOf(job: Job, result: JobResult): number {
  if (job.kind === 'prefill') return (1000 * job.prompt.length) / result.totalMs;
  return (1000 * job.prompts.length * (job.newTokens - 1)) / result.decodeMs;
}

export async function benchDecode(
  options: Omit<SideOptions, 'weights' | 'adapters' | 'streamsMax' | 'streamTokensMax'>,
  rounds: number,
): Promise<Report> {
  const common = { ...options, adapters: [], streamsMax: streams, streamTokensMax: 512 };
  const open = (name: SideName, weights: SideOptions['weights']): Promise<SideProcess> =>
    SideProcess.open(name, { ...common, weights });
  const sides = new Map<string, SideProcess>();
  try {
    sides.set('llamacpp', await open('llamacpp', 'parity'));
    sides.set('node_llama_cpp', await open('node-llama-cpp', 'parity'));
    sides.set('parity', await open('rankgate', 'parity'));
    sides.set('faithful', await open('rankgate', 'faithful'));
    return await measure(sides, rounds);
  } finally {
    for (const side of sides.values()) await side.close();
  }
}

async function measure(sides: ReadonlyMap<string, SideProcess>, rounds: number): Promise<Report> {
  const series: Record<string, Series> = {};
  const figures: Record<string, number> = {};
  for (const [name, job] of Object.entries(jobs)) {
    const entrants: Entrant[] = [...sides].map(([sideName, side]) => ({
      name: sideName,
      side,
      job,
    }));
    const results = await runRounds(entrants, rounds);
    for (const [sideName, all] of results) {
      const rates = all.map((result) => rateOf(job, result));
      series[`${name}_${sideName}`] = seriesOf('tokens/s', rates);
      const cpu = all.map((result) => result.cpuMs);
      series[`${name}_${sideName}_cpu`] = seriesOf('CPU ms', cpu);
    }
    const last = (sideName: string): JobResult => results.get(sideName)!.at(-1)!;
    figures[`${name}_ids_equal_parity`] = agreement(last('parity'), last('llamacpp'));
    figures[`${name}_ids_equal_node_llama_cpp`] = agreement(
      last('node_llama_cpp'),
      last('llamacpp'),
    );
    figures[`${name}_idle_core_share_max`] = idleShareMax(results);
  }
  const opponents = ['llamacpp', 'node_llama_cpp'];
  const ratio = (job: string, side: string): number => {
    const own = series[`${job}_${side}`]!;
    const best = opponents.reduce((a, b) =>
      series[`${job}_${a}`]!.median >= series[`${job}_${b}`]!.median ? a : b,
    );
    const other = series[`${job}_${best}`]!;
    series[`${job}_${side}_ratio`] = seriesOf(
      '×',
      own.values.map((value, round) => value / other.values[round]!),
    );
    const cpu = (name: string): number => series[`${job}_${name}_cpu`]!.median;
    figures[`${job}_${side}_cpu_ratio`] = round(Math.min(...opponents.map(cpu)) / cpu(side));
    return round(own.median / other.median);
  };
  const ratios = {
    parity_ratio: ratio('decode', 'parity'),
    faithful_ratio: ratio('decode', 'faithful'),
    prefill_parity_ratio: ratio('prefill', 'parity'),
    prefill_faithful_ratio: ratio('prefill', 'faithful'),
    batch8_parity_ratio: ratio('batch8', 'parity'),
    batch8_faithful_ratio: ratio('batch8', 'faithful'),
  };
  return {
    bench: 'decode',
    figures: { ...ratios, ...figures },
    series,
    sides: Object.fromEntries([...sides].map(([name, side]) => [name, side.description])),
    notes: [
      'ratios: median tokens/s over the faster median of llamacpp and node_llama_cpp; *_ratio series: the same per round',
      '*_cpu_ratio: CPU time of the opponent that needs less over ours: holds on a machine with other load, one thread',
      'ids_equal: share of tokens before the first difference; llama.cpp parts from itself at near ties too',
    ],
  };
}
