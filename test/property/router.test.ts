import fc from 'fast-check';
import { expect, it } from 'vitest';
import type { StepReport } from '../../src/engine/messages.ts';
import { LatencyModel } from '../../src/router/latency-model.ts';
import type { Budget, Predict, Prediction, RouteInput } from '../../src/router/policy.ts';
import { candidateRanks, chooseRank, fits } from '../../src/router/rank-policy.ts';
import { routedAdapter } from '../support/routed-adapter.ts';

const report: fc.Arbitrary<StepReport> = fc.record({
  ms: fc.double({ min: 0.01, max: 5000, noNaN: true }),
  decodeRows: fc.nat(32),
  prefillTokens: fc.nat(512),
  decodeRanks: fc.nat(32 * 64),
  prefillRanks: fc.nat(512 * 64),
  kvCells: fc.nat(100_000),
});
const ms = fc.option(fc.double({ min: 0.1, max: 100_000, noNaN: true }));
const budget: fc.Arbitrary<Budget> = fc.record({
  totalMs: ms,
  ttftMs: ms,
  perTokenMs: ms,
  strict: fc.boolean(),
  rank: fc.constant(null),
  rankMin: fc.nat(20),
  priority: fc.nat(9),
});
const curve: fc.Arbitrary<number[]> = fc
  .array(fc.integer({ min: 0, max: 5 }), { minLength: 1, maxLength: 64 })
  .map((shares) => {
    const sum = shares.reduce((a, b) => a + b, 0) || 1;
    let kept = 0;
    return shares.map((share) => {
      kept += share;
      return kept / sum;
    });
  });
const input: fc.Arbitrary<RouteInput> = fc
  .record({
    budget,
    promptTokens: fc.integer({ min: 1, max: 4000 }),
    tokensMax: fc.integer({ min: 1, max: 4000 }),
    curve,
    load: fc.record({
      decodeRows: fc.nat(32),
      decodeRanks: fc.nat(2048),
      waiting: fc.nat(50),
      waitingPromptTokens: fc.nat(50_000),
      kvCells: fc.nat(100_000),
    }),
  })
  .map(({ curve: rankCurve, ...rest }) => ({
    ...rest,
    adapter: routedAdapter(rankCurve.length, rankCurve),
    system: null,
  }));
/** What may lie under it. */
const system = fc.record({ ranks: fc.integer({ min: 1, max: 64 }), pages: fc.constant(1) });

function modelOf(reports: readonly StepReport[]): Predict {
  const model = new LatencyModel({
    identity: { baseHash: '', backend: '', threads: 1 },
    prefillTokensMax: 128,
    rowsMax: 32,
  });
  for (const one of reports) model.observe(one);
  return (route, rank) => model.predict(route, rank);
}
const trained = fc.array(report, { minLength: 8, maxLength: 40 }).map(modelOf);

it('a prediction is finite, positive and never smaller for a larger rank, whatever was observed', () => {
  fc.assert(
    fc.property(trained, input, (predict, route) => {
      let before: Prediction | null = null;
      for (const rank of candidateRanks(0, route.adapter!.rankMax)) {
        const now = predict(route, rank)!;
        for (const value of Object.values(now)) expect(value).toSatisfy(Number.isFinite);
        if (before !== null) {
          expect(now.totalMs).toBeGreaterThanOrEqual(before.totalMs);
          expect(now.ttftMs).toBeGreaterThanOrEqual(before.ttftMs);
        }
        expect(now.totalMs).toBeGreaterThanOrEqual(now.ttftMs);
        before = now;
      }
    }),
  );
});

const factor = fc.double({ min: 0.01, max: 1, noNaN: true });
const tightened = (value: number | null, by: number): number | null =>
  value === null ? null : value * by;

it('a tighter budget never gets a larger rank', () => {
  fc.assert(
    fc.property(trained, input, fc.tuple(factor, factor, factor), (predict, route, by) => {
      const tighter: RouteInput = {
        ...route,
        budget: {
          ...route.budget,
          totalMs: tightened(route.budget.totalMs, by[0]),
          ttftMs: tightened(route.budget.ttftMs, by[1]),
          perTokenMs: tightened(route.budget.perTokenMs, by[2]),
        },
      };
      const loose = chooseRank(route, predict).rank;
      expect(chooseRank(tighter, predict).rank).toBeLessThanOrEqual(loose);
    }),
    { numRuns: 500 },
  );
});

it('a system adapter is used where it fits beside every rank, and never costs one', () => {
  fc.assert(
    fc.property(trained, input, system, (predict, route, under) => {
      const without = chooseRank(route, predict);
      const stacked = { ...route, system: under };
      const plan = chooseRank(stacked, predict);
      const { rankMax } = route.adapter!;
      const fitsBoth = fits(route.budget, predict(route, rankMax + under.ranks)!);
      expect(plan.rank).toBe(without.rank);
      expect(plan.hasSystem).toBe(fitsBoth);
      expect(plan.ranks).toBe(plan.rank + (fitsBoth ? under.ranks : 0));
      const isWhole = plan.rank === rankMax && without.reason !== 'infeasible';
      expect(plan.reason).toBe(isWhole && !fitsBoth ? 'system-dropped' : without.reason);
    }),
    { numRuns: 500 },
  );
});

it('the choice equals a brute-force search over every candidate', () => {
  fc.assert(
    fc.property(trained, input, (predict, route) => {
      const { rankCurve, rankMax } = route.adapter!;
      const kept = (rank: number): number => (rank === 0 ? 0 : rankCurve[rank - 1]!);
      const candidates = candidateRanks(route.budget.rankMin, rankMax);
      const fitting = candidates.filter((rank) => fits(route.budget, predict(route, rank)!));
      const largest = fitting.at(-1);
      const plan = chooseRank(route, predict);
      const { totalMs, ttftMs, perTokenMs } = route.budget;
      if (totalMs === null && ttftMs === null && perTokenMs === null) {
        expect(plan).toMatchObject({ rank: rankMax, reason: 'full' });
      } else if (largest === undefined) {
        expect(plan).toMatchObject({ rank: candidates[0], reason: 'infeasible' });
      } else if (largest === rankMax) {
        expect(plan).toMatchObject({ rank: rankMax, reason: 'fits' });
      } else {
        expect(plan.reason).toBe('reduced');
        const equal = candidates.filter((rank) => rank <= largest && kept(rank) === kept(largest));
        expect(plan.rank).toBe(Math.min(...equal));
      }
    }),
    { numRuns: 500 },
  );
});
