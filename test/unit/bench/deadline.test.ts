import { describe, expect, it } from 'vitest';
import { benchDeadline } from '../../../bench/deadline.ts';
import type { Heard } from '../../../bench/deadline-client.ts';
import { type DeadlineRuns, type Run, summariseDeadline } from '../../../bench/deadline-summary.ts';
import { tinyPath } from '../../support/open-test-decoder.ts';
import { smallMachine } from '../../support/simulator/machine.ts';
import { adapterOfCurve } from '../../support/simulator/simulated-adapter.ts';
import type { Arrival } from '../../support/simulator/traffic.ts';

const adapters = [adapterOfCurve('a0', [0.5, 0.75, 0.875, 1])];

/** Seconds apart: alone on the machine at rank 4 it takes 8 + 10 · 2.6 ms and 9 steps of 11 ms. */
function arrival(index: number, totalMs: number): Arrival {
  return {
    ...{ atMs: 1000 * index, adapter: 'a0', tenant: 't0', tier: 'instant' },
    ...{ promptTokens: 10, tokensMax: 10, answerTokens: 10 },
    budget: {
      ...{ totalMs, ttftMs: null, perTokenMs: null },
      ...{ strict: false, rank: null, rankMin: 1, priority: 8 },
    },
  };
}

function heard(totalMs: number, part: Partial<Heard> = {}): Heard {
  return {
    ...{ outcome: 'answered', tokens: 10, ttftMs: 40, totalMs, rank: 4, rankMean: 4 },
    ...{ predictedMs: 100, cachedTokens: 0, endedMs: 0, ...part },
  };
}

function runs(some: readonly Run[], beside: readonly Heard[] = [heard(300)]): DeadlineRuns {
  return {
    ...{ capacity: 4, capacityRank1: 9, scale: 1, endsEarly: 0, runs: some },
    neighbours: { arrivals: [], alone: [heard(100), heard(200)], beside },
    ...{ adapters, machine: { ...smallMachine, noise: 0 } },
  };
}

describe('bench deadline', () => {
  it('counts what was in time of what is feasible, and what late answers are worth: nothing', async () => {
    const arrivals = [200, 200, 200, 20, 200].map((totalMs, i) => arrival(i, totalMs));
    const four = { name: 'guarded', arrivals };
    const slow: Run = {
      ...four,
      load: 0.8,
      heard: [
        heard(125),
        heard(200, { rankMean: 2.5, predictedMs: 150 }),
        heard(201, { predictedMs: 201 }),
        heard(100), // in 20 ms is not to be had by anybody
        { ...heard(5), outcome: 'CONTENDED' },
      ],
    };
    const fast: Run = { ...four, load: 1.2, heard: arrivals.map(() => heard(100)) };
    const fixed: Run = { ...four, name: 'rank 1', load: 0.95, heard: slow.heard };
    const { figures, series } = await summariseDeadline(runs([slow, fast, fixed]), 2);
    expect(figures).toMatchObject({
      met_share_80: 0.5,
      met_share_120: 1,
      goodput_80: 0.5,
      goodput_120: 1,
      // Rank 4, rank 2.5, late, refused; in hindsight everybody has rank 4.
      fidelity_to_oracle: round((1 + (0.75 + 0.875) / 2) / 4),
      fidelity_to_oracle_120: 1,
      // 0.2, 0.25, 0, 0 and five times 0.
      error_median: 0,
      error_p90: 0.25,
      error_median_of_lengths: 0,
      noisy_neighbour_p99_ratio: 1.5,
    });
    expect(series['80 guarded: answered']!.median).toBe(4);
    expect(series['80 guarded: rank_changed_share']!.median).toBe(0.25);
    expect(series['95 rank 1: met_share']!.median).toBe(0.5);
    expect(series['80 hindsight: met_share']!.median).toBe(1);
  });

  it('takes answers as long as they were', async () => {
    const short = { name: 'guarded', load: 0.5, arrivals: [arrival(0, 60)] };
    // Ten tokens would take 140 ms, two 50 ms.
    const run: Run = { ...short, heard: [heard(59, { tokens: 2 })] };
    const { figures } = await summariseDeadline(runs([run]), 1);
    expect(figures.met_share_50).toBe(1);
    expect(figures.error_median_of_lengths).toBe(4);
  });

  it('runs on a whole gateway: every figure is a number', async () => {
    const { figures, series } = await benchDeadline(
      { modelPath: tinyPath, threads: 1, weights: 'faithful' },
      {
        ...{ ranks: [8, 4], loads: [0.5, 1.2], seconds: 0.4, fixedLoad: 0.5, fixedSeconds: 0.4 },
        ...{
          capacitySeconds: 0.4,
          callers: 2,
          probes: 2,
          neighbourSeconds: 0.3,
          hindsightRounds: 1,
        },
      },
    );
    expect(Object.entries(figures).filter(([, value]) => !Number.isFinite(value))).toEqual([]);
    expect(Object.keys(figures)).toEqual(
      expect.arrayContaining(['met_share_50', 'fidelity_to_oracle', 'goodput_120', 'error_p90']),
    );
    expect(series['50 rank R: rank']!.median).toBeGreaterThan(series['50 rank 1: rank']!.median);
    expect(series['50 guarded: cached_share']!.median).toBe(0);
  }, 120_000); // it may have to build the gateway first
});

function round(value: number): number {
  return Number(value.toPrecision(4));
}
