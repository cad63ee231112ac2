import { describe, expect, it } from 'vitest';
import { times, transposedTimes } from '../../../src/adapters/families/matrices.ts';
import { type Columns, innerProducts } from '../../../src/adapters/orthogonal.ts';
import { orthonormal } from '../../../src/adapters/randomized-svd.ts';
import {
  type CosoOptions,
  createCoso,
  emptyBasis,
  extendBasis,
  freedRanks,
  outside,
} from '../../../src/trainer/coso.ts';
import { readBases, writeBases } from '../../../src/trainer/coso-file.ts';
import { createAdamw } from '../../../src/trainer/optimizers/adam.ts';
import type { Optimizer } from '../../../src/trainer/optimizers/optimizer.ts';
import { backward, type Pair, parameterOf, productOf } from '../../support/product-problem.ts';
import { createRng, normals } from '../../support/random.ts';
import { largestDifference } from '../../support/trainer-numbers.ts';

const adam = { beta1: 0.9, beta2: 0.999, epsilon: 1e-8 } as const;
const [width, height, ranks] = [24, 4, 6];
const whole = { energy: 1 - 1e-10, keptMax: width };
const options: CosoOptions = { ...adam, ...whole, directions: 6, gap: 5, sketch: 12 };

function random(rows: number, columns: number, seed: number): Columns {
  const rng = createRng(seed);
  return { rows, columns, data: Float64Array.from({ length: rows * columns }, () => rng.normal()) };
}
function pairOf(seed: number, bScale: number): Pair {
  const rng = createRng(seed);
  return {
    a: parameterOf('m.a', ranks, normals(rng, ranks * width, 0.2)),
    b: parameterOf('m.b', ranks, normals(rng, ranks * height, bScale)),
  };
}
function largest({ data }: Columns): number {
  return data.reduce((most, x) => Math.max(most, Math.abs(x)), 0);
}

interface Task {
  readonly inputs: Columns; // [in, samples]
  readonly answers: Columns; // [out, samples]
}

/** Inputs inside the span of the given directions. */
function taskIn(directions: Columns, seed: number): Task {
  const mix = random(directions.columns, 40, seed);
  const inputs = times(directions, mix);
  return { inputs, answers: transposedTimes(random(width, height, seed + 1), inputs) };
}

/** The mean of ‖Bᵀ·A·x − y‖²/2, and both gradients. */
function lossOf(pair: Pair, { inputs, answers }: Task): number {
  const product = productOf(pair); // [out, in]
  const full = new Float64Array(product.length);
  let loss = 0;
  for (let s = 0; s < inputs.columns; s++) {
    for (let o = 0; o < height; o++) {
      let y = -answers.data[s * height + o]!;
      for (let i = 0; i < width; i++) y += product[o * width + i]! * inputs.data[s * width + i]!;
      loss += (y * y) / 2 / inputs.columns;
      for (let i = 0; i < width; i++) {
        full[o * width + i]! += (y * inputs.data[s * width + i]!) / inputs.columns;
      }
    }
  }
  backward(pair, full);
  return loss;
}

function train(pair: Pair, task: Task, optimizer: Optimizer, steps: number): void {
  for (let t = 0; t < steps; t++) {
    lossOf(pair, task);
    optimizer.step([pair.a, pair.b], 0.01);
  }
}

const space = orthonormal(random(width, 10, 1)); // two subspaces of five directions each
const part = (from: number): Columns => {
  return { rows: width, columns: 5, data: space.data.slice(from * width, (from + 5) * width) };
};
const [old, fresh] = [taskIn(part(0), 2), taskIn(part(5), 4)];

describe('coso', () => {
  /** The old task learnt, and the basis of its inputs as A's gradients show them. */
  function learnOld(): { pair: Pair; basis: Columns } {
    const pair = pairOf(7, 0.3);
    const optimizer = createCoso(options, [pair.a, pair.b], new Map());
    const first = lossOf(pair, old);
    train(pair, old, optimizer, 400);
    expect(lossOf(pair, old)).toBeLessThan(0.01 * first);
    return { pair, basis: optimizer.consolidated().get('m.a')! };
  }

  it('learns a new task in other directions, and leaves the old one as it was', () => {
    const { pair, basis } = learnOld();
    expect(basis.columns).toBe(5);
    expect(largest(outside(basis, part(0)))).toBeLessThan(1e-4);
    const before = lossOf(pair, old);
    const start = lossOf(pair, fresh);
    const product = productOf(pair);
    train(pair, fresh, createCoso(options, [pair.a, pair.b], new Map([['m.a', basis]])), 400);
    expect(lossOf(pair, fresh)).toBeLessThan(0.05 * start);
    expect(Math.abs(lossOf(pair, old) - before)).toBeLessThanOrEqual(1e-6);
    const moved = productOf(pair).map((x, i) => x - product[i]!);
    const change = { rows: width, columns: height, data: moved }; // dWᵀ, [in, out]
    expect(largest(innerProducts(basis, change))).toBeLessThan(1e-5 * largest(change));
  });

  it('without protection the old task is forgotten', () => {
    const { pair } = learnOld();
    const before = lossOf(pair, old);
    const plain = { name: 'adamw', ...adam, weightDecay: 0 } as const;
    train(pair, fresh, createAdamw(plain, [pair.a, pair.b]), 400);
    expect(lossOf(pair, old) - before).toBeGreaterThan(1e-3);
  });

  it('a step does nothing to what the basis spans, to 1e-10', () => {
    const pair = pairOf(9, 0.5);
    pair.a.values.fill(0); // A is its own change, and no old number is rounded with it.
    const basis = part(0);
    const optimizer = createCoso(options, [pair.a, pair.b], new Map([['m.a', basis]]));
    const both = { inputs: random(width, 40, 30), answers: random(height, 40, 31) };
    lossOf(pair, both);
    optimizer.step([pair.a, pair.b], 1e-4);
    const change = { rows: width, columns: height, data: productOf(pair) };
    expect(largest(change)).toBeGreaterThan(1e-5);
    expect(largest(innerProducts(basis, change))).toBeLessThan(1e-10);
  });

  it('B moves in ranks that answer nothing old, and in no other', () => {
    const pair = pairOf(11, 0.3);
    const basis = part(0);
    // Ranks 3, 4 and 5 see nothing of the basis.
    const all = { rows: width, columns: ranks, data: Float64Array.from(pair.a.values) };
    pair.a.values.set(outside(basis, all).data.subarray(3 * width), 3 * width);
    const before = pair.b.values.slice();
    const optimizer = createCoso(options, [pair.a, pair.b], new Map([['m.a', basis]]));
    train(pair, { inputs: random(width, 40, 12), answers: random(height, 40, 13) }, optimizer, 30);
    const moved = pair.b.values.map((x, i) => x - before[i]!);
    expect(Math.max(...moved.subarray(0, 3 * height).map(Math.abs))).toBeLessThan(1e-6);
    expect(Math.max(...moved.subarray(3 * height).map(Math.abs))).toBeGreaterThan(0.05);
  });

  it('no gradient moves nothing, and neither does one that lies where old inputs do', () => {
    const basis = part(0);
    const pair = pairOf(17, 0);
    const before = { a: pair.a.values.slice(), b: pair.b.values.slice() };
    const optimizer = createCoso(options, [pair.a, pair.b], new Map([['m.a', basis]]));
    optimizer.step([pair.a, pair.b], 0.01); // As in a first step, where B is zero.
    expect(pair.a.values).toEqual(before.a);
    // A's rows in M; B's, as the ranks that answer to M: five directions of six, none of them an axis.
    const all = { rows: width, columns: ranks, data: Float64Array.from(pair.a.values) };
    const answers = innerProducts(all, basis); // [R, 5]
    const [mixA, mixB] = [random(5, ranks, 18), random(5, height, 19)];
    pair.a.gradient.set(times(basis, mixA).data); // [in, R]
    const columns = times(answers, mixB).data; // [R, out]
    pair.b.gradient.forEach((_, i) => {
      pair.b.gradient[i] = 1e-3 * columns[(i % height) * ranks + Math.floor(i / height)]!;
    });
    for (let t = 0; t < 3; t++) optimizer.step([pair.a, pair.b], 0.01);
    expect(largestDifference(pair.a.values, before.a)).toBeLessThan(1e-6);
    expect(largestDifference(pair.b.values, before.b)).toBeLessThan(1e-3);
  });

  it('moments follow their directions when others lead', () => {
    // Two directions take turns as the first. Along each, A goes where adamw by itself would.
    const along = orthonormal(random(width, 2, 40));
    const sides = orthonormal(random(ranks, 2, 41));
    const pair = pairOf(42, 0.3);
    pair.a.values.fill(0);
    const optimizer = createCoso(
      { ...options, directions: 2, gap: 1 },
      [pair.a, pair.b],
      new Map(),
    );
    const alone = [0, 1].map(() => parameterOf('x', ranks, new Float32Array(ranks)));
    const plain = { name: 'adamw', ...adam, weightDecay: 0 } as const;
    const references = alone.map((parameter) => createAdamw(plain, [parameter]));
    for (const sizes of [
      [3, 1],
      [1, 3],
      [2, 0.5],
      [-1, 2],
      [3, 1],
    ]) {
      pair.a.gradient.fill(0);
      sizes.forEach((size, d) => {
        for (let r = 0; r < ranks; r++) {
          const side = size * sides.data[d * ranks + r]!;
          alone[d]!.gradient[r] = side;
          for (let i = 0; i < width; i++) {
            pair.a.gradient[r * width + i]! += side * along.data[d * width + i]!;
          }
        }
        references[d]!.step([alone[d]!], 0.01);
      });
      optimizer.step([pair.a, pair.b], 0.01);
    }
    const moved = { rows: width, columns: ranks, data: Float64Array.from(pair.a.values) };
    const got = innerProducts(moved, along).data; // [R, 2]
    expect(largestDifference(got.subarray(0, ranks), alone[0]!.values)).toBeLessThan(1e-6);
    expect(largestDifference(got.subarray(ranks), alone[1]!.values)).toBeLessThan(1e-6);
  });

  it('goes on after a restore, bit for bit, also between two choices of directions', () => {
    const bases = new Map([['m.a', part(0)]]);
    const [straight, parts] = [pairOf(14, 0.3), pairOf(14, 0.3)];
    const optimizer = createCoso(options, [straight.a, straight.b], bases);
    train(straight, fresh, optimizer, 17);
    const first = createCoso(options, [parts.a, parts.b], bases);
    train(parts, fresh, first, 8);
    const second = createCoso(options, [parts.a, parts.b], bases);
    second.restore(first.save());
    train(parts, fresh, second, 9);
    expect(parts.a.values).toEqual(straight.a.values);
    expect(parts.b.values).toEqual(straight.b.values);
    // What it gathered on the way as well.
    expect(second.consolidated()).toEqual(optimizer.consolidated());
    expect(second.consolidated().get('m.a')!.columns).toBeGreaterThan(5);
    expect(second.consolidated()).toEqual(second.consolidated()); // asking changes nothing
  });

  it('begins to move A at the first gradient that there is', () => {
    const pair = pairOf(15, 0);
    const before = pair.a.values.slice();
    const optimizer = createCoso({ ...options, gap: 100 }, [pair.a, pair.b], new Map());
    train(pair, fresh, optimizer, 1); // B was zero, and A had no gradient
    expect(pair.a.values).toEqual(before);
    train(pair, fresh, optimizer, 1);
    expect(largestDifference(pair.a.values, before)).toBeGreaterThan(1e-3);
  });

  it('ranks that add nothing as yet are free to learn', () => {
    const basis = part(0);
    const [a, b] = [random(width, ranks, 20), random(height, ranks, 21)];
    b.data.fill(0, 4 * height);
    const freed = freedRanks(a, b, basis);
    expect(freed.data.subarray(0, 4 * width)).toEqual(a.data.subarray(0, 4 * width));
    const seen = innerProducts(freed, basis).data; // [R, 5]
    for (let k = 0; k < 5; k++) {
      expect(
        largest({ rows: 2, columns: 1, data: seen.subarray(k * ranks + 4, (k + 1) * ranks) }),
      ).toBeLessThan(1e-14);
    }
    expect(largest(freed)).toBeGreaterThan(0.1);
  });
});

describe('extendBasis', () => {
  it('stays orthonormal over 20 tasks that share directions', () => {
    let basis = emptyBasis(120);
    for (let task = 0; task < 20; task++) {
      const shared = random(120, 3, 50);
      const own = random(120, 4, 60 + task);
      const data = Float64Array.from([...shared.data, ...own.data], (x, i) => x * 10 ** -(i % 3));
      basis = extendBasis(basis, { rows: 120, columns: 7, data }, { energy: 0.98, keptMax: 120 });
    }
    expect(basis.columns).toBeGreaterThan(40);
    expect(basis.columns).toBeLessThanOrEqual(3 + 20 * 4);
    const gram = innerProducts(basis, basis).data;
    const identity = gram.map((_, at) => Number(at % (basis.columns + 1) === 0));
    expect(largestDifference(gram, identity)).toBeLessThan(1e-10);
  });

  it('takes the fewest directions that hold the energy, and none for what it has', () => {
    const q = orthonormal(random(30, 4, 70));
    const sizes = [10, 3, 1, 0.1]; // energies 100, 9, 1, 0.01 of 110.01
    const sketch = { ...q, data: q.data.map((x, i) => x * sizes[Math.floor(i / 30)]!) };
    const counts = [0.9, 0.91, 0.995, 0.99995, 1].map(
      (energy) => extendBasis(emptyBasis(30), sketch, { energy, keptMax: 30 }).columns,
    );
    expect(counts).toEqual([1, 2, 3, 4, 4]);
    const most = { energy: 0.98, keptMax: 30 };
    const basis = extendBasis(emptyBasis(30), sketch, most);
    expect(extendBasis(basis, sketch, most).columns).toBe(basis.columns);
    expect(extendBasis(basis, { ...sketch, data: sketch.data.map(() => 0) }, most)).toEqual(basis);
  });

  it('has no more directions than it may, those with the most energy', () => {
    const q = orthonormal(random(30, 4, 71));
    const sketch = { ...q, data: q.data.map((x, i) => x * (4 - Math.floor(i / 30))) };
    const two = extendBasis(emptyBasis(30), sketch, { energy: 1, keptMax: 2 });
    expect(two.columns).toBe(2);
    expect(largest(outside(two, { ...q, columns: 2, data: q.data.subarray(0, 60) }))).toBeLessThan(
      1e-12,
    );
    expect(extendBasis(two, sketch, { energy: 1, keptMax: 2 })).toEqual(two);
    expect(extendBasis(two, sketch, { energy: 1, keptMax: 1 })).toEqual(two);
  });
});

describe('the file of bases', () => {
  it('comes back as it was', () => {
    const bases = new Map([
      ['blk.0.attn_q.a', part(0)],
      ['blk.1.attn_q.a', random(3, 2, 1)],
    ]);
    expect(readBases(writeBases(bases))).toEqual(bases);
  });

  it('refuses numbers that are not finite, and what is no matrix of doubles', () => {
    const bad = random(3, 2, 1);
    bad.data[4] = Number.NaN;
    for (const file of [
      writeBases(new Map([['m.a', bad]])),
      createAdamw({ name: 'adamw', ...adam, weightDecay: 0 }, [pairOf(1, 1).a]).save(),
    ]) {
      expect(() => readBases(file)).toThrow(expect.objectContaining({ code: 'INVALID_ADAPTER' }));
    }
  });
});
