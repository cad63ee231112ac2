import { createHash } from 'node:crypto';
import { describe, expect, it } from 'vitest';
import { bytesOf, forward } from '../../../../src/adapters/families/family.ts';
import {
  type FlyGroup,
  type FlyOptions,
  fly,
  keepTop,
  nonZeros,
  rebalanced,
  sparseA,
  sparseRow,
} from '../../../../src/adapters/families/fly.ts';
import { lora } from '../../../../src/adapters/families/lora.ts';
import { beside, times, transposedTimes } from '../../../../src/adapters/families/matrices.ts';
import { createRandom } from '../../../../src/adapters/families/seeded-random.ts';
import type { Columns } from '../../../../src/adapters/orthogonal.ts';
import fixture from '../../../golden/families/fly.json' with { type: 'json' };
import {
  largestDifference,
  normalColumns,
  pass,
  sumOfProducts,
  testSite,
  trainedTensors,
} from '../../../support/family-site.ts';

// algorithms.md section 28, acceptance 1 to 7.

const options: FlyOptions = { rank: 32, topK: 8, alpha: 64, seed: 28n, score: 'abs_plus_bias' };
const site = testSite({ in: 64, out: 24 });
const family = fly(options);
const shape = { seed: 28n, module: 0, rank: 32, in: 64, topK: 8 };

describe("fly's A", () => {
  it('has exactly p non-zeros in each row, N(0, 1/r²), other places in each', () => {
    const a = sparseA({ ...shape, in: 576 });
    expect(nonZeros({ rank: 32, in: 576, topK: 8 })).toBe(144);
    const places = new Set<string>();
    for (let i = 0; i < 32; i++) {
      const row = a.subarray(i * 576, (i + 1) * 576);
      const there = Array.from(row.keys()).filter((n) => row[n] !== 0);
      expect(there.length).toBe(144);
      places.add(there.join(' '));
    }
    expect(places.size).toBe(32);
    const values = a.filter((value) => value !== 0);
    const square = values.reduce((sum, value) => sum + value * value, 0) / values.length;
    // Five standard errors of a variance of 4,608 values.
    expect(Math.abs(square * 32 ** 2 - 1)).toBeLessThan(5 * Math.sqrt(2 / values.length));
  });

  it('rounds p down, and leaves no row empty', () => {
    expect(nonZeros({ rank: 32, in: 10, topK: 9 })).toBe(2);
    expect(nonZeros({ rank: 32, in: 3, topK: 8 })).toBe(1);
    const row = new Float64Array(3);
    sparseRow(row, 31, { ...shape, in: 3 });
    expect(row.filter((value) => value !== 0).length).toBe(1);
  });

  it('is what Python makes of the same seed, to the last bit (test/oracle/families.py)', () => {
    const a = sparseA({ seed: 0xfedcba9876543210n, module: 38, rank: 32, in: 96, topK: 8 });
    const hash = createHash('sha256').update(new Uint8Array(a.buffer)).digest('hex');
    expect(hash).toBe(fixture.sparse);
  });

  it('is another for another seed or module, and rows do not depend on each other', () => {
    const a = sparseA(shape);
    expect(sparseA(shape)).toEqual(a);
    expect(sparseA({ ...shape, seed: 29n })).not.toEqual(a);
    expect(sparseA({ ...shape, seed: 28n + (1n << 63n) })).not.toEqual(a);
    expect(sparseA({ ...shape, module: 1 })).not.toEqual(a);
    const alone = new Float64Array(64);
    sparseRow(alone, 17, shape);
    expect(alone).toEqual(a.slice(17 * 64, 18 * 64));
  });
});

describe('fly', () => {
  const { b } = trainedTensors(family, site, createRandom(1n));
  const tensors = { b: b!, d: normalColumns(createRandom(2n), 32, 1, 0.02) };
  const x = normalColumns(createRandom(3n), 40, 64);

  it('keeps exactly k ranks of every token, and no more for fly_top_k', () => {
    const pair = family.pair(site, tensors, null);
    const h = transposedTimes(pair.a, x);
    for (const k of [1, 2, 8, 31, 32]) {
      const { g } = family.route!({ h, x, tensors, rank: k });
      for (let t = 0; t < x.columns; t++) {
        const kept = g.data.subarray(t * 32, (t + 1) * 32);
        expect(kept.filter((value) => value !== 0).length).toBe(k);
        const own = h.data.subarray(t * 32, (t + 1) * 32);
        expect(kept.every((value, i) => value === 0 || value === own[i])).toBe(true);
      }
    }
  });

  it('breaks ties toward the first', () => {
    const y = { rows: 4, columns: 1, data: Float64Array.from([0.5, -0.5, 0.5, 0.25]) };
    const { g } = keepTop(y, new Float64Array(4), 'abs_plus_bias', [
      { first: 0, count: 4, topK: 2 },
    ]);
    expect(Array.from(g.data)).toEqual([0.5, -0.5, 0, 0]);
  });

  it('has gradients of B in active ranks only, of x through the mask, and none of d', () => {
    const one = { rows: 64, columns: 1, data: x.data.slice(0, 64) };
    const g = normalColumns(createRandom(4n), 1, 24);
    const { gradient } = pass(family, site, tensors, one);
    const { dx, tensors: gradients } = gradient(g);
    const pair = family.pair(site, tensors, null);
    const kept = family.route!({ h: transposedTimes(pair.a, one), x: one, tensors, rank: null }).g;
    for (let i = 0; i < 32; i++) {
      const column = gradients.b!.data.subarray(i * 24, (i + 1) * 24);
      expect(column.some((value) => value !== 0)).toBe(kept.data[i] !== 0);
      // dB = (α/r)·g·(y ⊙ mask)ᵀ
      const wanted = g.data.map((value) => 2 * value * kept.data[i]!);
      expect(largestDifference(column, wanted)).toBeLessThan(1e-12);
    }
    expect(gradients.d).toBeUndefined();
    // dx = Aᵀ·(mask ⊙ (α/r)·Bᵀ·g)
    const back = transposedTimes(pair.b, g);
    const masked = { ...back, data: back.data.map((value, i) => (kept.data[i] === 0 ? 0 : value)) };
    expect(largestDifference(dx.data, times(pair.a, masked).data)).toBeLessThan(1e-14);
  });

  it('never lets d into a value: the same ranks with another d give the same output', () => {
    const raised = { ...tensors, d: { ...tensors.d, data: tensors.d.data.map((v) => v + 1000) } };
    expect(pass(family, site, raised, x).y.data).toEqual(pass(family, site, tensors, x).y.data);
  });

  it('is LoRA with the same A and B when k = r', () => {
    const plain = lora({ rank: 32, alpha: 64, rslora: false, order: 'svd' });
    const a = { rows: 64, columns: 32, data: sparseA(shape) };
    const wanted = pass(plain, site, { a, b: tensors.b }, x).y;
    const got = forward(family, site, tensors, { x, rank: 32 }).y;
    expect(largestDifference(got.data, wanted.data)).toBeLessThan(1e-12);
  });

  it("computes what the publication's fork computes in signed mode", () => {
    const { rank, topK, alpha, a, b, x: inputs, delta } = fixture.signed;
    const y = transposedTimes(
      { rows: 12, columns: rank, data: Float64Array.from(a) },
      { rows: 12, columns: 6, data: Float64Array.from(inputs) },
    );
    const groups = [{ first: 0, count: rank, topK }];
    const { g } = keepTop(y, new Float64Array(rank), 'signed', groups);
    const scaled = { ...g, data: g.data.map((value) => (value * alpha) / rank) };
    const got = times({ rows: 10, columns: rank, data: Float64Array.from(b) }, scaled);
    expect(largestDifference(got.data, delta)).toBeLessThan(1e-5);
  });

  it('serves |y| + d only, with α/r in B', () => {
    const served = family.serve(site, tensors);
    expect(served.a).toBeNull();
    expect(served.b).toEqual(tensors.b.data.map((value) => value * 2));
    expect(served.bias).toEqual(Float32Array.from(tensors.d.data));
    for (const score of ['signed', 'abs_sum'] as const) {
      expect(() => fly({ ...options, score }).serve(site, tensors)).toThrow(`not by ${score}`);
    }
  });

  it('stores at most 0.6 of what a LoRA of its rank takes', () => {
    const square = testSite({ in: 64, out: 64 });
    const plain = lora({ rank: 32, alpha: 64, rslora: false, order: 'as-trained' });
    const [own, theirs] = [family, plain].map((kind) =>
      bytesOf(kind.serve(square, kind.init(square, createRandom(1n)))),
    );
    expect(own! / theirs!).toBeLessThan(0.6);
  });

  it('does not change by being used: a thousand passes leave every byte', () => {
    const before = new Uint8Array(tensors.d.data.slice().buffer);
    const token = { rows: 64, columns: 1, data: x.data.slice(0, 64) };
    const first = pass(family, site, tensors, token).y.data;
    for (let n = 0; n < 1000; n++) pass(family, site, tensors, token);
    expect(new Uint8Array(tensors.d.data.buffer)).toEqual(before);
    expect(pass(family, site, tensors, token).y.data).toEqual(first);
  });
});

describe("fly's blends", () => {
  const second = fly({ ...options, seed: 29n, topK: 5 });
  const one = trainedTensors(family, site, createRandom(5n));
  const two = trainedTensors(second, site, createRandom(6n));
  const x = normalColumns(createRandom(7n), 20, 64);

  it('are the sum of the deltas: A and B one after another, each with its own top-k', () => {
    const [p, q] = [family.pair(site, one, null), second.pair(site, two, null)];
    const weighted = (b: Columns, w: number): Columns => ({ ...b, data: b.data.map((v) => v * w) });
    const groups: FlyGroup[] = [
      { first: 0, count: 32, topK: 8 },
      { first: 32, count: 32, topK: 5 },
    ];
    const h = transposedTimes(beside(p.a, q.a), x);
    const d = beside(one.d!, two.d!).data;
    const { g } = keepTop(h, d, 'abs_plus_bias', groups);
    const got = times(beside(weighted(p.b, 0.7), weighted(q.b, -0.4)), g);
    const [first, other] = [pass(family, site, one, x).y, pass(second, site, two, x).y];
    const wanted = first.data.map((value, i) => 0.7 * value - 0.4 * other.data[i]!);
    expect(largestDifference(got.data, wanted)).toBeLessThan(1e-5);
    // One group for both is not a blend.
    const merged = keepTop(h, d, 'abs_plus_bias', [{ first: 0, count: 64, topK: 13 }]).g;
    expect(
      largestDifference(
        times(beside(weighted(p.b, 0.7), weighted(q.b, -0.4)), merged).data,
        wanted,
      ),
    ).toBeGreaterThan(0.01);
  });

  it('do not disturb each other: |cos| of two independent adapters at most 0.02', () => {
    const wide = testSite({ in: 576, out: 576 });
    const pairs = [1n, 2n, 3n].map((seed) => {
      const kind = fly({ ...options, seed });
      return kind.pair(wide, trainedTensors(kind, wide, createRandom(seed + 40n)), null);
    });
    // ⟨B₁A₁, B₂A₂⟩ = ⟨B₁ᵀB₂, A₁A₂ᵀ⟩.
    const inner = (p: (typeof pairs)[0], q: (typeof pairs)[0]): number =>
      sumOfProducts(transposedTimes(p.b, q.b), transposedTimes(p.a, q.a));
    for (const [i, j] of [
      [0, 1],
      [0, 2],
      [1, 2],
    ] as const) {
      const [p, q] = [pairs[i]!, pairs[j]!];
      const cosine = inner(p, q) / Math.sqrt(inner(p, p) * inner(q, q));
      expect(Math.abs(cosine)).toBeLessThan(0.02);
      expect(Math.abs(cosine)).toBeGreaterThan(0);
    }
  });
});

describe("fly's balance", () => {
  const a = { rows: 64, columns: 32, data: sparseA(shape) };

  /** How often each rank is chosen for tokens [64, T]. */
  function loads(x: Columns, d: Float64Array, score: FlyOptions['score']): Float64Array {
    const counts = new Float64Array(32);
    const groups = [{ first: 0, count: 32, topK: 8 }];
    keepTop(transposedTimes(a, x), d, score, groups).g.data.forEach((value, i) => {
      if (value !== 0) counts[i % 32]! += 1;
    });
    return counts;
  }

  /** Coefficient of variation of the loads over 6,400 other tokens. */
  function variation(d: Float64Array, score: FlyOptions['score']): number {
    const load = loads(normalColumns(createRandom(77n), 6400, 64), d, score);
    const mean = load.reduce((sum, value) => sum + value, 0) / load.length;
    const square = load.reduce((sum, value) => sum + (value - mean) ** 2, 0) / load.length;
    return Math.sqrt(square) / mean;
  }

  function balanced(score: FlyOptions['score'], target: number | null): Float64Array {
    const random = createRandom(9n);
    let d: Float64Array = new Float64Array(32);
    for (let n = 0; n < 2000; n++) {
      d = rebalanced(d, loads(normalColumns(random, 16, 64), d, score), 1e-3, target);
    }
    return d;
  }

  // Measured here: .257 → .062, |d| ≤ .124.
  it('evens the loads with |y| + d and the mean count, and d stays small', () => {
    expect(variation(new Float64Array(32), 'abs_plus_bias')).toBeGreaterThan(0.2);
    const d = balanced('abs_plus_bias', null);
    expect(variation(d, 'abs_plus_bias')).toBeLessThanOrEqual(0.1);
    expect(Math.max(...d.map(Math.abs))).toBeLessThan(0.2);
  });

  // Measured here: .257 → .740, and |d| = u·T, which never ends.
  it('diverges as the stand-alone publication has it: |y + d|, and k/r beside raw counts', () => {
    const d = balanced('abs_sum', 8 / 32);
    expect(variation(d, 'abs_sum')).toBeGreaterThan(2 * variation(new Float64Array(32), 'abs_sum'));
    expect(Math.max(...d.map(Math.abs))).toBeGreaterThan(0.99 * 1e-3 * 2000);
  });

  it('moves d by the sign of the distance to the mean', () => {
    const moved = rebalanced(Float64Array.from([0, 1, 2]), [4, 2, 0], 0.5);
    expect(Array.from(moved)).toEqual([-0.5, 1, 2.5]);
  });
});
