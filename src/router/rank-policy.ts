// Chooses the rank: the largest one whose prediction, mean + 2σ, fits every stated budget (design.md section 8, step 3,
// without the bandit). Candidates are the powers of two, the smallest allowed rank and the adapter's own R. Pure.

import { GatewayError } from '../errors.ts';
import type { Budget, Plan, PlanReason, Predict, Prediction, RouteInput } from './policy.ts';

const guardSigmas = 2;

function hasDeadline(budget: Budget): boolean {
  return budget.totalMs !== null || budget.ttftMs !== null || budget.perTokenMs !== null;
}

export function fits(budget: Budget, prediction: Prediction): boolean {
  const { totalMs, sigmaMs, ttftMs, ttftSigmaMs, perTokenMs, perTokenSigmaMs } = prediction;
  return (
    (budget.totalMs === null || totalMs + guardSigmas * sigmaMs <= budget.totalMs) &&
    (budget.ttftMs === null || ttftMs + guardSigmas * ttftSigmaMs <= budget.ttftMs) &&
    (budget.perTokenMs === null || perTokenMs + guardSigmas * perTokenSigmaMs <= budget.perTokenMs)
  );
}

/** Ascending, from the smallest allowed rank (at most R) to R. Rank 0 is the base model's answer: a caller who would
 *  rather be late than do without the adapter says `min_rank: 1`. */
export function candidateRanks(rankMin: number, rankMax: number): number[] {
  const first = Math.min(rankMin, rankMax);
  const ladder = [first];
  for (let rank = 1; rank < rankMax; rank *= 2) if (rank > first) ladder.push(rank);
  if (rankMax > first) ladder.push(rankMax);
  return ladder;
}

function makePlan(
  rank: number,
  rankMax: number,
  reason: PlanReason,
  prediction: Prediction | null,
): Plan {
  return {
    rank,
    rankMax,
    reason,
    predictedMs: prediction?.totalMs ?? null,
    predictedTtftMs: prediction?.ttftMs ?? null,
    sigmaMs: prediction?.sigmaMs ?? null,
  };
}

/** Energy kept at rank k; rank 0 keeps none. */
function energy(curve: readonly number[], rank: number): number {
  return rank === 0 ? 0 : (curve[rank - 1] ?? 1);
}

export function chooseRank(input: RouteInput, predict: Predict): Plan {
  const { adapter, budget } = input;
  if (adapter === null) {
    const prediction = predict(input, 0);
    const isLate = prediction !== null && !fits(budget, prediction);
    return makePlan(0, 0, isLate ? 'infeasible' : 'base', prediction);
  }
  const { rankMax, rankCurve } = adapter;
  if (budget.rank !== null) {
    if (budget.rank > rankMax) {
      throw new GatewayError(
        'INVALID_BUDGET',
        `latency.rank: ${adapter.name} has ${rankMax} ranks, ${budget.rank} were asked for`,
        { param: 'latency.rank' },
      );
    }
    return makePlan(budget.rank, rankMax, 'fixed', predict(input, budget.rank));
  }
  const whole = predict(input, rankMax);
  // Nothing learned yet means nothing known against any rank.
  if (whole === null || !hasDeadline(budget)) return makePlan(rankMax, rankMax, 'full', whole);
  if (fits(budget, whole)) return makePlan(rankMax, rankMax, 'fits', whole);
  const ladder = candidateRanks(budget.rankMin, rankMax);
  // Downwards, so that the first that fits is the largest. A smaller rank is never slower, even when less is known of it
  // and its σ is larger: it needs no check of its own.
  for (const largest of ladder.toReversed().slice(1)) {
    const prediction = predict(input, largest);
    if (prediction === null || !fits(budget, prediction)) continue;
    const kept = energy(rankCurve, largest);
    const rank = ladder.find((candidate) => energy(rankCurve, candidate) >= kept) ?? largest;
    return makePlan(rank, rankMax, 'reduced', predict(input, rank));
  }
  const smallest = ladder[0]!;
  return makePlan(smallest, rankMax, 'infeasible', predict(input, smallest));
}
