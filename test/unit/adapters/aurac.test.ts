import { describe, expect, it } from 'vitest';
import { aurac } from '../../../src/adapters/aurac.ts';

describe('aurac', () => {
  it('has the published metric’s numbers', () => {
    const { v1, v2 } = aurac([1, 2, 4, 8], [10, 20, 30, 40]);
    expect(v1).toBeCloseTo(29.285714, 6);
    expect(v2).toBeCloseTo(25, 12);
  });

  it('is the quality itself where there is one rank, or one quality', () => {
    expect(aurac([8], [0.7])).toEqual({ v1: 0.7, v2: 0.7 });
    const { v1, v2 } = aurac([1, 3, 17], [0.5, 0.5, 0.5]);
    expect(v1).toBeCloseTo(0.5, 14);
    expect(v2).toBeCloseTo(0.5, 14);
  });

  it('lies between the worst and the best quality, whatever the ranks', () => {
    const { v1, v2 } = aurac([2, 3, 50], [0.9, 0.1, 0.4]);
    for (const value of [v1, v2]) {
      expect(value).toBeGreaterThan(0.1);
      expect(value).toBeLessThan(0.9);
    }
  });

  it.each([
    [[], []],
    [[1, 2], [1]],
    [
      [2, 2],
      [1, 1],
    ],
    [
      [4, 1],
      [1, 1],
    ],
    [[0], [1]],
  ])('refuses ranks %j with qualities %j', (ranks, quality) => {
    expect(() => aurac(ranks, quality)).toThrow('aurac');
  });
});
