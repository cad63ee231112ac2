import { afterAll, describe, expect, it } from 'vitest';
import { generationOf, openPacked } from '../../../src/adapters/pack.ts';
import { squeezePacked } from '../../../src/adapters/pack-pairs.ts';
import { cutProducts, ranksAfter, ranksBefore } from '../../../src/trainer/annealing.ts';
import type { RunRecipe } from '../../../src/trainer/session.ts';
import { TrainingSession } from '../../../src/trainer/session.ts';
import { parameterOf, productOf } from '../../support/product-problem.ts';
import { createRng, normals } from '../../support/random.ts';
import { largestDifference } from '../../support/trainer-numbers.ts';
import { openTinyBase, tinyExamples, tinyRecipe } from '../../support/training-base.ts';

const base = await openTinyBase();
afterAll(() => base.kernels[Symbol.dispose]());
const training = tinyExamples(16, 48);
const breathe = async (): Promise<void> => {};

function recipeOf(more: Readonly<Record<string, unknown>>): RunRecipe {
  const step = { accumulation: 8, learningRate: 1e-2, schedule: 'constant' };
  return tinyRecipe({ kind: 'lora', rank: 2, stepsMax: 40, ...step, ...more });
}

function open(recipe: RunRecipe): TrainingSession {
  return new TrainingSession({ base, recipe, training, heldOut: training, start: null });
}

/** Ranks of each A that are not zero. */
function ranksOf({ parameters }: TrainingSession): number[] {
  return parameters
    .filter(({ name }) => name.endsWith('.a'))
    .map(({ values, rows, columns }) => {
      const isThere = (r: number): boolean =>
        values.subarray(r * columns, (r + 1) * columns).some((value) => value !== 0);
      return Array.from({ length: rows }, (_, r) => r).filter(isThere).length;
    });
}

describe('the ranks that are left', () => {
  it('halve at equal distances, and are those that are wanted from the share on', () => {
    const recipe = { rank: 3, squeeze: { kind: 'anneal', from: 16, share: 0.6 } } as const;
    const all = Array.from({ length: 20 }, (_, i) => ranksAfter(recipe, i + 1, 20));
    // Three halvings in twelve steps.
    expect(all).toEqual([16, 16, 16, 8, 8, 8, 8, 4, 4, 4, 4, 3, 3, 3, 3, 3, 3, 3, 3, 3]);
    expect(ranksAfter(recipe, 1, 1)).toBe(3);
    expect(ranksBefore(recipe)).toBe(16);
  });

  it('are all until the end for post, and never others for what is not squeezed', () => {
    const post = { rank: 2, squeeze: { kind: 'post', from: 8 } } as const;
    expect([1, 9, 10].map((step) => ranksAfter(post, step, 10))).toEqual([8, 8, 2]);
    const cont = { rank: 2, squeeze: { kind: 'cont' } } as const;
    expect([1, 10].map((step) => ranksAfter(cont, step, 10))).toEqual([2, 2]);
  });
});

describe('cutting a product', () => {
  const rng = createRng(1);
  const pair = (bScale: number) => ({
    a: parameterOf('m.a', 6, normals(rng, 6 * 10)),
    b: parameterOf('m.b', 6, normals(rng, 6 * 8, bScale)),
  });

  it('leaves the best of fewer ranks first, and nothing after them', () => {
    const { a, b } = pair(1);
    const whole = productOf({ a, b });
    expect(cutProducts([a, b], 3)).toBe(true);
    const rest = [a.values.subarray(30), b.values.subarray(24)].flatMap((x) => Array.from(x));
    expect(rest.every((value) => value === 0)).toBe(true);
    const cut = productOf({ a, b });
    // What is left out is orthogonal to what is kept, as only the best approximation's is.
    const inner = whole.reduce((sum, x, i) => sum + (x - cut[i]!) * cut[i]!, 0);
    const size = whole.reduce((sum, x) => sum + x * x, 0);
    expect(Math.abs(inner)).toBeLessThan(1e-6 * size);
    const before = cut.slice();
    expect(cutProducts([a, b], 3)).toBe(false);
    expect(productOf({ a, b })).toEqual(before);
  });

  it('of nothing keeps the first rows, to learn', () => {
    const { a, b } = pair(0);
    const rows = a.values.slice(0, 20);
    cutProducts([a, b], 2);
    expect(a.values.slice(0, 20)).toEqual(rows);
    expect(a.values.subarray(20).every((value) => value === 0)).toBe(true);
  });
});

describe('a session that anneals', () => {
  it('has fewer ranks as it goes, and publishes those that are wanted', async () => {
    using session = open(recipeOf({ squeeze: { kind: 'anneal', from: 8 } }));
    const seen: number[] = [];
    const losses: number[] = [];
    while (session.step < session.steps) {
      losses.push((await session.takeStep(breathe)).loss);
      const ranks = new Set(ranksOf(session));
      expect(ranks.size).toBe(1);
      seen.push(...ranks);
    }
    expect([0, 8, 9, 18, 19, 39].map((step) => seen[step])).toEqual([8, 8, 4, 4, 2, 2]);
    expect(losses.at(-1)).toBeLessThan(losses[0]! - 0.15);
    const packed = session.publish();
    expect(packed.manifest.rankMax).toBe(2);
    const byRank = await session.evaluate(packed, breathe);
    expect(byRank.map(({ rank }) => rank)).toEqual([1, 2]);
    expect(byRank.at(-1)!.loss).toBeLessThan(losses.at(-1)! + 0.03);
  });

  it('begins its moments anew where ranks change, and at no other step', async () => {
    using session = open(recipeOf({ squeeze: { kind: 'anneal', from: 8 } }));
    const isFresh = (): boolean =>
      Buffer.from(session.checkpoint().optimizer).includes('"steps":"0"');
    const fresh: number[] = [];
    while (session.step < session.steps) {
      await session.takeStep(breathe);
      if (isFresh()) fresh.push(session.step);
    }
    expect(fresh).toEqual([10, 20]);
  });

  it('cut at the end is what it would be squeezed to afterwards', async () => {
    using all = open(recipeOf({ rank: 8 }));
    using post = open(recipeOf({ squeeze: { kind: 'post', from: 8 } }));
    for (const session of [all, post]) {
      while (session.step < session.steps) await session.takeStep(breathe);
    }
    const { bytes } = all.publish();
    const squeezed = squeezePacked(openPacked(bytes, generationOf(bytes)), { rank: 2 });
    const cut = post.publish();
    expect(cut.manifest.rankMax).toBe(2);
    const [wanted, got] = [
      (await post.evaluate(squeezed, breathe)).at(-1)!.loss,
      (await post.evaluate(cut, breathe)).at(-1)!.loss,
    ];
    expect(Math.abs(got / wanted - 1)).toBeLessThan(1e-3); // one is rounded to f16 twice
    expect(largestDifference([got], [(await post.baseLoss(breathe))!])).toBeGreaterThan(0.1);
  });
});
