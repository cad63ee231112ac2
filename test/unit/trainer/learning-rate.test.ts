import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { learningRateAt } from '../../../src/trainer/learning-rate.ts';

const shape = { learningRate: 0.5, warmupShare: 0.1, schedule: 'cosine' } as const;

describe('learningRateAt', () => {
  it('rises in a line, then falls along half a cosine', () => {
    const rates = Array.from({ length: 100 }, (_, step) => learningRateAt(step, 100, shape));
    expect(rates.slice(0, 10)).toEqual(Array.from({ length: 10 }, (_, i) => (0.5 * (i + 1)) / 10));
    expect(rates[10]).toBe(0.5);
    expect(rates[55]).toBeCloseTo(0.25, 12); // half way down
    expect(rates[40]).toBeCloseTo(0.5 * 0.75, 12); // cos 60°
    for (let step = 11; step < 100; step++) expect(rates[step]!).toBeLessThan(rates[step - 1]!);
  });

  it('stays where it is when constant', () => {
    const constant = { ...shape, schedule: 'constant' } as const;
    const rates = Array.from({ length: 100 }, (_, step) => learningRateAt(step, 100, constant));
    expect(new Set(rates.slice(9))).toEqual(new Set([0.5]));
    expect(rates[0]).toBeCloseTo(0.05, 12);
  });

  it('is above zero and at most the highest, whatever the steps', () => {
    const share = fc.double({ min: 0, max: 1, noNaN: true });
    fc.assert(
      fc.property(fc.integer({ min: 1, max: 2000 }), share, share, (steps, warmupShare, at) => {
        const step = Math.min(steps - 1, Math.floor(at * steps));
        const rate = learningRateAt(step, steps, { ...shape, warmupShare });
        expect(rate).toBeGreaterThan(0);
        expect(rate).toBeLessThanOrEqual(0.5);
      }),
    );
  });
});
