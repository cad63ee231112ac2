import { describe, expect, it } from 'vitest';
import { createPolicy } from '../../../src/router/create-policy.ts';
import type { Budget, Predict, RouteInput } from '../../../src/router/policy.ts';
import { fixedPolicy, largestPolicy, tablePolicy } from '../../../src/router/set-ranks.ts';
import { blendedAdapter, routedAdapter } from '../../support/routed-adapter.ts';

function inputOf(budget: Partial<Budget>, rest: Partial<RouteInput> = {}): RouteInput {
  return {
    budget: {
      totalMs: null,
      ttftMs: null,
      perTokenMs: null,
      strict: false,
      rank: null,
      rankMin: 0,
      priority: 5,
      ...budget,
    },
    promptTokens: 10,
    tokensMax: 100,
    adapter: routedAdapter(16),
    system: null,
    load: { decodeRows: 0, decodeRanks: 0, waiting: 0, waitingPromptTokens: 0, kvCells: 0 },
    ...rest,
  };
}

/** 100 ms and 10 a rank, without doubt. */
const predict: Predict = (_, ranks) => ({
  totalMs: 100 + 10 * ranks,
  sigmaMs: 0,
  ttftMs: 10,
  ttftSigmaMs: 0,
  perTokenMs: 1,
  perTokenSigmaMs: 0,
});
const never = (): number => {
  throw new Error('it drew');
};

describe('one rank for all', () => {
  it.each([
    [8, {}, 8, 'configured'],
    [64, {}, 16, 'configured'],
    [4, { rankMin: 6 }, 6, 'configured'],
    [8, { totalMs: 180 }, 8, 'configured'],
    [8, { totalMs: 179 }, 8, 'infeasible'],
    [8, { rank: 2 }, 2, 'fixed'],
    [0, {}, 0, 'configured'],
  ] as const)('%d for %j: rank %d, %s', (rank, budget, wanted, reason) => {
    const plan = fixedPolicy(rank).choose(inputOf(budget), predict, never);
    expect(plan).toMatchObject({ rank: wanted, rankMax: 16, reason });
    expect(plan.prediction?.totalMs).toBe(100 + 10 * wanted);
  });

  it('leaves the base and what is not known as they are', () => {
    const base = inputOf({}, { adapter: null });
    expect(fixedPolicy(8).choose(base, predict, never)).toMatchObject({ rank: 0, reason: 'base' });
    const plan = fixedPolicy(8).choose(inputOf({ totalMs: 1 }), () => null, never);
    expect(plan).toMatchObject({ rank: 8, reason: 'configured', prediction: null });
  });

  it('drops the system adapter first, and what a row has no pages for', () => {
    const system = { ranks: 4, pages: 1 };
    const at = (totalMs: number) =>
      fixedPolicy(8).choose(inputOf({ totalMs }, { system }), predict, never);
    expect(at(220)).toMatchObject({ hasSystem: true, ranks: 12, reason: 'configured' });
    expect(at(219)).toMatchObject({ hasSystem: false, ranks: 8, reason: 'configured' });
    expect(at(179)).toMatchObject({ hasSystem: false, ranks: 8, reason: 'infeasible' });
    const wide = inputOf({}, { adapter: blendedAdapter([256, 256, 64, 64]) });
    expect(fixedPolicy(256).choose(wide, predict, never)).toMatchObject({ rank: 64, ranks: 256 });
  });
});

describe('a table', () => {
  const policy = tablePolicy([
    { fromMs: 100, rank: 1 },
    { fromMs: 500, rank: 8 },
  ]);
  it.each([
    [{ totalMs: 99 }, 0],
    [{ totalMs: 100 }, 1],
    [{ totalMs: 499.9 }, 1],
    [{ totalMs: 500 }, 8],
    [{ perTokenMs: 4, ttftMs: 100 }, 8], // 100 tokens
    [{ perTokenMs: 4 }, 1],
    [{ ttftMs: 1 }, 16],
    [{}, 16],
    [{ totalMs: 99, rankMin: 2 }, 2],
  ])('gives %j rank %d', (budget, rank) => {
    expect(policy.choose(inputOf(budget), predict, never).rank).toBe(rank);
  });
});

it('policies that learn nothing have nothing to keep', () => {
  for (const policy of [largestPolicy, fixedPolicy(3), tablePolicy([{ fromMs: 0, rank: 1 }])]) {
    const plan = policy.choose(inputOf({}), predict, never);
    policy.settle({ input: inputOf({}), plan, met: true, score: 1 });
    expect(policy.save()).toBe('');
    expect([policy.restore(''), policy.restore('{}')]).toEqual([true, false]);
  }
});

it('each kind of the configuration has its policy', () => {
  const names = [
    createPolicy({ kind: 'guarded' }),
    createPolicy({ kind: 'largest' }),
    createPolicy({ kind: 'fixed', rank: 4 }),
    createPolicy({ kind: 'table', rows: [{ fromMs: 0, rank: 4 }] }),
    createPolicy({ kind: 'critic', discount: 0.9, regularizer: 'beer' }),
  ].map(({ name }) => name);
  expect(names).toEqual(['guarded', 'largest', 'fixed', 'table', 'critic']);
});
