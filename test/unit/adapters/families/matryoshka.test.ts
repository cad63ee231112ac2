import { describe, expect, it } from 'vitest';
import { aurac } from '../../../../src/adapters/aurac.ts';
import { forward, type Tensors } from '../../../../src/adapters/families/family.ts';
import { lora } from '../../../../src/adapters/families/lora.ts';
import { corner, times } from '../../../../src/adapters/families/matrices.ts';
import {
  type MatryoshkaOptions,
  matryoshka,
  publishedP,
  scaleOf,
} from '../../../../src/adapters/families/matryoshka.ts';
import { createRandom } from '../../../../src/adapters/families/seeded-random.ts';
import type { Columns } from '../../../../src/adapters/orthogonal.ts';
import {
  createAdam,
  largestDifference,
  normalColumns,
  pass,
  relativeError,
  testSite,
  trainedTensors,
} from '../../../support/family-site.ts';

// algorithms.md section 1, acceptance 1 to 5.

const site = testSite({ in: 16, out: 14 });
const x = normalColumns(createRandom(2n), 9, 16);
const published: MatryoshkaOptions = {
  maxRank: 8,
  ranks: [1, 2, 4, 8],
  scaling: 'none',
  mask: 'diag',
  order: 'svd',
};
const scalings = ['none', 'rank', 'sqrt'] as const;

function unit(size: number): Columns {
  const data = new Float64Array(size * size);
  for (let i = 0; i < size; i++) data[i * size + i] = 1;
  return { rows: size, columns: size, data };
}

describe('matryoshka', () => {
  it.each([
    ['none', [4, 3, 2, 2, 1, 1, 1, 1]],
    ['rank', [1.875, 0.875, 0.375, 0.375, 0.125, 0.125, 0.125, 0.125]],
    ['sqrt', [2.56066, 1.56066, 0.853553, 0.853553, 0.353553, 0.353553, 0.353553, 0.353553]],
  ] as const)('has the published P for scaling %s', (scaling, wanted) => {
    expect(largestDifference(publishedP(8, [1, 2, 4, 8], scaling), wanted)).toBeLessThan(1e-6);
  });

  it('leaves ranks above the largest trained one at 0', () => {
    expect(Array.from(publishedP(6, [2, 3], 'rank'))).toEqual([
      1 / 2 + 1 / 3,
      1 / 2 + 1 / 3,
      1 / 3,
      0,
      0,
      0,
    ]);
  });

  it.each(scalings)(
    'trains diag as the sum of its prefixes, binary as their mean (%s)',
    (scaling) => {
      const diag = matryoshka({ ...published, scaling });
      const binary = matryoshka({ ...published, scaling, mask: 'binary' });
      const tensors = trainedTensors(diag, site, createRandom(3n));
      const got = pass(diag, site, tensors, x).y;
      const sum = new Float64Array(got.data.length);
      for (const rank of published.ranks) {
        const prefix = forward(diag, site, tensors, { x, rank }).y;
        prefix.data.forEach((value, i) => {
          sum[i]! += value;
        });
      }
      expect(largestDifference(got.data, sum)).toBeLessThan(1e-6);
      const mean = pass(binary, site, tensors, x).y.data.map((value) => value * 4);
      expect(largestDifference(mean, got.data)).toBeLessThan(1e-12);
    },
  );

  it('is LoRA when only the full rank is trained', () => {
    const one = matryoshka({ ...published, ranks: [8] });
    const plain = lora({ rank: 8, alpha: 8, rslora: false, order: 'svd' });
    const tensors = trainedTensors(one, site, createRandom(4n));
    expect(pass(one, site, tensors, x).y.data).toEqual(pass(plain, site, tensors, x).y.data);
  });

  it('keeps the P of each adapter apart', () => {
    const first = matryoshka(published);
    const second = matryoshka({ ...published, ranks: [3, 8] });
    const tensors = trainedTensors(first, site, createRandom(5n));
    expect(Array.from(first.pair(site, tensors, null).gates)).toEqual([4, 3, 2, 2, 1, 1, 1, 1]);
    expect(Array.from(second.pair(site, tensors, null).gates)).toEqual([2, 2, 2, 1, 1, 1, 1, 1]);
    expect(Array.from(first.pair(site, tensors, null).gates)).toEqual([4, 3, 2, 2, 1, 1, 1, 1]);
  });

  it('starts A as the publication does: fan-in R, not in', () => {
    const { a } = matryoshka(published).init(testSite({ in: 576, out: 4 }), createRandom(6n));
    const largest = Math.max(...a!.data.map(Math.abs));
    expect(largest).toBeLessThan(1 / Math.sqrt(8));
    expect(largest).toBeGreaterThan(0.99 / Math.sqrt(8));
  });

  it('publishes by SVD: P folded in, each prefix as good as its size can be', () => {
    const family = matryoshka({ ...published, scaling: 'sqrt' });
    const tensors = trainedTensors(family, site, createRandom(7n));
    const served = family.serve(site, tensors);
    const whole = pass(family, site, tensors, unit(16)).y; // ΔW
    const [a, b] = [
      { rows: 16, columns: 8, data: served.a! },
      { rows: 14, columns: 8, data: served.b! },
    ];
    const prefix = (k: number): Columns =>
      times(corner(b, k), { ...unit(16), rows: k, data: transposed(corner(a, k)) });
    expect(relativeError(prefix(8), whole)).toBeLessThan(1e-24);
    // Eckart-Young: what rank k leaves is the tail of the squared singular values, here ‖a_i‖²·‖b_i‖².
    const energies = Array.from({ length: 8 }, (_, i) => energy(a, i) * energy(b, i));
    const total = energies.reduce((sum, value) => sum + value, 0);
    for (let k = 1; k < 8; k++) {
      const tail = energies.slice(k).reduce((sum, value) => sum + value, 0) / total;
      expect(Math.abs(relativeError(prefix(k), whole) - tail)).toBeLessThan(1e-12);
      expect(energies[k]!).toBeLessThanOrEqual(energies[k - 1]!);
    }
  });

  it('publishes as the repository serves: A and B as they are, P nowhere', () => {
    const family = matryoshka({ ...published, order: 'as-published' });
    const tensors = trainedTensors(family, site, createRandom(8n));
    const served = family.serve(site, tensors);
    expect(served.a).toEqual(tensors.a!.data);
    expect(served.b).toEqual(tensors.b!.data);
    // That is another function than was trained: by far.
    const trained = pass(family, site, tensors, x).y;
    const asServed = forward(family, site, tensors, { x, rank: 8 }).y;
    expect(relativeError(asServed, trained)).toBeGreaterThan(0.1);
  });

  it('refuses orders that would serve another function than was asked for', () => {
    const tensors = trainedTensors(matryoshka(published), site, createRandom(8n));
    const scaled = matryoshka({ ...published, scaling: 'sqrt', order: 'as-published' });
    expect(() => scaled.serve(site, tensors)).toThrow('a scale (sqrt) of its own');
    expect(() => matryoshka({ ...published, order: 'as-trained' })).toThrow('sum of prefixes');
    expect(() => matryoshka({ ...published, ranks: [2, 2] })).toThrow(
      'ranks must rise from 1 to 8',
    );
    expect(() => matryoshka({ ...published, ranks: [9] })).toThrow('ranks must rise from 1 to 8');
    expect(() => matryoshka({ ...published, ranks: [] })).toThrow('ranks must rise from 1 to 8');
  });

  it.each([
    ['none', 4, false],
    ['rank', 1, false],
    ['sqrt', 1, true],
  ] as const)(
    'exports a prefix of 4 with scaling %s as alpha %d, rsLoRA %s',
    (scaling, alpha, rslora) => {
      const family = matryoshka({ ...published, scaling });
      const tensors = trainedTensors(family, site, createRandom(9n));
      const pair = family.toPeft(site, tensors, 4);
      expect(pair).toMatchObject({ rank: 4, alpha, rslora });
      expect(alpha / (rslora ? Math.sqrt(4) : 4)).toBe(scaleOf(scaling, 4));
    },
  );

  it('has the AURAC of the publication', () => {
    const { v1, v2 } = aurac([1, 2, 4, 8], [10, 20, 30, 40]);
    expect(v1).toBeCloseTo(29.285714, 6);
    expect(v2).toBeCloseTo(25, 12);
    expect(aurac([4], [0.75])).toEqual({ v1: 0.75, v2: 0.75 });
  });

  it('reaches the SVD optimum at every rank with objective multi, by its own gradients', () => {
    const spectrum = Array.from({ length: 8 }, (_, i) => 4 * 0.6 ** i);
    const target = plantedMap(spectrum);
    const linear = testSite({ in: 32, out: 24 });
    const family = matryoshka({ ...published, mask: 'prefix' });
    const tensors = family.init(linear, createRandom(10n));
    trainMulti({ family, linear, tensors, target });
    const total = spectrum.reduce((sum, s) => sum + s * s, 0);
    for (const rank of published.ranks) {
      const got = forward(family, linear, tensors, { x: unit(32), rank }).y;
      const error = Math.sqrt(relativeError(got, target));
      const best = Math.sqrt(spectrum.slice(rank).reduce((sum, s) => sum + s * s, 0) / total);
      if (rank < 8) expect(error / best).toBeLessThan(1.05);
      else expect(error).toBeLessThan(0.05);
    }
  });
});

interface Multi {
  readonly family: ReturnType<typeof matryoshka>;
  readonly linear: ReturnType<typeof testSite>;
  readonly tensors: Tensors;
  readonly target: Columns;
}

/** Mean over the ranks of ‖prefix − target‖²: the loss of Gaussian inputs without their noise. */
function trainMulti({ family, linear, tensors, target }: Multi): void {
  const inputs = unit(32);
  const adam = createAdam(tensors, ['a', 'b'], 0.02);
  for (let step = 0; step < 1500; step++) {
    const sum: Record<string, Float64Array> = {};
    for (const rank of published.ranks) {
      const { y, gradient } = forward(family, linear, tensors, { x: inputs, rank });
      const d = { ...y, data: y.data.map((value, i) => (value - target.data[i]!) / 4) };
      for (const [name, g] of Object.entries(gradient(d).tensors)) {
        sum[name] ??= new Float64Array(tensors[name]!.data.length);
        const all = sum[name];
        g.data.forEach((value, i) => {
          all[i]! += value; // A prefix's columns are the first.
        });
      }
    }
    const gradients = Object.fromEntries(
      Object.entries(sum).map(([name, data]) => [name, { ...tensors[name]!, data }]),
    );
    adam(gradients, 1 - step / 1500);
  }
}

/** [24, 32] with these singular values. */
function plantedMap(spectrum: readonly number[]): Columns {
  const random = createRandom(11n);
  const [u, v] = [
    orthonormal(normalColumns(random, 8, 24)),
    orthonormal(normalColumns(random, 8, 32)),
  ];
  const scaled = { ...u, data: u.data.map((value, i) => value * spectrum[Math.floor(i / 24)]!) };
  return times(scaled, { rows: 8, columns: 32, data: transposed(v) });
}

/** Gram-Schmidt. */
function orthonormal(m: Columns): Columns {
  const data = Float64Array.from(m.data);
  for (let j = 0; j < m.columns; j++) {
    const column = data.subarray(j * m.rows, (j + 1) * m.rows);
    for (let i = 0; i < j; i++) {
      const other = data.subarray(i * m.rows, (i + 1) * m.rows);
      const dot = column.reduce((sum, value, n) => sum + value * other[n]!, 0);
      for (let n = 0; n < m.rows; n++) column[n]! -= dot * other[n]!;
    }
    const length = Math.hypot(...column);
    for (let n = 0; n < m.rows; n++) column[n]! /= length;
  }
  return { ...m, data };
}

function transposed({ rows, columns, data }: Columns): Float64Array {
  return Float64Array.from(
    { length: rows * columns },
    (_, i) => data[(i % columns) * rows + Math.floor(i / columns)]!,
  );
}

function energy({ rows, data }: Columns, i: number): number {
  return data.subarray(i * rows, (i + 1) * rows).reduce((sum, value) => sum + value * value, 0);
}
