import { afterAll, describe, expect, it } from 'vitest';
import { generationOf, openPacked } from '../../../src/adapters/pack.ts';
import { importPacked, packedConfig } from '../../../src/adapters/packed-import.ts';
import { type RunRecipe, TrainingSession } from '../../../src/trainer/session.ts';
import {
  openTinyBase,
  resume,
  takeSteps,
  tinyExamples,
  tinyRecipe,
} from '../../support/training-base.ts';

// Every family through the whole of training: it learns, what is published is what was learnt, and a crash changes no byte.

const base = await openTinyBase();
afterAll(() => base.kernels[Symbol.dispose]());

const training = tinyExamples(16, 48);
const breathe = async (): Promise<void> => {};

function open(recipe: RunRecipe): TrainingSession {
  return new TrainingSession({ base, recipe, training, heldOut: training, start: null });
}

/** All examples in each step: losses of steps are of the same numbers as held-out losses. */
function recipeOf(more: Readonly<Record<string, unknown>>, stepsMax = 40): RunRecipe {
  const step = { accumulation: 16, learningRate: 1e-2, schedule: 'constant' };
  return tinyRecipe({ rank: 8, stepsMax, ...step, ...more });
}

const flexmore = {
  kind: 'flexmore',
  experts: [
    { name: 'small', rank: 2 },
    { name: 'large', rank: 6 },
  ],
} as const;
const kinds = [
  { kind: 'hydra', packed: 'hydra', rankMax: 16 },
  { kind: 'triangular', packed: 'triangular', rankMax: 8 },
  { kind: 'salt', packed: 'salt', rankMax: 12 },
  // No basis of its own: its pairs.
  { kind: 'svfit', packed: 'lora', rankMax: 8, learningRate: 0.1 },
  { kind: 'fly', packed: 'fly', rankMax: 8, scaling: 'none', learningRate: 0.03 },
  { kind: 'mora', packed: 'mora', rankMax: 8, topK: 3, recompute: true, learningRate: 0.03 },
  { kind: 'lora', init: { kind: 'eva', rho: 2, tokens: 512 }, packed: 'lora', rankMax: 16 },
  { ...flexmore, packed: 'flexmore', rankMax: 8 },
] as const;

describe('a training session', () => {
  it.each(kinds)('of $kind learns, and publishes what it learnt', async (test) => {
    const { packed: kind, rankMax, ...more } = test;
    using session = open(recipeOf(more));
    const before = await session.baseLoss(breathe);
    const [first, ...losses] = await takeSteps(session, 40);
    expect(first).toBeCloseTo(before!, 4); // it began as nothing
    const last = losses.at(-1)!;
    expect(last).toBeLessThan(before! - 0.15);

    const { bytes, manifest } = session.publish();
    expect([manifest.kind, manifest.rankMax <= rankMax]).toEqual([kind, true]);
    const into = { config: base.config, hash: base.hash, names: [] };
    expect(importPacked(packedConfig, bytes, into).manifest).toEqual(manifest);
    const byRank = await session.evaluate({ bytes, manifest }, breathe);
    const ranks = byRank.map(({ rank }) => rank);
    expect(ranks.slice(0, 4)).toEqual([1, 2, 4, 8]);
    // With all that it has, or as many of a token's choice as were trained with. One step further, in f16.
    expect(byRank.at(-1)!.loss).toBeLessThan(last + 0.03);
    const { generation } = openPacked(bytes, generationOf(bytes));
    expect(session.publish().bytes.length).toBe(bytes.length);
    expect(generation).toBe(generationOf(session.publish().bytes));
  });

  it.each([
    { kind: 'fly', scaling: 'none' },
    { kind: 'mora', recompute: true },
    { kind: 'hydra' },
    flexmore,
  ])('goes on from a checkpoint with the bytes it would have had: $kind', async (more) => {
    const recipe = recipeOf(more, 12);
    using run = await resume(() => open(recipe), { cut: 5, lost: 3, steps: 12 });
    const { straight, second, checkpoint } = run;
    expect(second.publish().bytes).toEqual(straight.publish().bytes);
    expect(straight.checkpoint().parameters).toHaveLength(checkpoint.parameters.length);
  });

  it('of eva spends exactly its budget, and unevenly', () => {
    const init = { kind: 'eva', rho: 2, tokens: 768 };
    using session = open(recipeOf({ kind: 'lora', rank: 4, init }));
    const factors = session.parameters.filter(({ name }) => name.endsWith('.a'));
    const ranks = factors.map(({ rows }) => rows);
    expect(ranks.reduce((sum, rank) => sum + rank, 0)).toBe(4 * 14);
    expect(new Set(ranks).size).toBeGreaterThan(2);
    expect(Math.max(...ranks)).toBeLessThanOrEqual(8);
  });

  it('of triangular grows, unevenly, to the ranks that the recipe has on average', async () => {
    const rankGrowth = { interval: 4, threshold: 'exp', warmupShare: 0.2 };
    using session = open(recipeOf({ kind: 'triangular', rank: 4, rankGrowth, stepsMax: 30 }));
    const ranks = (): number[] => Array.from(session.checkpoint().parameters.slice(-28, -14));
    expect(new Set(ranks())).toEqual(new Set([2]));
    const losses = await takeSteps(session, 30);
    expect(losses.at(-1)).toBeLessThan(losses[0]! - 0.15);
    const grown = ranks();
    const sum = grown.reduce((all, rank) => all + rank, 0);
    expect(4 * 14 - sum).toBeLessThan(2); // within a quantum
    expect(new Set(grown).size).toBeGreaterThan(1);
    const { modules } = session.publish().manifest;
    expect(modules.every(({ rank }, m) => rank <= grown[m]!)).toBe(true);
    expect(modules.map(({ rank }) => rank).reduce((all, rank) => all + rank, 0)).toBeGreaterThan(
      28,
    );
  });

  it('goes on from an adapter for plain pairs only', async () => {
    using first = open(recipeOf({ kind: 'lora' }, 2));
    await takeSteps(first, 2);
    const { bytes } = first.publish();
    const start = openPacked(bytes, generationOf(bytes));
    for (const [more, why] of [
      [{ kind: 'hydra' }, 'a hydra begins anew'],
      [{ kind: 'lora', init: { kind: 'eva' } }, 'eva begins anew'],
    ] as const) {
      const options = { base, recipe: recipeOf(more), training, heldOut: [], start };
      expect(() => new TrainingSession(options)).toThrow(why);
    }
  });
});
