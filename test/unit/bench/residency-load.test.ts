import { describe, expect, it } from 'vitest';
import { sortGaps } from '../../../bench/engine-side.ts';
import { type JobResult, sampled } from '../../../bench/job.ts';
import { summariseLoad } from '../../../bench/load.ts';
import { fullResidency, summariseResidency, zipf } from '../../../bench/residency.ts';

const result = (samples: JobResult['samples']): JobResult => ({
  ...sampled(1000, samples),
  cpuMs: 0,
  idleCpuMs: 0,
});

describe('bench residency', () => {
  it("draws by Zipf's law: the k-th adapter 1/k as often as the first", () => {
    const draws = zipf(64, 100_000, 1);
    const share = (rank: number): number =>
      draws.filter((draw) => draw === rank).length / draws.length;
    const harmonic = Array.from({ length: 64 }, (_, i) => 1 / (i + 1)).reduce((a, b) => a + b);
    for (const rank of [1, 2, 5, 10, 64]) {
      const want = 1 / rank / harmonic;
      // Five standard deviations of a share of 100,000 draws.
      expect(Math.abs(share(rank) - want)).toBeLessThan(5 * Math.sqrt(want / draws.length));
    }
    expect(zipf(64, 50, 2)).toEqual(zipf(64, 50, 2));
    expect(zipf(64, 50, 2)).not.toEqual(zipf(64, 50, 3));
  });

  it('compares tokens a second of the time in which all streams are busy', () => {
    const side = (tokens: number, busyMs: number): JobResult => ({
      ...result({ tokens: [tokens], busyMs: [busyMs], queueMs: [1, 3, 8] }),
      cpuMs: busyMs + tokens,
    });
    const { figures, series } = summariseResidency(
      new Map([
        ['few', [side(100, 1000), side(90, 1000), side(400, 5000)]],
        ['all', [side(100, 1000), side(240, 2000), side(110, 1000)]],
      ]),
      fullResidency,
    );
    expect(figures.ratio).toBe(0.8182); // 90 / 110
    expect(figures.cpu_ratio).toBe(1.009); // 1110 / 1100
    expect(series.few!.values).toEqual([100, 90, 80]);
    expect(series.few_queue_p50!.median).toBe(3);
  });
});

describe('bench load', () => {
  it('tells gaps during a load from those beside a visit and from quiet ones', () => {
    const gap = (fromMs: number, toMs: number) => ({ fromMs, toMs });
    const waits = [{ queueMs: 9, fromMs: 100, useMs: 110, endMs: 125 }];
    const gaps = [gap(80, 90), gap(90, 101), gap(101, 119), gap(119, 126), gap(126, 130)];
    expect(sortGaps(gaps, waits)).toEqual({
      queueMs: [9],
      gapMs: [11, 18], // 119 … 126 overlaps the visit but not its load
      quietGapMs: [10, 4],
    });
  });

  it('takes the 99th percentile of all rounds together', () => {
    const numbers = (from: number): number[] => Array.from({ length: 100 }, (_, i) => from + i);
    const side = (queueMs: number[], gapMs: number[], quietGapMs: number[]): JobResult =>
      result({ queueMs, gapMs, quietGapMs });
    const { figures } = summariseLoad(
      new Map([
        ['cold', [side(numbers(1), numbers(101), numbers(1)), side(numbers(101), [301], [1])]],
        ['warm', [side([1, 2], [4], [2])]],
      ]),
    );
    expect(figures).toMatchObject({
      load_p99_ms: 198, // of 1 … 200
      load_p50_ms: 100,
      gap_p99_ms: 200, // of 101 … 200 and 301
      quiet_gap_p99_ms: 99, // of 1 … 100 and 1
      gap_p99_ratio: 2.02,
      warm_gap_p99_ratio: 2,
      loads: 200,
    });
  });
});
