import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { multiplyTransposed, svd } from '../../../src/adapters/orthogonal.ts';
import { addRow, createSketch, sketchOf } from '../../../src/trainer/frequent-directions.ts';
import { createRng, normals } from '../../support/random.ts';

/** Rows whose directions are of very different size. */
function rowsOf(count: number, width: number, seed: number): Float32Array[] {
  const rng = createRng(seed);
  return Array.from({ length: count }, () =>
    normals(rng, width).map((x, i) => x * 0.85 ** i + 0.02 * rng.normal()),
  );
}

/** ‖XᵀX − SᵀS‖₂ and Σ_{i>k} σᵢ² of X for every k. */
function judge(rows: readonly Float32Array[], size: number): { error: number; rest: number[] } {
  const width = rows[0]!.length;
  const sketch = createSketch(size, width);
  for (const row of rows) addRow(sketch, row);
  const all = {
    rows: width,
    columns: rows.length,
    data: Float64Array.from(rows.flatMap((row) => Array.from(row))),
  };
  const stood = sketchOf(sketch);
  expect(stood.columns).toBeLessThanOrEqual(size);
  const [x, s] = [multiplyTransposed(all, all), multiplyTransposed(stood, stood)];
  const difference = { ...x, data: x.data.map((value, i) => value - s.data[i]!) };
  const { sigma } = svd(all);
  const rest = Array.from({ length: size }, (_, k) =>
    sigma.slice(k).reduce((sum, value) => sum + value * value, 0),
  );
  return { error: svd(difference).sigma[0]!, rest };
}

describe('frequent directions', () => {
  it('keep the guarantee for every k below l', () => {
    fc.assert(
      fc.property(
        fc.integer({ min: 1, max: 12 }),
        fc.integer({ min: 1, max: 90 }),
        fc.integer({ min: 0, max: 1e6 }),
        (size, count, seed) => {
          const { error, rest } = judge(rowsOf(count, 16, seed), size);
          rest.forEach((energy, k) => {
            expect(error).toBeLessThanOrEqual(energy / (size - k) + 1e-9 * rest[0]!);
          });
        },
      ),
      { numRuns: 60 },
    );
  });

  it('l = 20 of 300 rows of 40: the error is nowhere near zero, and within the bound at k = 10', () => {
    const { error, rest } = judge(rowsOf(300, 40, 5), 20);
    expect(error).toBeLessThanOrEqual(rest[10]! / 10);
    expect(error).toBeGreaterThan(1e-3 * rest[10]!);
  });

  it('many small rows of one direction are not lost to a few large ones', () => {
    // Dropping the smallest direction each time, without taking from the others, would lose all 2,000 of them.
    const row = (at: number, size: number): Float32Array =>
      Float32Array.from({ length: 16 }, (_, i) => (i === at ? size : 0));
    const large = [0, 1, 2].map((at) => row(at, 10));
    const small = Array.from({ length: 2000 }, () => row(3, 1));
    const { error, rest } = judge([...large, ...small], 4);
    expect(rest[3]).toBeCloseTo(100, 6);
    expect(error).toBeLessThanOrEqual(100 + 1e-6);
  });

  it('fewer rows than l, or a lower rank, are kept exactly', () => {
    const few = judge(rowsOf(7, 16, 1), 8);
    expect(few.error).toBeLessThan(1e-10 * few.rest[0]!);
    const rng = createRng(2);
    const three = rowsOf(3, 16, 3);
    const mixed = Array.from({ length: 60 }, () => {
      const [p, q, r] = normals(rng, 3);
      return three[0]!.map((x, i) => p! * x + q! * three[1]![i]! + r! * three[2]![i]!);
    });
    const low = judge(mixed, 8);
    expect(low.error).toBeLessThan(1e-6 * low.rest[0]!);
  });
});
