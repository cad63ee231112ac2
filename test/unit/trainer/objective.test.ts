import { describe, expect, it } from 'vitest';
import { createRandom } from '../../../src/adapters/families/seeded-random.ts';
import { bySvd } from '../../../src/adapters/native-import.ts';
import { type Columns, qr } from '../../../src/adapters/orthogonal.ts';
import { parseRecipe, type Recipe } from '../../../src/jobs/recipe.ts';
import { learningRateAt } from '../../../src/trainer/learning-rate.ts';
import { passesOf } from '../../../src/trainer/objective.ts';
import { createOptimizer, type Parameter } from '../../../src/trainer/optimizers/optimizer.ts';
import { familyOf } from '../../../src/trainer/publish.ts';

function recipeOf(more: Readonly<Record<string, unknown>>): Recipe {
  return parseRecipe({ rank: 8, order: 'svd', ...more }, 'recipe');
}

function gatesOf(recipe: Recipe): number[][] {
  return passesOf(recipe, 0).map(({ gates }) => Array.from(gates));
}

const published = {
  none: [4, 3, 2, 2, 1, 1, 1, 1],
  rank: [1.875, 0.875, 0.375, 0.375, 0.125, 0.125, 0.125, 0.125],
  sqrt: [2.56066, 1.56066, 0.853553, 0.853553, 0.353553, 0.353553, 0.353553, 0.353553],
} as const;

describe('what a step minimises', () => {
  for (const [scaling, wanted] of Object.entries(published)) {
    it(`diag, scaling ${scaling}: the published P of S = 1, 2, 4, 8`, () => {
      const [gates] = gatesOf(recipeOf({ scaling }));
      for (const [r, gate] of gates!.entries()) {
        expect(Math.abs(gate - wanted[r]!)).toBeLessThan(1e-6);
      }
      const [binary] = gatesOf(recipeOf({ scaling, objective: 'binary' }));
      for (const [r, gate] of binary!.entries()) {
        expect(Math.abs(4 * gate - wanted[r]!)).toBeLessThan(1e-6);
      }
    });
  }

  it('S = {R} is LoRA, and two recipes have a P each', () => {
    const alone = recipeOf({ ranks: [8], scaling: 'sqrt' });
    const lora = recipeOf({ kind: 'lora', objective: 'plain', scaling: 'sqrt' });
    expect(passesOf(alone, 3)).toEqual(passesOf(lora, 3));
    const other = recipeOf({ ranks: [2, 8], scaling: 'none' });
    expect(gatesOf(other)).toEqual([[2, 2, 1, 1, 1, 1, 1, 1]]);
    expect(gatesOf(recipeOf({ scaling: 'none' }))).toEqual([published.none]);
    expect(gatesOf(other)).toEqual([[2, 2, 1, 1, 1, 1, 1, 1]]);
  });

  it('multi has every prefix of S, each with the same share', () => {
    const passes = passesOf(recipeOf({ objective: 'multi', scaling: 'rank' }), 0);
    expect(passes.map(({ weight }) => weight)).toEqual([0.25, 0.25, 0.25, 0.25]);
    const prefixes = passes.map(({ gates }) => Array.from(gates.filter((gate) => gate !== 0)));
    expect(prefixes).toEqual([[1], [0.5, 0.5], Array(4).fill(0.25), Array(8).fill(0.125)]);
    for (const [i, { gates }] of passes.entries()) expect(gates[2 ** i - 1]).toBe(1 / 2 ** i);
  });

  it('dylora draws one prefix a step, sandwich one beside the whole: all alike, by the seed', () => {
    const counts = new Map<string, number>();
    const count = (name: string): void => void counts.set(name, (counts.get(name) ?? 0) + 1);
    const dylora = recipeOf({ objective: 'dylora' });
    const sandwich = recipeOf({ objective: 'sandwich' });
    const sizeOf = (gates: Float64Array): number => gates.filter((gate) => gate !== 0).length;
    for (let step = 0; step < 1200; step++) {
      const [one, ...none] = passesOf(dylora, step);
      expect(none).toEqual([]);
      count(`dylora ${sizeOf(one!.gates)}`);
      const [whole, part] = passesOf(sandwich, step);
      expect(sizeOf(whole!.gates)).toBe(8);
      expect(whole!.weight + part!.weight).toBe(1);
      count(`sandwich ${sizeOf(part!.gates)}`);
    }
    // 1200 draws at 1/4 and 1/3: five deviations of 15 and 16.3.
    for (const q of [1, 2, 4, 8]) {
      expect(Math.abs(counts.get(`dylora ${q}`)! - 300)).toBeLessThan(75);
    }
    for (const q of [1, 2, 4]) {
      expect(Math.abs(counts.get(`sandwich ${q}`)! - 400)).toBeLessThan(82);
    }
    expect(counts.size).toBe(7);
    expect(passesOf(dylora, 77)).toEqual(passesOf(recipeOf({ objective: 'dylora' }), 77));
  });
});

// algorithms.md section 1: a target of rank 8 with singular values 4·0.6^i, in 32, out 24.
const [width, out, rank, steps] = [32, 24, 8, 3000];

function orthonormal(rows: number, columns: number, seed: bigint): Columns {
  const random = createRandom(seed);
  const data = Float64Array.from({ length: rows * columns }, () => random.normal());
  const identity = Float64Array.from({ length: columns * columns }, (_, i) =>
    i % (columns + 1) === 0 ? 1 : 0,
  );
  return qr({ rows, columns, data }).applyQ({ rows: columns, columns, data: identity });
}

/** [out][in], one row after another. */
function target(seed: bigint): Float64Array {
  const [u, v] = [orthonormal(out, rank, seed), orthonormal(width, rank, seed + 1n)];
  const w = new Float64Array(out * width);
  for (let r = 0; r < rank; r++) {
    for (let o = 0; o < out; o++) {
      for (let i = 0; i < width; i++) {
        w[o * width + i]! += 4 * 0.6 ** r * u.data[r * out + o]! * v.data[r * width + i]!;
      }
    }
  }
  return w;
}

interface Factors {
  readonly a: Float32Array; // [R, in]
  readonly b: Float32Array; // [R, out]
}

/** W − Bᵀ·(g ⊙ A). */
function residual(w: Float64Array, { a, b }: Factors, gates: ArrayLike<number>): Float64Array {
  const e = w.slice();
  for (let r = 0; r < gates.length; r++) {
    for (let o = 0; o < out && gates[r] !== 0; o++) {
      const left = gates[r]! * b[r * out + o]!;
      for (let i = 0; i < width; i++) e[o * width + i]! -= left * a[r * width + i]!;
    }
  }
  return e;
}

/** Of ‖W − Bᵀ·(g ⊙ A)‖², which is the mean loss for white inputs. */
function addGradients(
  w: Float64Array,
  [a, b]: readonly [Parameter, Parameter],
  { gates, weight }: ReturnType<typeof passesOf>[number],
): void {
  const e = residual(w, { a: a.values, b: b.values }, gates);
  for (let r = 0; r < rank; r++) {
    const factor = -2 * weight * gates[r]!;
    for (let o = 0; o < out && factor !== 0; o++) {
      for (let i = 0; i < width; i++) {
        const slope = factor * e[o * width + i]!;
        a.gradient[r * width + i]! += slope * b.values[r * out + o]!;
        b.gradient[r * out + o]! += slope * a.values[r * width + i]!;
      }
    }
  }
}

function trainLinear(recipe: Recipe, w: Float64Array): Factors {
  const site = { block: 0, projection: 'attn_q', in: width, out } as const;
  const { a, b } = familyOf(recipe).init(
    { ...site, weight: () => ({ rows: 0, columns: 0, data: new Float64Array() }) },
    createRandom(BigInt(recipe.seed)),
  );
  const parameter = (name: string, { columns: rows, rows: columns, data }: Columns): Parameter => {
    const gradient = new Float32Array(data.length);
    return { name, values: Float32Array.from(data), gradient, rows, columns };
  };
  const both = [parameter('a', a!), parameter('b', b!)] as const;
  const { optimizer, weightDecay, seed } = recipe;
  const options = { ...optimizer, weightDecay, seed, scale: 1 };
  const adam = createOptimizer(options, both);
  for (let step = 0; step < steps; step++) {
    for (const { gradient } of both) gradient.fill(0);
    for (const pass of passesOf(recipe, step)) addGradients(w, both, pass);
    adam.step(both, learningRateAt(step, steps, { ...recipe, learningRate: 1e-2 }));
  }
  return { a: both[0].values, b: both[1].values };
}

function errors(w: Float64Array, factors: Factors): Map<number, number> {
  const size = Math.hypot(...w);
  return new Map(
    [1, 2, 4, 8].map((q) => {
      const gates = Array.from({ length: rank }, (_, r) => (r < q ? 1 : 0));
      return [q, Math.hypot(...residual(w, factors, gates)) / size];
    }),
  );
}

/** Relative error of the best matrix of rank q. */
function optimum(q: number): number {
  const squares = Array.from({ length: rank }, (_, r) => 0.36 ** r);
  const sum = (from: number): number => squares.slice(from).reduce((x, y) => x + y, 0);
  return Math.sqrt(sum(q) / sum(0));
}

describe('on a linear target of rank 8', () => {
  const rate = { warmupShare: 0 };

  for (const seed of [1, 2, 3]) {
    it(`multi makes every prefix the best of its rank, seed ${seed}`, () => {
      const w = target(BigInt(100 * seed));
      const found = errors(w, trainLinear(recipeOf({ objective: 'multi', seed, ...rate }), w));
      for (const q of [1, 2, 4]) expect(found.get(q)! / optimum(q), `${q}`).toBeLessThan(1.05);
      expect(found.get(8)).toBeLessThan(0.05);
    });

    it(`diag fits with P, its raw prefixes do not, and ordered by SVD they are the best, seed ${seed}`, () => {
      const w = target(BigInt(100 * seed));
      const recipe = recipeOf({ seed, ...rate });
      const { a, b } = trainLinear(recipe, w);
      for (const [q, error] of errors(w, { a, b })) {
        expect(error, `${q}`).toBeGreaterThan(1.3 * optimum(q) + 0.1);
      }
      const site = { block: 0, projection: 'attn_q', in: width, out } as const;
      const tensors = {
        a: { rows: width, columns: rank, data: Float64Array.from(a) },
        b: { rows: out, columns: rank, data: Float64Array.from(b) },
      };
      const weight = (): Columns => tensors.a;
      const ordered = bySvd(familyOf(recipe), { ...site, weight }, tensors);
      const found = errors(w, { a: Float32Array.from(ordered.a), b: Float32Array.from(ordered.b) });
      for (const q of [1, 2, 4]) expect(found.get(q)! / optimum(q), `${q}`).toBeLessThan(1.05);
      expect(found.get(8)).toBeLessThan(0.05);
    });
  }
});
