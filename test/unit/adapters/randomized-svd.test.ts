import { describe, expect, it } from 'vitest';
import {
  type Columns,
  innerProducts,
  jacobiSvd,
  multiplyTransposed,
  transpose,
} from '../../../src/adapters/orthogonal.ts';
import {
  identity,
  largestSvd,
  orthonormal,
  outputDirections,
} from '../../../src/adapters/randomized-svd.ts';
import { createRng } from '../../support/random.ts';

function random(rows: number, columns: number, seed: number): Columns {
  const rng = createRng(seed);
  return { rows, columns, data: Float64Array.from({ length: rows * columns }, () => rng.normal()) };
}

/** [rows, columns] with the given singular values. */
function withSpectrum(rows: number, columns: number, sigma: readonly number[]): Columns {
  const left = orthonormal(random(rows, sigma.length, 1));
  const right = orthonormal(random(columns, sigma.length, 2));
  const data = left.data.map((value, i) => value * sigma[Math.floor(i / rows)]!);
  return multiplyTransposed({ ...left, data }, right);
}

const norm = ({ data }: Columns): number =>
  Math.sqrt(data.reduce((sum, value) => sum + value * value, 0));
const minus = (x: Columns, y: Columns): Columns => ({
  ...x,
  data: x.data.map((value, i) => value - y.data[i]!),
});
const tail = (sigma: ArrayLike<number>, k: number): number =>
  Math.sqrt(
    Array.from(sigma)
      .slice(k)
      .reduce((sum, value) => sum + value * value, 0),
  );

const spectra: Record<string, number[]> = {
  'falling by a tenth': Array.from({ length: 160 }, (_, i) => 0.9 ** i),
  'falling like 1/i': Array.from({ length: 160 }, (_, i) => 1 / (1 + i)),
  flat: Array.from({ length: 160 }, (_, i) => 1 - i / 1000),
  'of rank 20': Array.from({ length: 160 }, (_, i) => (i < 20 ? 20 - i : 0)),
};

describe('largestSvd of a matrix that is too large to be done exactly', () => {
  for (const [name, sigma] of Object.entries(spectra)) {
    for (const [rows, columns] of [
      [200, 160],
      [160, 220],
    ] as const) {
      const x = withSpectrum(rows, columns, sigma);

      it(`${rows}×${columns}, spectrum ${name}: at most 1.01 of the best error`, () => {
        for (const rank of [1, 8, 32, 47, 48]) {
          const { us, v } = largestSvd(x, { rank, seed: 7 });
          expect(us.columns).toBe(rank);
          const error = norm(minus(x, multiplyTransposed(us, v)));
          const best = tail(sigma, rank);
          expect(error).toBeLessThanOrEqual(1.01 * best + 1e-12 * norm(x));
          expect(error).toBeGreaterThanOrEqual(best * (1 - 1e-9));
        }
      });
    }
  }

  it('is the same for the same seed, and another for another', () => {
    const x = withSpectrum(200, 160, spectra.flat!);
    const of = (seed: number): Float64Array => largestSvd(x, { rank: 8, seed }).us.data;
    expect(of(3)).toEqual(of(3));
    expect(of(3)).not.toEqual(of(4));
  });

  it('is exact where the matrix is small', () => {
    const x = withSpectrum(128, 140, spectra['falling like 1/i']!.slice(0, 128));
    const { sigma } = largestSvd(x, { rank: 5, seed: 0 });
    Array.from(sigma).forEach((value, i) => {
      expect(value).toBeCloseTo(1 / (1 + i), 12);
    });
  });
});

describe('outputDirections', () => {
  const covarianceOf = (inputs: Columns): Columns => innerProducts(inputs, inputs);

  it.each([
    [24, 20],
    [20, 24],
    [200, 60],
  ])('are the left singular vectors of x·C^½: %i×%i', (rows, columns) => {
    const x = random(rows, columns, 3);
    const inputs = random(3 * columns, columns, 4); // C = inputsᵀ·inputs, so ‖x·C^½‖ = ‖x·inputsᵀ‖
    const moved = multiplyTransposed(x, inputs); // [rows, 3·columns]
    const { sigma } = jacobiSvd(rows > moved.columns ? moved : transpose(moved));
    const rank = 6;
    const got = outputDirections(x, covarianceOf(inputs), { rank, seed: 1 });
    const kept = multiplyTransposed(got.left, transpose(innerProducts(got.left, moved)));
    const error = norm(minus(moved, kept));
    expect(error).toBeLessThanOrEqual(1.01 * tail(sigma, rank));
    if (rows <= 128) {
      expect(error).toBeCloseTo(tail(sigma, rank), 8);
      got.sigma.forEach((value, i) => {
        expect(value).toBeCloseTo(sigma[i]!, 8);
      });
    }
    expect(norm(minus(innerProducts(got.left, got.left), identity(rank)))).toBeLessThan(1e-12);
  });
});

describe('innerProducts', () => {
  it.each([1, 2, 3, 4, 5, 8, 9])('of %i columns are the sums of products', (columns) => {
    const [x, y] = [random(7, 3, 5), random(7, columns, 6)];
    const got = innerProducts(x, y);
    expect([got.rows, got.columns]).toEqual([3, columns]);
    for (let m = 0; m < 3; m++) {
      for (let k = 0; k < columns; k++) {
        let want = 0;
        for (let n = 0; n < 7; n++) want += x.data[m * 7 + n]! * y.data[k * 7 + n]!;
        expect(got.data[k * 3 + m]).toBeCloseTo(want, 12);
      }
    }
  });
});
