import { describe, expect, it } from 'vitest';
import { type Family, forward, type Tensors } from '../../../../src/adapters/families/family.ts';
import { lora } from '../../../../src/adapters/families/lora.ts';
import {
  beside,
  columnsOf,
  picked,
  times,
  transposedTimes,
} from '../../../../src/adapters/families/matrices.ts';
import {
  grownMora,
  mora,
  moraWeights,
  prunedMora,
} from '../../../../src/adapters/families/mora.ts';
import { createRandom, type Random } from '../../../../src/adapters/families/seeded-random.ts';
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

// algorithms.md section 18.

const options = { rank: 16, topK: 4, temperature: 0.1, frozen: 0 };
const site = testSite({ in: 24, out: 20 });
const family = mora(options);

describe('mora', () => {
  const tensors = trainedTensors(family, site, createRandom(1n));
  const x = normalColumns(createRandom(2n), 50, 24);
  const weightsOf = (k: number): Columns => {
    const h = transposedTimes(tensors.a!, x);
    return moraWeights({ h, x, a: tensors.a! }, { topK: k, temperature: 0.1 }).weights;
  };

  it('keeps exactly k ranks of every token, with weights that sum to 1', () => {
    for (const k of [1, 4, 16]) {
      const { data } = weightsOf(k);
      for (let t = 0; t < 50; t++) {
        const own = data.subarray(16 * t, 16 * t + 16);
        expect(own.filter((weight) => weight > 0).length).toBe(k);
        expect(Math.abs(own.reduce((sum, weight) => sum + weight, 0) - 1)).toBeLessThan(1e-12);
      }
    }
  });

  it('keeps the ranks whose directions are closest to the token, whatever their lengths', () => {
    const longer = {
      ...tensors.a!,
      data: tensors.a!.data.map((v, i) => v * (1 + Math.floor(i / 24))),
    };
    const h = transposedTimes(longer, x);
    const { weights } = moraWeights({ h, x, a: longer }, { topK: 4, temperature: 0.1 });
    expect(largestDifference(weights.data, weightsOf(4).data)).toBeLessThan(1e-12);
  });

  it('is finite at a token of zeros: it adds nothing', () => {
    const none = { rows: 24, columns: 1, data: new Float64Array(24) };
    const { y, gradient } = pass(family, site, tensors, none);
    expect(y.data.every((value) => value === 0)).toBe(true);
    const { dx, tensors: back } = gradient(normalColumns(createRandom(3n), 1, 20));
    for (const { data } of [dx, back.a!, back.b!]) expect(data.every(Number.isFinite)).toBe(true);
  });

  it('is LoRA with scale 1/r in the dense limit: k = r and even weights', () => {
    const dense = mora({ ...options, topK: 16, temperature: 1e12 });
    const plain = lora({ rank: 16, alpha: 1, rslora: false, order: 'svd' });
    const [got, wanted] = [pass(dense, site, tensors, x).y, pass(plain, site, tensors, x).y];
    expect(largestDifference(got.data, wanted.data)).toBeLessThan(1e-9);
  });
});

describe('mora over two tasks', () => {
  // Inputs of the first task are in the first half of the coordinates, of the second in the other.
  const draw = (random: Random, count: number, task: 0 | 1): Columns => {
    const x = normalColumns(random, count, 24);
    return {
      ...x,
      data: x.data.map((value, i) => (Math.floor((i % 24) / 12) === task ? value : 0)),
    };
  };
  const maps = [11n, 12n].map((seed) => {
    // Low rank, so that a few ranks a token suffice.
    const random = createRandom(seed);
    return { u: normalColumns(random, 3, 20), v: normalColumns(random, 3, 24, 0.3) };
  });
  const target = (x: Columns, task: 0 | 1): Columns =>
    times(maps[task]!.u, transposedTimes(maps[task]!.v, x));

  function train(kind: Family, tensors: Tensors, task: 0 | 1): void {
    const random = createRandom(BigInt(13 + task));
    const adam = createAdam(tensors, ['a', 'b'], 0.03);
    for (let step = 0; step < 700; step++) {
      const x = draw(random, 32, task);
      const wanted = target(x, task);
      const { y, gradient } = pass(kind, site, tensors, x);
      const d = { ...y, data: y.data.map((value, i) => (value - wanted.data[i]!) / 32) };
      adam(gradient(d).tensors, 1 - step / 700);
    }
  }
  const errorOf = (kind: Family, tensors: Tensors, task: 0 | 1): number => {
    const x = draw(createRandom(15n), 500, task);
    return relativeError(pass(kind, site, tensors, x).y, target(x, task));
  };

  it('learns the second without forgetting the first, whose ranks keep every byte', () => {
    const first = mora({ ...options, rank: 8 });
    // Ranks start from inputs of their task: a random direction would also score on the other's.
    const none = mora({ ...options, rank: 0 }).init(site, createRandom(16n));
    const old = grownMora(none, draw(createRandom(15n), 100, 0), 8, createRandom(16n));
    train(first, old, 0);
    const before = errorOf(first, old, 0);
    const bytes = { a: old.a!.data.slice(), b: old.b!.data.slice() };
    const second = mora({ ...options, frozen: 8 });
    const grown = grownMora(old, draw(createRandom(17n), 100, 1), 8, createRandom(18n));
    expect(
      largestDifference(
        pass(second, site, grown, draw(createRandom(15n), 500, 0)).y.data,
        pass(first, site, old, draw(createRandom(15n), 500, 0)).y.data,
      ),
    ).toBe(0);
    train(second, grown, 1);
    expect(grown.a!.data.slice(0, bytes.a.length)).toEqual(bytes.a);
    expect(grown.b!.data.slice(0, bytes.b.length)).toEqual(bytes.b);
    expect(errorOf(second, grown, 0)).toBeLessThanOrEqual(before * 1.01 + 1e-12);
    expect(before).toBeLessThan(0.05); // .0144 here
    expect(errorOf(second, grown, 1)).toBeLessThan(0.05); // .0116
    // A LoRA of as many ranks, trained on one task after the other, forgets: 2e-7 → 0.92 here.
    const plain = lora({ rank: 16, alpha: 16, rslora: false, order: 'svd' });
    const all = plain.init(site, createRandom(19n));
    train(plain, all, 0);
    const learnt = errorOf(plain, all, 0);
    train(plain, all, 1);
    expect(errorOf(plain, all, 0)).toBeGreaterThan(10 * learnt);
  });
});

describe('mora pruned', () => {
  it('loses planted duplicates, at least 8 of 10, and nothing else', () => {
    const random = createRandom(20n);
    const tensors = trainedTensors(mora({ ...options, rank: 12 }), site, random);
    // Ten copies of the first ranks, with noise far below their size, longer or shorter, turned round or not.
    const copies = Array.from({ length: 10 }, (_, i) => i % 5);
    const factor = (n: number): number => (n % 2 === 0 ? 1.5 : -0.5);
    const noisy = (m: Columns, invert: boolean): Columns => ({
      ...m,
      data: m.data.map((value, i) => {
        const by = factor(Math.floor(i / m.rows));
        return value * (invert ? 1 / by : by) + 1e-4 * random.normal();
      }),
    });
    const planted = {
      a: beside(tensors.a!, noisy(picked(tensors.a!, copies), false)),
      b: beside(tensors.b!, noisy(picked(tensors.b!, copies), true)),
    };
    const x = normalColumns(random, 2000, 24);
    const h = transposedTimes(planted.a, x);
    const { weights } = moraWeights({ h, x, a: planted.a }, { topK: 22, temperature: 1e6 });
    const pruned = prunedMora(planted, weights, { frozen: 0, shareMin: 0.01 });
    const gone = 22 - pruned.a!.columns;
    expect(gone).toBeGreaterThanOrEqual(8);
    expect(gone).toBeLessThanOrEqual(10);
    expect(largestDifference(columnsOf(pruned.a!, 0, 12).data, tensors.a!.data)).toBe(0);
    expect(largestDifference(columnsOf(pruned.b!, 0, 12).data, tensors.b!.data)).toBeLessThan(1e-3);
  });

  it('loses ranks that never fire, but no frozen one', () => {
    const tensors = trainedTensors(mora({ ...options, rank: 4 }), site, createRandom(21n));
    const weights = {
      rows: 4,
      columns: 2,
      data: Float64Array.from([0, 0.995, 0.005, 0, 0, 0.99, 0.01, 0]),
    };
    const kept = (frozen: number): number =>
      prunedMora(tensors, weights, { frozen, shareMin: 0.01 }).a!.columns;
    expect(kept(0)).toBe(1);
    expect(kept(1)).toBe(2);
    expect(kept(4)).toBe(4);
  });
});

it('serves mora at fewer active ranks than it was trained with', () => {
  const tensors = trainedTensors(family, site, createRandom(22n));
  const x = normalColumns(createRandom(23n), 3, 24);
  const narrow = mora({ ...options, topK: 2 });
  expect(forward(family, site, tensors, { x, rank: 2 }).y.data).toEqual(
    pass(narrow, site, tensors, x).y.data,
  );
});
