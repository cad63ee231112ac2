import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import {
  nextBatchSize,
  type SampleStatistics,
  varianceOf,
} from '../../../src/trainer/batch-growth.ts';
import { createRng } from '../../support/random.ts';
import { doubles, trainerNumbers } from '../../support/trainer-numbers.ts';

/** Of per-sample gradients [samples, numbers]. */
function statisticsOf(gradients: Float64Array, samples: number): SampleStatistics {
  const count = gradients.length / samples;
  let meanSquaredNorm = 0;
  for (let i = 0; i < count; i++) {
    let sum = 0;
    for (let s = 0; s < samples; s++) sum += gradients[s * count + i]!;
    meanSquaredNorm += (sum / samples) ** 2;
  }
  return { samples, squaredNorms: gradients.reduce((sum, g) => sum + g * g, 0), meanSquaredNorm };
}

const unbounded = { eta: 0.2, max: Number.MAX_SAFE_INTEGER };

describe('nextBatchSize', () => {
  it.each(trainerNumbers.growth)(
    "variance and test are numpy's for $samples samples",
    ({ samples, gradients, variance, mean, wanted }) => {
      const statistics = statisticsOf(doubles(gradients), samples);
      expect(Math.abs(varianceOf(statistics) / variance - 1)).toBeLessThan(1e-6);
      expect(Math.abs(statistics.meanSquaredNorm / mean - 1)).toBeLessThan(1e-6);
      for (const [eta, size] of Object.entries(wanted)) {
        // From half of it and less in two steps at most, where the doubling does not hide it.
        const from = Math.max(1, Math.ceil(size / 2));
        expect(nextBatchSize(from, statistics, { ...unbounded, eta: Number(eta) })).toBe(size);
      }
    },
  );

  it('never falls, at most doubles, and ends at the cap', () => {
    const positive = fc.double({ min: 0, max: 1e9, noNaN: true });
    fc.assert(
      fc.property(
        fc.integer({ min: 1, max: 5000 }),
        fc.record({
          samples: fc.integer({ min: 1, max: 500 }),
          squaredNorms: positive,
          meanSquaredNorm: positive,
        }),
        fc.record({
          eta: fc.double({ min: 1e-3, max: 1e3, noNaN: true }),
          max: fc.integer({ min: 1, max: 5000 }),
        }),
        (current, statistics, options) => {
          const next = nextBatchSize(current, statistics, options);
          expect(Number.isInteger(next)).toBe(true);
          expect(next).toBeGreaterThanOrEqual(current);
          expect(next).toBeLessThanOrEqual(Math.max(current, Math.min(2 * current, options.max)));
        },
      ),
    );
  });

  it('one sample, gradients of zero, no noise and an endless eta change nothing', () => {
    const noisy = { samples: 8, squaredNorms: 1000, meanSquaredNorm: 0.1 };
    expect(nextBatchSize(8, noisy, unbounded)).toBe(16);
    expect(nextBatchSize(8, { ...noisy, samples: 1 }, unbounded)).toBe(8);
    expect(nextBatchSize(8, { samples: 8, squaredNorms: 0, meanSquaredNorm: 0 }, unbounded)).toBe(
      8,
    );
    expect(nextBatchSize(8, { samples: 8, squaredNorms: 8, meanSquaredNorm: 1 }, unbounded)).toBe(
      8,
    );
    expect(nextBatchSize(8, noisy, { ...unbounded, eta: Number.POSITIVE_INFINITY })).toBe(8);
  });

  it('answers too low from few samples, and nears the true size with more', () => {
    // Numbers of mean 0.1 and variance 1: ‖Var‖₁/(η²‖μ‖²) is 1/(0.25·0.01) = 400 at any width.
    const rng = createRng(9);
    const width = 50;
    const proposals = [8, 64, 512, 4096].map((samples) => {
      const gradients = Float64Array.from({ length: samples * width }, () => 0.1 + rng.normal());
      return Math.ceil(
        varianceOf(statisticsOf(gradients, samples)) /
          (0.25 * statisticsOf(gradients, samples).meanSquaredNorm),
      );
    });
    for (let i = 1; i < 4; i++) expect(proposals[i]!).toBeGreaterThan(proposals[i - 1]!);
    expect(proposals[0]!).toBeLessThan(50);
    expect(Math.abs(proposals[3]! / 400 - 1)).toBeLessThan(0.15);
  });
});
