// What a long context costs: streams with 2,000 tokens each against the same streams with 100. The bytes of a stream's own
// keys and values must be read, whatever the kernel; what is left beyond them is what attention wastes.

import type { DecoderConfig } from '../src/model/decoder-config.ts';
import type { JobResult, SideOptions } from './job.ts';
import { median, type Report, round, runRounds, seriesOf } from './measure.ts';
import { takeTokens } from './prompts.ts';
import { readConfig } from './rankgate-side.ts';
import { SideProcess } from './side-process.ts';

export interface ContextSizes {
  readonly streams: number;
  readonly shortTokens: number;
  readonly longTokens: number;
  readonly steps: number;
  /** Of the buffer whose reading gives the memory bandwidth: larger than the caches. */
  readonly bufferBytes: number;
}

export const fullContext: ContextSizes = {
  streams: 16,
  shortTokens: 100,
  longTokens: 2000,
  steps: 16,
  bufferBytes: 512 * 1024 ** 2,
};

const cellNumberBytes = 2; // f16, as open-decoder.ts makes them

/** Bytes of keys and values of one token in all layers. */
export function tokenBytes({
  blocks,
  kvHeads,
  headSize,
}: Pick<DecoderConfig, 'blocks' | 'kvHeads' | 'headSize'>): number {
  return blocks * 2 * kvHeads * headSize * cellNumberBytes;
}

export async function benchContext(
  options: Pick<SideOptions, 'modelPath' | 'threads'>,
  rounds: number,
  sizes: ContextSizes,
): Promise<Report> {
  const { streams, shortTokens, longTokens, steps, bufferBytes } = sizes;
  const side = await SideProcess.open('rankgate', {
    ...options,
    weights: 'faithful',
    adapters: [],
    streamsMax: streams,
    streamTokensMax: Math.ceil(longTokens / 16) * 16,
  });
  try {
    const at = (tokens: number) =>
      ({ kind: 'context', tokens: takeTokens(tokens), streams, steps }) as const;
    const results = await runRounds(
      [
        { name: 'long', side, job: at(longTokens) },
        { name: 'short', side, job: at(shortTokens) },
        { name: 'read', side, job: { kind: 'bandwidth', bytes: bufferBytes, reads: 5 } },
      ],
      rounds,
    );
    const moreBytes =
      streams * (longTokens - shortTokens) * tokenBytes(readConfig(options.modelPath));
    return { ...summariseContext(results, moreBytes), sides: { context: side.description } };
  } finally {
    await side.close();
  }
}

export function summariseContext(
  results: ReadonlyMap<string, readonly JobResult[]>,
  moreBytes: number,
): Omit<Report, 'sides'> {
  const steps = (name: string): number[] =>
    results.get(name)!.map((result) => median(result.stepMs));
  const rates = results.get('read')!.flatMap((result) => result.samples.bytesPerMs!);
  // The fastest read of the run: the smallest time is subtracted.
  const ownMs = moreBytes / Math.max(...rates);
  const [long, short] = [median(steps('long')), median(steps('short'))];
  return {
    bench: 'decode',
    figures: {
      context_ratio: round((long - ownMs) / short),
      context_ratio_raw: round(long / short),
      context_own_kv_ms: round(ownMs),
      context_own_kv_mb: round(moreBytes / 1e6),
    },
    series: {
      context_long: seriesOf('ms/step', steps('long')),
      context_short: seriesOf('ms/step', steps('short')),
      memory_read: seriesOf(
        'GB/s',
        rates.map((rate) => rate / 1e6),
      ),
    },
    notes: [
      'context_ratio: (step with long contexts − bytes of keys and values that it reads more / fastest memory_read of the run) / step with short ones; context_ratio_raw: nothing subtracted',
      'memory_read: one row times a matrix of f32 that is larger than the caches, by the same process and threads; all streams hold copies of one stream’s cells',
    ],
  };
}
