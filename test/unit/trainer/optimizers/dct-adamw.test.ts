import { describe, expect, it } from 'vitest';
import { createAdamw } from '../../../../src/trainer/optimizers/adam.ts';
import {
  cosineBasis,
  createDctAdamw,
  type DctAdamwOptions,
  largestDirections,
} from '../../../../src/trainer/optimizers/dct-adamw.ts';
import type { Parameter } from '../../../../src/trainer/optimizers/optimizer.ts';
import { project, sideOf } from '../../../../src/trainer/optimizers/projection.ts';
import { createRng, normals } from '../../../support/random.ts';
import {
  doubles,
  largestDifference,
  singles,
  trainerNumbers,
} from '../../../support/trainer-numbers.ts';

const adam = { beta1: 0.9, beta2: 0.999, epsilon: 1e-8, weightDecay: 0.02 } as const;
const options: DctAdamwOptions = {
  name: 'dct-adamw',
  ...adam,
  rank: 4,
  norm: 'l2',
  errorFeedback: false,
};

function matrix(rows: number, columns: number, seed: number): Parameter {
  const rng = createRng(seed);
  const values = normals(rng, rows * columns, 0.3);
  return { name: 'w', rows, columns, values, gradient: normals(rng, rows * columns) };
}

/** x [rows, n] in the basis, as [n, rows]. */
function coordinatesOf(x: Float32Array, rows: number, n: number): Float64Array {
  const coordinates = new Float64Array(x.length);
  project(x, sideOf(rows, n, 'row'), cosineBasis(n), coordinates);
  return coordinates;
}

describe('the cosine basis', () => {
  it.each([1, 2, 33, 576])('of %d directions is orthonormal', (n) => {
    const basis = cosineBasis(n);
    let largest = 0;
    for (let i = 0; i < n; i++) {
      for (let j = 0; j <= i; j++) {
        let dot = i === j ? -1 : 0;
        for (let k = 0; k < n; k++) dot += basis[i * n + k]! * basis[j * n + k]!;
        largest = Math.max(largest, Math.abs(dot));
      }
    }
    expect(largest).toBeLessThan(1e-13);
  });

  it.each(trainerNumbers.cosines)("of $n gives scipy's orthonormal DCT-II", ({ n, x, dct }) => {
    const rows = singles(x);
    const got = coordinatesOf(rows, rows.length / n, n); // [n, rows]
    const wanted = doubles(dct); // [rows, n]
    const count = rows.length / n;
    const turned = wanted.map((_, at) => got[(at % n) * count + Math.floor(at / n)]!);
    expect(largestDifference(turned, wanted)).toBeLessThan(1e-13);
  });
});

describe('dct-adamw', () => {
  it.each([
    ['l2', 16],
    ['l2', 32],
    ['l2', 64],
  ] as const)('%s: %d of 128 directions leave at most their share of the energy', (norm, rank) => {
    const rng = createRng(rank);
    // Noise, something smooth, and something that only one direction has.
    const basis = cosineBasis(128);
    const draws = [
      normals(rng, 40 * 128),
      Float32Array.from({ length: 40 * 128 }, (_, i) => Math.exp(-((i % 128) / 20))),
      Float32Array.from({ length: 40 * 128 }, (_, i) => basis[5 * 128 + (i % 128)]!),
    ];
    const errors = draws.map((x) => {
      const coordinates = coordinatesOf(x, 40, 128);
      const kept = new Set(largestDirections(coordinates, 40, { rank, norm }));
      const energy = (of: (direction: number) => boolean): number =>
        coordinates.reduce((sum, y, at) => sum + (of(Math.floor(at / 40)) ? y * y : 0), 0);
      return energy((direction) => !kept.has(direction)) / energy(() => true);
    });
    for (const error of errors) expect(error).toBeLessThanOrEqual(1 - rank / 128);
    expect(errors[2]).toBeLessThan(1e-12);
  });

  it('l1 and l2 choose by different sizes', () => {
    const coordinates = Float64Array.of(2, 0, 0, 1.1, 1.1, 0); // two directions of three numbers
    expect(largestDirections(coordinates, 3, { rank: 1, norm: 'l1' })).toEqual([1]);
    expect(largestDirections(coordinates, 3, { rank: 1, norm: 'l2' })).toEqual([0]);
    expect(largestDirections(Float64Array.of(1, 1, 1), 1, { rank: 2, norm: 'l1' })).toEqual([0, 1]);
  });

  it.each([
    [9, 6],
    [6, 9],
    [6, 6],
  ])('with all directions is adamw on the rotated matrix, %d × %d', (rows, columns) => {
    const n = Math.min(rows, columns);
    const basis = cosineBasis(n);
    const side = sideOf(rows, columns, rows >= columns ? 'row' : 'column');
    const rotated = (x: Float32Array): Float32Array => {
      const out = new Float32Array(x.length);
      project(x, side, basis, out);
      return out;
    };
    const parameter = matrix(rows, columns, 4);
    const other = { ...parameter, values: rotated(parameter.values) };
    const optimizer = createDctAdamw({ ...options, rank: n }, [parameter]);
    const reference = createAdamw({ name: 'adamw', ...adam }, [other]);
    const rng = createRng(5);
    for (let t = 0; t < 50; t++) {
      parameter.gradient.set(normals(rng, rows * columns));
      optimizer.step([parameter], 0.01);
      reference.step([{ ...other, gradient: rotated(parameter.gradient) }], 0.01);
    }
    expect(largestDifference(rotated(parameter.values), other.values)).toBeLessThan(1e-6);
  });

  it('remembers r indices and the moments of r directions', () => {
    const bytes = createDctAdamw(options, [matrix(9, 6, 1)]).stateBytes;
    expect(bytes).toBe(4 * 4 + 2 * 4 * 4 * 9);
    const feedback = createDctAdamw({ ...options, errorFeedback: true }, [matrix(9, 6, 1)]);
    expect(feedback.stateBytes).toBe(bytes + 4 * 9 * 6);
  });

  it('moves in the chosen directions only', () => {
    const parameter = matrix(9, 6, 7);
    const before = parameter.values.slice();
    createDctAdamw({ ...options, weightDecay: 0 }, [parameter]).step([parameter], 0.01);
    const moved = coordinatesOf(
      parameter.values.map((value, i) => value - before[i]!),
      9,
      6,
    );
    const chosen = largestDirections(coordinatesOf(parameter.gradient, 9, 6), 9, options);
    expect(chosen).toHaveLength(4);
    for (let d = 0; d < 6; d++) {
      const size = Math.max(...moved.subarray(9 * d, 9 * d + 9).map(Math.abs));
      if (chosen.includes(d)) expect(size).toBeGreaterThan(5e-3);
      else expect(size).toBeLessThan(1e-6);
    }
  });

  it('moments follow their directions when others are chosen', () => {
    // Direction 0 is chosen all along, at place 0 or 1; the other place changes. Its path must be that of adamw.
    const basis = cosineBasis(4);
    const rows = 5;
    const along = (weights: readonly number[]): Float32Array =>
      Float32Array.from({ length: rows * 4 }, (_, i) =>
        weights.reduce((sum, w, d) => sum + w * basis[d * 4 + (i % 4)]!, 0),
      );
    const parameter = { ...matrix(rows, 4, 1), values: new Float32Array(rows * 4) };
    const optimizer = createDctAdamw({ ...options, rank: 2, weightDecay: 0 }, [parameter]);
    const single = { ...parameter, columns: 1, values: new Float32Array(rows) };
    const reference = createAdamw({ name: 'adamw', ...adam, weightDecay: 0 }, [single]);
    for (const weights of [
      [0.1, 3, 1, 0.01],
      [0.1, 3, 0.01, 1],
      [2, 3, 0.01, 1],
      [0.1, 1.5, 1, 0],
    ]) {
      parameter.gradient.set(along(weights));
      optimizer.step([parameter], 0.01);
      reference.step([{ ...single, gradient: new Float32Array(rows).fill(weights[1]!) }], 0.01);
    }
    const got = coordinatesOf(parameter.values, rows, 4).subarray(rows, 2 * rows);
    expect(largestDifference(got, single.values)).toBeLessThan(1e-7);
  });

  it('error feedback brings back what was left out', () => {
    // A gradient whose second direction is never among the chosen: without feedback it never moves.
    const basis = cosineBasis(4);
    const gradient = Float32Array.from({ length: 20 }, (_, i) => {
      return 3 * basis[i % 4]! + basis[4 + (i % 4)]!;
    });
    const moved = [false, true].map((errorFeedback) => {
      const parameter = { ...matrix(5, 4, 1), values: new Float32Array(20), gradient };
      const optimizer = createDctAdamw({ ...options, rank: 1, errorFeedback, weightDecay: 0 }, [
        parameter,
      ]);
      for (let t = 0; t < 10; t++) optimizer.step([parameter], 0.01);
      return Math.abs(coordinatesOf(parameter.values, 5, 4)[5]!);
    });
    expect(moved[0]).toBeLessThan(1e-7);
    expect(moved[1]).toBeGreaterThan(5e-3);
  });
});
