import { describe, expect, it } from 'vitest';
import { betaDraw, normalDraw, normalShare } from '../../../src/router/draws.ts';
import { createRng } from '../../support/random.ts';

function momentsOf(draw: () => number): { mean: number; deviation: number } {
  const values = Array.from({ length: 20_000 }, draw);
  const mean = values.reduce((a, b) => a + b, 0) / values.length;
  const square = values.reduce((a, b) => a + (b - mean) ** 2, 0) / values.length;
  return { mean, deviation: Math.sqrt(square) };
}

describe('posterior draws', () => {
  it('are normal', () => {
    const { next } = createRng(1);
    const { mean, deviation } = momentsOf(() => normalDraw(next));
    expect(Math.abs(mean)).toBeLessThan(0.03);
    expect(Math.abs(deviation - 1)).toBeLessThan(0.02);
  });

  it.each([
    [1, 1],
    [0.01, 8],
    [8, 0.2],
    [3, 70],
    [1000, 1000],
  ])('have the mean and the deviation of Beta(%d, %d)', (a, b) => {
    const { next } = createRng(2);
    const { mean, deviation } = momentsOf(() => betaDraw(a, b, next));
    const wanted = a / (a + b);
    const spread = Math.sqrt((wanted * (1 - wanted)) / (a + b + 1));
    expect(Math.abs(mean - wanted)).toBeLessThan(0.03 * spread + 1e-9);
    expect(Math.abs(deviation / spread - 1)).toBeLessThan(0.1);
  });

  it('stay within 0…1 and end, also for a generator at its limits', () => {
    for (const constant of [0, 0.5, 1 - 2 ** -32]) {
      for (const [a, b] of [
        [8, 0.008],
        [4, 4],
        [1, 500],
      ] as const) {
        const drawn = betaDraw(a, b, () => constant);
        expect(drawn).toBeGreaterThanOrEqual(0);
        expect(drawn).toBeLessThanOrEqual(1);
      }
    }
  });

  it.each([
    [-3, 0.0013498980316],
    [-1, 0.1586552539315],
    [0, 0.5],
    [1.96, 0.9750021048518],
    [4, 0.9999683287582],
  ])('the share of a normal below %d is %d', (z, share) => {
    expect(Math.abs(normalShare(z) - share)).toBeLessThan(2e-7);
  });
});
