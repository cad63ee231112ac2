// Every bench with sides in child processes, on the real model in sizes that measure nothing: what is checked is that the
// sides open, run each kind of job and agree, and that every figure of the report is a number.

import { mkdirSync, mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { benchAdapters } from '../../../bench/adapters.ts';
import { benchDecode, fullDecode } from '../../../bench/decode.ts';
import { benchFidelity } from '../../../bench/fidelity.ts';
import { benchLoad } from '../../../bench/load.ts';
import type { Report } from '../../../bench/measure.ts';
import { benchRanks } from '../../../bench/ranks.ts';
import { benchResidency } from '../../../bench/residency.ts';
import { benchTenants } from '../../../bench/tenants.ts';
import { baseModelPath } from '../../support/base-model.ts';

describe('benches in tiny sizes', () => {
  const folder = mkdtempSync(join(tmpdir(), 'bench-smoke-'));
  let modelPath = '';
  beforeAll(async () => {
    modelPath = await baseModelPath();
  });
  afterAll(() => rmSync(folder, { recursive: true, force: true }));

  const own = (name: string): string => {
    mkdirSync(join(folder, name));
    return join(folder, name);
  };
  const checkNumbers = ({ figures }: Report, keys: readonly string[]): void => {
    expect(Object.keys(figures)).toEqual(expect.arrayContaining([...keys]));
    const bad = Object.entries(figures).filter(([, value]) => !Number.isFinite(value));
    expect(bad).toEqual([]);
  };

  it('decode: every mode and llama.cpp', async () => {
    const report = await benchDecode({ modelPath, threads: 1 }, 1, {
      ...fullDecode,
      streams: 2,
      newTokens: 4,
      promptTokens: 16,
      opponents: ['llamacpp'],
      context: { streams: 2, shortTokens: 16, longTokens: 64, steps: 4, bufferBytes: 2 ** 26 },
    });
    checkNumbers(report, [
      ...['parity_ratio', 'faithful_ratio', 'fast_ratio', 'context_ratio', 'batch8_fast_ratio'],
      ...['prefill_parity_ratio', 'prefill_faithful_ratio', 'prefill_fast_ratio'],
    ]);
    expect(report.figures.decode_ids_equal_parity).toBe(1);
  });

  it('adapters: both sides apply the same numbers', async () => {
    const sizes = { streams: 2, promptTokens: 8, newTokens: 4 };
    const settings = { modelPath, threads: 1, folder: own('adapters') };
    const report = await benchAdapters(settings, 1, sizes);
    checkNumbers(report, ['parity_ratio_to_llamacpp', 'ratio_to_no_adapter', 'ttft_p50_ratio']);
    const { first_logits_distance_parity, first_logits_distance_faithful } = report.figures;
    // 0.21 and 0.23; above 1.7 where our side was given other seeds, or the streams each other's adapters.
    expect(first_logits_distance_parity).toBeLessThan(0.5);
    expect(first_logits_distance_faithful).toBeLessThan(0.5);
  });

  it('ranks: rows of one step with ranks of their own', async () => {
    const report = await benchRanks(
      { modelPath, threads: 1, weights: 'faithful', folder: own('ranks') },
      1,
      { streams: 2, newTokens: 6 },
    );
    checkNumbers(report, ['row_cost_ratio']);
  });

  it('fidelity: every mode against exact', async () => {
    const sizes = { windows: 1, windowTokens: 24 };
    const report = await benchFidelity({ modelPath, threads: 1, folder: own('fidelity') }, sizes);
    checkNumbers(report, ['kl_parity', 'kl_fast', 'kl_llamacpp', 'same_top_faithful']);
    const { kl_faithful, kl_llamacpp_f32, kl_parity } = report.figures;
    expect(kl_faithful).toBeLessThan(1e-4);
    expect(kl_llamacpp_f32).toBeLessThan(1e-5);
    expect(kl_parity).toBeGreaterThan(kl_llamacpp_f32!);
  });

  it('residency: more adapters than room', async () => {
    const report = await benchResidency(
      { modelPath, threads: 1, weights: 'faithful', folder: own('residency') },
      1,
      { adapters: 3, room: 2, streams: 2, requests: 6, promptTokens: 4, newTokens: 3 },
    );
    checkNumbers(report, ['ratio']);
    expect(report.series.few!.median).toBeGreaterThan(0);
  });

  it('tenants: svfit over one basis, fly from seeds', async () => {
    const report = await benchTenants(
      { modelPath, threads: 1, weights: 'faithful', folder: own('tenants') },
      1,
      {
        ...{ tenants: 4, svfitRank: 16, flyRank: 8, flyTopK: 2, flyRoom: 3, streams: 2 },
        ...{ requests: 4, promptTokens: 4, newTokens: 3 },
      },
    );
    checkNumbers(report, ['bytes_per_tenant_svfit', 'bytes_per_tenant_fly']);
    expect(report.figures.bytes_to_lora_fly).toBeLessThan(0.6);
    expect(report.figures.bytes_to_lora_svfit).toBeLessThan(1 / 16);
  }, 120_000);

  it('load: every visitor waits for its adapter', async () => {
    const report = await benchLoad(
      { modelPath, threads: 1, weights: 'faithful', folder: own('load') },
      1,
      { streams: 2, visitors: 3, room: 1, visits: 3, newTokens: 64 },
    );
    checkNumbers(report, ['load_p99_ms', 'gap_p99_ratio']);
    expect(report.figures.loads).toBe(3);
    // A load lasts for a step at least, a visit without one for no part of a step.
    expect(report.series.load!.min).toBeGreaterThan(report.series.warm!.min);
  });
});
