import { describe, expect, it } from 'vitest';
import { clipGradients, squaredNorm } from '../../../src/trainer/gradient-norm.ts';

const of = (...parts: number[][]): Array<{ gradient: Float32Array }> =>
  parts.map((numbers) => ({ gradient: Float32Array.from(numbers) }));

describe('clipGradients', () => {
  it('scales all gradients together to the wanted length', () => {
    const parts = of([3, 0], [0, -4]);
    expect(clipGradients(parts, 1)).toBe(5);
    expect(parts[0]!.gradient[0]).toBeCloseTo(0.6, 5);
    expect(parts[1]!.gradient[1]).toBeCloseTo(-0.8, 5);
    expect(Math.sqrt(squaredNorm(parts))).toBeLessThanOrEqual(1);
  });

  it('leaves what is short enough as it is, bit for bit', () => {
    const parts = of([0.3], [0.4]);
    const before = parts.map(({ gradient }) => gradient.slice());
    expect(clipGradients(parts, 1)).toBeCloseTo(0.5, 6);
    expect(parts.map(({ gradient }) => gradient)).toEqual(before);
    expect(clipGradients(of([0, 0]), 1)).toBe(0);
  });

  it('returns a length that is not finite, and touches nothing', () => {
    for (const bad of [Number.NaN, Number.POSITIVE_INFINITY]) {
      const parts = of([1, bad], [2]);
      expect(Number.isFinite(clipGradients(parts, 1))).toBe(false);
      expect(parts[1]!.gradient[0]).toBe(2);
    }
  });
});
