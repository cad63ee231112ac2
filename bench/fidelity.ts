// `bench fidelity`: how far each way of computing is from the same weights in f32. Mean divergence of the next-token
// distributions over a fixed text (bench/fidelity-text.txt: prose of our own docs, as it was on 2026-11-25), teacher-forced
// in windows of 512 tokens. The reference is our `exact` mode; llama.cpp on the same weights dequantised to f32 by its own
// code is a side too, and must be next to zero, else the reference is wrong.

import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { openGguf } from '../src/model/gguf.ts';
import { createTokenizer, readTokenizerSource } from '../src/model/tokenizer.ts';
import type { JobResult, ScoreJob, SideOptions, WeightMode } from './job.ts';
import { median, quantile, type Report, round, seriesOf } from './measure.ts';
import { isServed } from './rankgate-side.ts';
import { type SideName, SideProcess } from './side-process.ts';

export interface FidelitySizes {
  readonly windows: number;
  readonly windowTokens: number;
}

const fullFidelity: FidelitySizes = { windows: 8, windowTokens: 512 };

export interface FidelitySettings extends Pick<SideOptions, 'modelPath' | 'threads'> {
  /** Takes the f32 model and the reference's logits: 1.4 GB for the default model and text. */
  readonly folder: string;
}

type Divergences = ReadonlyMap<string, JobResult['samples']>;

export async function benchFidelity(
  settings: FidelitySettings,
  sizes: FidelitySizes = fullFidelity,
): Promise<Report> {
  const { modelPath, threads, folder } = settings;
  const windows = windowsOf(modelPath, sizes);
  const referencePath = join(folder, 'reference.f32');
  const f32Path = join(folder, 'f32.gguf');
  const common = { modelPath, threads, adapters: [], streamsMax: 1 };
  const options = { ...common, streamTokensMax: sizes.windowTokens, weights: 'parity' } as const;
  const sides: Record<string, string> = {};
  const samples = new Map<string, JobResult['samples']>();
  const scoreBy = async (
    key: string,
    name: SideName,
    own: SideOptions,
    role: ScoreJob['role'] = 'compare',
  ): Promise<void> => {
    const side = await SideProcess.open(name, own);
    try {
      sides[key] = side.description;
      const result = await side.run({ kind: 'score', windows, referencePath, role });
      if (role === 'compare') samples.set(key, result.samples);
    } finally {
      await side.close();
    }
  };
  await scoreBy('exact', 'rankgate', { ...options, weights: 'exact' }, 'write');
  const modes: readonly WeightMode[] = ['faithful', 'fast', 'parity'];
  for (const weights of modes.filter(isServed)) {
    await scoreBy(weights, 'rankgate', { ...options, weights });
  }
  await scoreBy('llamacpp', 'llamacpp', options);
  const f32 = { ...options, f32From: modelPath, modelPath: f32Path, kvType: 'f32' } as const;
  await scoreBy('llamacpp_f32', 'llamacpp', f32);
  return { ...summariseFidelity(samples), sides };
}

function windowsOf(modelPath: string, { windows, windowTokens }: FidelitySizes): number[][] {
  using file = openGguf(modelPath);
  const tokenizer = createTokenizer(readTokenizerSource(file.metadata));
  const text = readFileSync(join(import.meta.dirname, 'fidelity-text.txt'), 'utf8');
  const ids = [...tokenizer.encodeText(text, text.length)];
  if (ids.length < windows * windowTokens) {
    throw new RangeError(`the text has ${ids.length} tokens, want ${windows * windowTokens}`);
  }
  return Array.from({ length: windows }, (_, i) =>
    ids.slice(i * windowTokens, (i + 1) * windowTokens),
  );
}

export function summariseFidelity(samples: Divergences): Omit<Report, 'sides'> {
  const figures: Record<string, number> = {};
  const series: Record<string, Report['series'][string]> = {};
  const mean = (values: readonly number[]): number =>
    values.reduce((sum, value) => sum + value, 0) / values.length;
  for (const [side, { kl, same }] of samples) {
    figures[`kl_${side}`] = round(mean(kl!));
    figures[`kl_p99_${side}`] = round(quantile(kl!, 0.99));
    figures[`kl_median_${side}`] = round(median(kl!));
    figures[`same_top_${side}`] = round(mean(same!));
    series[`kl_${side}`] = seriesOf('nats', blockMeans(kl!, 512));
  }
  const tokens = [...samples.values()][0]?.kl?.length ?? 0;
  return {
    bench: 'fidelity',
    figures: { ...figures, tokens },
    series,
    notes: [
      'kl: mean over all tokens of KL(exact ‖ side) in nats, each window from an empty cache; series: one mean per 512 tokens; same_top: share of tokens whose likeliest successor is the reference’s',
      'kl_llamacpp_f32: llama.cpp on its own f32 copy of the weights, with f32 cells, against our exact mode: what two f32 implementations differ by',
      'deterministic: one run, no rounds',
    ],
  };
}

function blockMeans(values: readonly number[], size: number): number[] {
  const means: number[] = [];
  for (let from = 0; from < values.length; from += size) {
    const block = values.slice(from, from + size);
    means.push(block.reduce((sum, value) => sum + value, 0) / block.length);
  }
  return means;
}
