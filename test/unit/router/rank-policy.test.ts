import { describe, expect, it } from 'vitest';
import type { Budget, Prediction, RouteInput } from '../../../src/router/policy.ts';
import { candidateRanks, chooseRank } from '../../../src/router/rank-policy.ts';
import { blendedAdapter, routedAdapter } from '../../support/routed-adapter.ts';

const idle = { decodeRows: 0, decodeRanks: 0, waiting: 0, waitingPromptTokens: 0, kvCells: 0 };
const open: Budget = {
  totalMs: null,
  ttftMs: null,
  perTokenMs: null,
  strict: false,
  rank: null,
  rankMin: 0,
  priority: 5,
};

function inputOf(budget: Partial<Budget>, rankMax = 16, rankCurve?: number[]): RouteInput {
  return {
    budget: { ...open, ...budget },
    promptTokens: 10,
    tokensMax: 100,
    adapter: routedAdapter(rankMax, rankCurve),
    system: null,
    load: idle,
  };
}

/** 100 ms plus 10 ms a rank for the whole, a tenth of it for the first token, a hundredth a token; σ 5 %. */
function predict(_: RouteInput, rank: number): Prediction {
  const totalMs = 100 + 10 * rank;
  return {
    totalMs,
    sigmaMs: totalMs / 20,
    ttftMs: totalMs / 10,
    ttftSigmaMs: totalMs / 200,
    perTokenMs: totalMs / 100,
    perTokenSigmaMs: totalMs / 2000,
  };
}

describe('the rank policy', () => {
  it.each([
    [0, 16, [0, 1, 2, 4, 8, 16]],
    [0, 24, [0, 1, 2, 4, 8, 16, 24]],
    [0, 1, [0, 1]],
    [3, 16, [3, 4, 8, 16]],
    [16, 16, [16]],
    [64, 16, [16]],
    [1, 1, [1]],
  ])('from %d to %d the candidates are %j', (rankMin, rankMax, ladder) => {
    expect(candidateRanks(rankMin, rankMax)).toEqual(ladder);
  });

  it.each([
    [{}, 16, 'full'],
    [{ rankMin: 4 }, 16, 'full'],
    [{ totalMs: 286 }, 16, 'fits'], // 260 + 2 · 13
    [{ totalMs: 285 }, 8, 'reduced'],
    [{ totalMs: 198 }, 8, 'reduced'], // 180 + 2 · 9
    [{ totalMs: 197 }, 4, 'reduced'],
    [{ totalMs: 110 }, 0, 'reduced'],
    [{ totalMs: 109 }, 0, 'infeasible'],
    [{ totalMs: 120, rankMin: 2 }, 2, 'infeasible'],
    [{ totalMs: 1, rankMin: 99 }, 16, 'infeasible'],
    [{ ttftMs: 19.8 }, 8, 'reduced'],
    [{ perTokenMs: 1.97 }, 4, 'reduced'],
    [{ totalMs: 1000, ttftMs: 1000, perTokenMs: 1.98 }, 8, 'reduced'], // all of them must hold
    [{ rank: 3 }, 3, 'fixed'],
    [{ rank: 3, totalMs: 1, strict: true }, 3, 'fixed'],
    [{ rank: 0 }, 0, 'fixed'],
  ] as const)('for %j it takes rank %d: %s', (budget, rank, reason) => {
    const plan = chooseRank(inputOf(budget), predict);
    expect(plan).toMatchObject({ rank, rankMax: 16, reason });
    expect(plan.prediction?.totalMs).toBe(100 + 10 * rank);
    expect(plan.prediction?.ttftMs).toBe(10 + rank);
    expect(plan.prediction?.sigmaMs).toBe(5 + rank / 2);
  });

  it('takes the smallest rank among those that the curve says are equal', () => {
    const flat = [...Array.from({ length: 3 }, () => 0.5), ...Array.from({ length: 13 }, () => 1)];
    expect(chooseRank(inputOf({ totalMs: 198 }, 16, flat), predict)).toMatchObject({
      rank: 4,
      reason: 'reduced',
    });
    expect(chooseRank(inputOf({ totalMs: 140 }, 16, flat), predict)).toMatchObject({ rank: 1 });
  });

  it('a rank that fits carries the smaller ones with it, whatever is not known of them', () => {
    const uncertainBelow = (input: RouteInput, rank: number): Prediction => ({
      ...predict(input, rank),
      sigmaMs: rank < 8 ? 1000 : 0,
    });
    expect(chooseRank(inputOf({ totalMs: 200 }), uncertainBelow)).toMatchObject({
      rank: 8,
      reason: 'reduced',
    });
  });

  it('gives all ranks while nothing was learned, and says so', () => {
    expect(chooseRank(inputOf({ totalMs: 1 }), () => null)).toEqual({
      rank: 16,
      rankMax: 16,
      ranks: 16,
      hasSystem: false,
      reason: 'full',
      prediction: null,
    });
  });

  it('plans the base model without ranks', () => {
    const base = { ...inputOf({}), adapter: null };
    expect(chooseRank(base, predict)).toMatchObject({ rank: 0, rankMax: 0, reason: 'base' });
    const late = { ...inputOf({ totalMs: 50 }), adapter: null };
    expect(chooseRank(late, predict)).toMatchObject({ rank: 0, reason: 'infeasible' });
  });

  it('counts every part of a blend, each cut to its own ranks', () => {
    const blend = (budget: Partial<Budget>): RouteInput => ({
      ...inputOf(budget),
      adapter: blendedAdapter([16, 4, 4]),
    });
    // 24 ranks at rank 16, 16 at rank 8, 12 at rank 4, 3 at rank 1; 1.1 × what predict says must fit.
    expect(chooseRank(blend({}), predict)).toMatchObject({ rank: 16, ranks: 24, reason: 'full' });
    const at = (totalMs: number) => chooseRank(blend({ totalMs }), predict);
    expect(at(375)).toMatchObject({ rank: 16, ranks: 24, reason: 'fits' });
    expect(at(373)).toMatchObject({ rank: 8, ranks: 16, reason: 'reduced' });
    expect(at(285)).toMatchObject({ rank: 4, ranks: 12, reason: 'reduced' });
    expect(at(144)).toMatchObject({ rank: 1, ranks: 3, reason: 'reduced' });
    expect(chooseRank(blend({ rank: 5 }), predict)).toMatchObject({ ranks: 13, reason: 'fixed' });
  });

  it('gives a blend the largest rank whose pages one row can read, and says that it is not all', () => {
    const wide = { ...inputOf({}), adapter: blendedAdapter([256, 256, 64, 64]) };
    expect(chooseRank(wide, predict)).toMatchObject({
      ...{ rank: 64, rankMax: 256, ranks: 256, reason: 'reduced' },
    });
    const fixed = { ...wide, budget: { ...open, rank: 65 } };
    expect(() => chooseRank(fixed, predict)).toThrow(/up to rank 64 together, 65 were asked for/);
  });

  describe('with a system adapter of rank 4', () => {
    const system = { ranks: 4, pages: 1 };
    const stacked = (budget: Partial<Budget>): RouteInput => ({ ...inputOf(budget), system });
    it.each([
      [{}, 16, true, 'full'],
      [{ totalMs: 330 }, 16, true, 'fits'], // 300 + 2 · 15
      [{ totalMs: 329 }, 16, false, 'system-dropped'],
      [{ totalMs: 286 }, 16, false, 'system-dropped'],
      [{ totalMs: 285 }, 8, false, 'reduced'],
      [{ totalMs: 109 }, 0, false, 'infeasible'],
      [{ rank: 3, totalMs: 1 }, 3, true, 'fixed'],
    ] as const)('for %j: rank %d, stacked %s, %s', (budget, rank, hasSystem, reason) => {
      const plan = chooseRank(stacked(budget), predict);
      expect(plan).toMatchObject({ rank, hasSystem, reason, ranks: rank + (hasSystem ? 4 : 0) });
      expect(plan.prediction?.totalMs).toBe(100 + 10 * plan.ranks);
    });

    it.each([
      [{}, true, 'base'],
      [{ totalMs: 154 }, true, 'base'],
      [{ totalMs: 153 }, false, 'system-dropped'],
      [{ totalMs: 110 }, false, 'system-dropped'],
      [{ totalMs: 109 }, false, 'infeasible'],
    ] as const)('the base model for %j: stacked %s, %s', (budget, hasSystem, reason) => {
      const plan = chooseRank({ ...stacked(budget), adapter: null }, predict);
      expect(plan).toMatchObject({ rank: 0, rankMax: 0, hasSystem, reason });
    });

    it('drops it when a row has no pages left, before any rank of the others', () => {
      const full = { ...stacked({}), adapter: routedAdapter(256) };
      expect(chooseRank(full, predict)).toMatchObject({
        ...{ rank: 256, hasSystem: false, reason: 'system-dropped' },
      });
      const fixed = { ...full, budget: { ...open, rank: 248 } };
      expect(chooseRank(fixed, predict)).toMatchObject({ hasSystem: true, ranks: 252 });
    });
  });

  it('refuses a fixed rank that the adapter has not', () => {
    expect(() => chooseRank(inputOf({ rank: 17 }), predict)).toThrow(
      expect.objectContaining({ code: 'INVALID_BUDGET', param: 'latency.rank' }),
    );
  });
});
