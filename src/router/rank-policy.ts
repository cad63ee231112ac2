// Chooses the rank: the largest one whose prediction, mean + 2σ, fits every stated budget (design.md section 8, step 3,
// without the bandit). Candidates are the powers of two, the smallest allowed rank and the adapter's own R. Pure.

import { GatewayError } from '../errors.ts';
import { meets, statesTime } from './budget.ts';
import type { Budget, Plan, Predict, Prediction, RouteInput } from './policy.ts';

const guardSigmas = 2;

export function fits(
  budget: Budget,
  { totalMs, ttftMs, perTokenMs, ...sigmas }: Prediction,
): boolean {
  return meets(budget, {
    totalMs: totalMs + guardSigmas * sigmas.sigmaMs,
    ttftMs: ttftMs + guardSigmas * sigmas.ttftSigmaMs,
    perTokenMs: perTokenMs + guardSigmas * sigmas.perTokenSigmaMs,
  });
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

/** Energy kept at rank k; rank 0 keeps none. */
function energy(curve: readonly number[], rank: number): number {
  return rank === 0 ? 0 : (curve[rank - 1] ?? 1);
}

export function chooseRank(input: RouteInput, predict: Predict): Plan {
  const { adapter, budget } = input;
  if (adapter === null) {
    const prediction = predict(input, 0);
    const isLate = prediction !== null && !fits(budget, prediction);
    return { rank: 0, rankMax: 0, reason: isLate ? 'infeasible' : 'base', prediction };
  }
  const { rankMax, rankCurve } = adapter;
  const planAt = (rank: number) => ({ rank, rankMax, prediction: predict(input, rank) });
  if (budget.rank !== null) {
    if (budget.rank > rankMax) {
      throw new GatewayError(
        'INVALID_BUDGET',
        `latency.rank: ${adapter.name} has ${rankMax} ranks, ${budget.rank} were asked for`,
        { param: 'latency.rank' },
      );
    }
    return { ...planAt(budget.rank), reason: 'fixed' };
  }
  const whole = planAt(rankMax);
  // Nothing learned yet means nothing known against any rank.
  if (whole.prediction === null || !statesTime(budget)) return { ...whole, reason: 'full' };
  if (fits(budget, whole.prediction)) return { ...whole, reason: 'fits' };
  const ladder = candidateRanks(budget.rankMin, rankMax);
  // Downwards, so that the first that fits is the largest. A smaller rank is never slower, even when less is known of it
  // and its σ is larger: it needs no check of its own.
  for (const largest of ladder.toReversed().slice(1)) {
    const prediction = predict(input, largest);
    if (prediction === null || !fits(budget, prediction)) continue;
    const kept = energy(rankCurve, largest);
    const rank = ladder.find((candidate) => energy(rankCurve, candidate) >= kept) ?? largest;
    return { ...planAt(rank), reason: 'reduced' };
  }
  return { ...planAt(ladder[0]!), reason: 'infeasible' };
}
