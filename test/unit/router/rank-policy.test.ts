import { describe, expect, it } from 'vitest';
import type { Budget, Prediction, RouteInput } from '../../../src/router/policy.ts';
import { candidateRanks, chooseRank } from '../../../src/router/rank-policy.ts';

const idle = { decodeRows: 0, decodeRanks: 0, waiting: 0, waitingPromptTokens: 0, kvCells: 0 };
const open: Budget = {
  totalMs: null,
  ttftMs: null,
  perTokenMs: null,
  strict: false,
  rank: null,
  rankMin: 0,
};

function inputOf(budget: Partial<Budget>, rankMax = 16, rankCurve?: number[]): RouteInput {
  return {
    budget: { ...open, ...budget },
    promptTokens: 10,
    tokensMax: 100,
    adapter: {
      name: 'support',
      generation: `sha256:${'0'.repeat(64)}`,
      rankMax,
      rankCurve: rankCurve ?? Array.from({ length: rankMax }, (_, i) => (i + 1) / rankMax),
    },
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

  it('refuses a fixed rank that the adapter has not', () => {
    expect(() => chooseRank(inputOf({ rank: 17 }), predict)).toThrow(
      expect.objectContaining({ code: 'INVALID_BUDGET', param: 'latency.rank' }),
    );
  });
});
