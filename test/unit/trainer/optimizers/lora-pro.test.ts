import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { times, zeros } from '../../../../src/adapters/families/matrices.ts';
import {
  type Columns,
  innerProducts,
  multiplyTransposed,
  transpose,
} from '../../../../src/adapters/orthogonal.ts';
import { orthonormal } from '../../../../src/adapters/randomized-svd.ts';
import {
  adjustedGradients,
  createLoraPro,
  createLoraProSgd,
  type Factors,
} from '../../../../src/trainer/optimizers/lora-pro.ts';
import type { Parameter } from '../../../../src/trainer/optimizers/optimizer.ts';
import { createRng } from '../../../support/random.ts';
import { doubles, largestDifference, trainerNumbers } from '../../../support/trainer-numbers.ts';

const exact = { damping: 0 } as const;

function random(rows: number, columns: number, seed: number): Columns {
  const rng = createRng(seed);
  return { rows, columns, data: Float64Array.from({ length: rows * columns }, () => rng.normal()) };
}
function minus(x: Columns, y: Columns): Columns {
  return { ...x, data: x.data.map((value, i) => value - y.data[i]!) };
}
function norm({ data }: Columns): number {
  return Math.sqrt(data.reduce((sum, x) => sum + x * x, 0));
}
/** The gradients of the factors where that of the product is g [out, in]. */
function gradientsOf({ a, b }: Factors, g: Columns, scale: number): Factors {
  const scaled = { ...g, data: g.data.map((x) => x * scale) };
  return { a: innerProducts(scaled, b), b: times(scaled, a) }; // [in, R], [out, R]
}
/** s·(B·dA + dB·A), [out, in]. */
function change({ a, b }: Factors, step: Factors, scale: number): Columns {
  const [x, y] = [multiplyTransposed(b, step.a), multiplyTransposed(step.b, a)];
  return { ...x, data: x.data.map((value, i) => scale * (value + y.data[i]!)) };
}
/** (I − P_B)·g·(I − P_A). */
function outside({ a, b }: Factors, g: Columns): Columns {
  const [p, q] = [orthonormal(b), orthonormal(a)];
  const left = minus(g, times(p, innerProducts(p, g)));
  return minus(left, multiplyTransposed(times(left, q), q));
}

describe('adjustedGradients', () => {
  it("is scipy's", () => {
    const { a, b, goal, scale, once } = trainerNumbers.loraPro;
    const factors = {
      a: { rows: 12, columns: 4, data: doubles(a) },
      b: transpose({ rows: 4, columns: 9, data: doubles(b) }),
    };
    const product = multiplyTransposed(factors.b, factors.a); // [9, 12]
    const wanted = transpose({ rows: 12, columns: 9, data: doubles(goal) });
    const full = { ...product, data: product.data.map((x, i) => scale * x - wanted.data[i]!) };
    const got = adjustedGradients(factors, gradientsOf(factors, full, scale), { scale, ...exact });
    expect(largestDifference(got.a.data, doubles(once.a))).toBeLessThan(1e-11);
    expect(largestDifference(transpose(got.b).data, doubles(once.b))).toBeLessThan(1e-11);
  });

  it.each([1, -1, 0.25, 16])(
    'moves the product as near to g as rank R can, at scale %d',
    (scale) => {
      const factors = { a: random(40, 6, 1), b: random(30, 6, 2) };
      const g = random(30, 40, 3);
      const step = adjustedGradients(factors, gradientsOf(factors, g, scale), { scale, ...exact });
      const miss = norm(minus(change(factors, step, scale), g));
      const least = norm(outside(factors, g));
      expect(Math.abs(miss / least - 1)).toBeLessThan(1e-9);
      // The plain gradient, as it is used, is far from it.
      const plain = gradientsOf(factors, g, scale);
      expect(norm(minus(change(factors, plain, scale), g))).toBeGreaterThan(1.1 * least);
    },
  );

  it('takes of all steps with that product the one nearest to the plain gradients', () => {
    const factors = { a: random(20, 4, 5), b: random(15, 4, 6) };
    const plain = gradientsOf(factors, random(15, 20, 7), 1.5);
    const step = adjustedGradients(factors, plain, { scale: 1.5, ...exact });
    const far = (of: Factors): number =>
      norm(minus(of.a, plain.a)) ** 2 + norm(minus(of.b, plain.b)) ** 2;
    for (let seed = 0; seed < 20; seed++) {
      // X + Y for a random Y: A takes Y·A more, B takes B·Y less.
      const y = random(4, 4, 100 + seed);
      const small = { ...y, data: y.data.map((x) => x * 0.01) };
      const other = {
        a: minus(
          step.a,
          multiplyTransposed(factors.a, { ...small, data: small.data.map((x) => -x) }),
        ),
        b: minus(step.b, times(factors.b, small)),
      };
      expect(norm(minus(change(factors, other, 1.5), change(factors, step, 1.5)))).toBeLessThan(
        1e-9,
      );
      expect(far(other)).toBeGreaterThan(far(step));
    }
  });

  it('goes downhill in 100 of 100 draws', () => {
    let downhill = 0;
    fc.assert(
      fc.property(
        fc.integer({ min: 0, max: 1e9 }),
        fc.integer({ min: 1, max: 6 }),
        (seed, rank) => {
          const factors = { a: random(14, rank, seed), b: random(9, rank, seed + 1) };
          const g = random(9, 14, seed + 2);
          const step = adjustedGradients(factors, gradientsOf(factors, g, 2), {
            scale: 2,
            ...exact,
          });
          const moved = change(factors, step, 2);
          expect(g.data.reduce((sum, x, i) => sum + x * moved.data[i]!, 0)).toBeGreaterThan(0);
          downhill++;
        },
      ),
      { numRuns: 100, endOnFailure: true },
    );
    expect(downhill).toBe(100);
  });

  it.each([0, 1e-8])('B = 0: A stays, B moves as near to g as A allows; damping %d', (damping) => {
    const factors = { a: random(20, 4, 8), b: zeros(4, 15) };
    const g = random(15, 20, 9);
    const step = adjustedGradients(factors, gradientsOf(factors, g, 2), { scale: 2, damping });
    expect(norm(step.a)).toBe(0);
    const q = orthonormal(factors.a);
    const least = norm(minus(g, multiplyTransposed(times(g, q), q)));
    expect(norm(minus(change(factors, step, 2), g)) / least - 1).toBeLessThan(1e-9);
  });

  it('ranks that B does not have get nothing that is not finite', () => {
    const b = random(15, 4, 10);
    b.data.copyWithin(15, 0, 15); // two ranks alike
    const factors = { a: random(20, 4, 11), b };
    const g = random(15, 20, 12);
    const step = adjustedGradients(factors, gradientsOf(factors, g, 2), { scale: 2, ...exact });
    const three = { ...b, columns: 3, data: b.data.subarray(15) };
    const least = norm(outside({ ...factors, b: three }, g));
    expect(Math.abs(norm(minus(change(factors, step, 2), g)) / least - 1)).toBeLessThan(1e-6);
  });
});

interface Problem {
  readonly parameters: readonly [Parameter, Parameter];
  readonly goal: Float64Array; // [out, in]
  readonly scale: number;
}

function parameter(name: string, x: Columns): Parameter {
  const values = Float32Array.from(x.data);
  return {
    name,
    rows: x.columns,
    columns: x.rows,
    values,
    gradient: new Float32Array(values.length),
  };
}

/** ‖s·B·A − goal‖²/2, with the gradients of a and b. */
function lossOf({ parameters: [a, b], goal, scale }: Problem): number {
  const [width, height] = [a.columns, b.columns];
  for (const { gradient } of [a, b]) gradient.fill(0);
  const [ofA, ofB] = [a, b].map(({ values }) => new Float64Array(values.length)) as [
    Float64Array,
    Float64Array,
  ];
  let loss = 0;
  for (let o = 0; o < height; o++) {
    for (let i = 0; i < width; i++) {
      let y = -goal[o * width + i]!;
      for (let r = 0; r < a.rows; r++) {
        y += scale * b.values[r * height + o]! * a.values[r * width + i]!;
      }
      loss += (y * y) / 2;
      for (let r = 0; r < a.rows; r++) {
        ofA[r * width + i]! += scale * y * b.values[r * height + o]!;
        ofB[r * height + o]! += scale * y * a.values[r * width + i]!;
      }
    }
  }
  a.gradient.set(ofA);
  b.gradient.set(ofB);
  return loss;
}

const adam = { beta1: 0.9, beta2: 0.999, epsilon: 1e-8 } as const;

describe('lora-pro', () => {
  it('six steps are those of its formulas in numpy', () => {
    const { a, b, goal, scale, steps, learningRate, weightDecay, finalA, finalB } =
      trainerNumbers.loraPro;
    const problem: Problem = {
      parameters: [
        parameter('m.a', { rows: 12, columns: 4, data: doubles(a) }),
        parameter('m.b', transpose({ rows: 4, columns: 9, data: doubles(b) })),
      ],
      goal: doubles(goal),
      scale,
    };
    const options = { name: 'lora-pro', ...adam, weightDecay, scale, damping: 0 } as const;
    const optimizer = createLoraPro(options, problem.parameters);
    expect(optimizer.stateBytes).toBe(8 * 9 * 12);
    for (let t = 0; t < steps; t++) {
      lossOf(problem);
      optimizer.step(problem.parameters, learningRate);
    }
    const [gotA, gotB] = problem.parameters;
    const wantedB = transpose({ rows: 4, columns: 9, data: doubles(finalB) }).data;
    expect(largestDifference(gotA.values, doubles(finalA))).toBeLessThan(1e-4);
    expect(largestDifference(gotB.values, wantedB)).toBeLessThan(1e-4);
  });

  it('without moments the step in f32 misses the optimum by no more than rounding', () => {
    const factors = { a: random(40, 6, 1), b: random(30, 6, 2) };
    const problem: Problem = {
      parameters: [parameter('m.a', factors.a), parameter('m.b', factors.b)],
      goal: new Float64Array(30 * 40),
      scale: 0.5,
    };
    const rng = createRng(4);
    problem.goal.forEach((_, i) => {
      problem.goal[i] = 10 * rng.normal();
    });
    lossOf(problem);
    const [a, b] = problem.parameters;
    const before = { a: a.values.slice(), b: b.values.slice() };
    const options = { name: 'lora-pro-sgd', weightDecay: 0, scale: 0.5, damping: 0 } as const;
    const optimizer = createLoraProSgd(options, problem.parameters);
    expect(optimizer.stateBytes).toBe(0);
    optimizer.step(problem.parameters, 1);
    const moved = (now: Float32Array, old: Float32Array, x: Columns): Columns => {
      return { ...x, data: Float64Array.from(now, (value, i) => old[i]! - value) };
    };
    const step = {
      a: moved(a.values, before.a, factors.a),
      b: moved(b.values, before.b, factors.b),
    };
    const f32 = {
      a: { ...factors.a, data: Float64Array.from(before.a) },
      b: { ...factors.b, data: Float64Array.from(before.b) },
    };
    const product = multiplyTransposed(f32.b, f32.a);
    const goal = transpose({ rows: 40, columns: 30, data: problem.goal });
    const g = { ...product, data: product.data.map((x, i) => 0.5 * x - goal.data[i]!) };
    const miss = norm(minus(change(f32, step, 0.5), g));
    expect(Math.abs(miss / norm(outside(f32, g)) - 1)).toBeLessThan(1e-4);
  });

  it.each(['lora-pro', 'lora-pro-sgd'] as const)('%s learns a product from B = 0', (name) => {
    const [left, right] = [random(30, 3, 20), random(20, 3, 21)];
    const problem: Problem = {
      parameters: [
        parameter('m.a', {
          ...random(30, 6, 22),
          data: random(30, 6, 22).data.map((x) => x * 0.2),
        }),
        parameter('m.b', zeros(6, 20)),
      ],
      goal: transpose(multiplyTransposed(right, left)).data,
      scale: 2,
    };
    const common = { weightDecay: 0, scale: 2, damping: 1e-8 };
    const optimizer =
      name === 'lora-pro'
        ? createLoraPro({ name, ...adam, ...common }, problem.parameters)
        : createLoraProSgd({ name, ...common }, problem.parameters);
    const first = lossOf(problem);
    for (let t = 0; t < 200; t++) {
      lossOf(problem);
      optimizer.step(problem.parameters, name === 'lora-pro' ? 0.05 : 0.1);
    }
    expect(problem.parameters.every(({ values }) => values.every(Number.isFinite))).toBe(true);
    expect(lossOf(problem)).toBeLessThan(0.01 * first);
  });

  it('refuses what is no pair', () => {
    const options = { name: 'lora-pro-sgd', weightDecay: 0, scale: 1, damping: 0 } as const;
    const shape = (name: string, rows: number): { name: string; rows: number; columns: number } => {
      return { name, rows, columns: 8 };
    };
    for (const shapes of [
      [shape('m.a', 4)],
      [shape('m.a', 4), shape('m.b', 3)],
      [shape('m.a', 4), shape('m.b', 4), shape('m.gates', 4)],
      [shape('m.b', 4), shape('n.a', 4)],
    ]) {
      expect(() => createLoraProSgd(options, shapes)).toThrow(/low-rank pairs/);
    }
  });
});
