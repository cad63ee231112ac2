// Chooses the rank: the largest one whose prediction, mean + 2σ, fits every stated budget (design.md section 8, step 3,
// without the bandit). Candidates are the powers of two, the smallest allowed rank and the adapter's own R. Parts of a
// blend have one rank, each cut to its own R; the system adapter goes before any of theirs. Pure.

import { pageRanks, rankMaxLimit } from '../adapters/adapter.ts';
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

/** Pages that one row can read (model/step-inputs.ts). */
const rowPagesMax = rankMaxLimit / pageRanks;

type Planned = Omit<Plan, 'reason'>;
/** What a row would have at a rank, with or without the system adapter. */
type PlanAt = (rank: number, hasSystem: boolean) => Planned;

function pagesAt({ adapter, system }: RouteInput, rank: number, hasSystem: boolean): number {
  return (adapter?.pages[rank - 1] ?? 0) + (hasSystem ? (system?.pages ?? 0) : 0);
}

/** Less than the largest for blends of large adapters only. */
function largestRankWithRoom(input: RouteInput): number {
  let rank = input.adapter?.rankMax ?? 0;
  while (pagesAt(input, rank, false) > rowPagesMax) rank -= 1;
  return rank;
}

export function chooseRank(input: RouteInput, predict: Predict): Plan {
  const { adapter, budget, system } = input;
  const rankMax = adapter?.rankMax ?? 0;
  const top = largestRankWithRoom(input);
  const hasRoom = (rank: number): boolean =>
    system !== null && pagesAt(input, rank, true) <= rowPagesMax;
  const planAt: PlanAt = (rank, hasSystem) => {
    const ranks = (adapter?.ranks[rank - 1] ?? 0) + (hasSystem ? (system?.ranks ?? 0) : 0);
    return { rank, rankMax, hasSystem, ranks, prediction: predict(input, ranks) };
  };
  if (adapter !== null && budget.rank !== null) {
    checkFixed(budget.rank, top, adapter);
    return { ...planAt(budget.rank, hasRoom(budget.rank)), reason: 'fixed' };
  }
  for (const hasSystem of hasRoom(top) ? [true, false] : [false]) {
    const whole = planAt(top, hasSystem);
    if (!mayFit(budget, whole)) continue;
    if (top < rankMax) return { ...whole, reason: 'reduced' };
    if (system !== null && !hasSystem) return { ...whole, reason: 'system-dropped' };
    if (adapter === null) return { ...whole, reason: 'base' };
    const isFree = whole.prediction === null || !statesTime(budget);
    return { ...whole, reason: isFree ? 'full' : 'fits' };
  }
  return reduce(input, top, planAt);
}

function checkFixed(rank: number, top: number, adapter: NonNullable<RouteInput['adapter']>): void {
  if (rank <= top) return;
  const { name, rankMax } = adapter;
  const has = top < rankMax ? `fit up to rank ${top} together` : `has ${rankMax} ranks`;
  throw new GatewayError('INVALID_BUDGET', `latency.rank: ${name} ${has}, ${rank} were asked for`, {
    param: 'latency.rank',
  });
}

/** Nothing learned yet means nothing known against it. */
function mayFit(budget: Budget, { prediction }: Planned): boolean {
  return prediction === null || fits(budget, prediction);
}

/** Without the system adapter, and with less than `top` ranks when that is what fits. */
function reduce({ adapter, budget }: RouteInput, top: number, planAt: PlanAt): Plan {
  const ladder = candidateRanks(budget.rankMin, top);
  const curve = adapter?.rankCurve ?? [];
  // Downwards, so that the first that fits is the largest. A smaller rank is never slower, even when less is known of it
  // and its σ is larger: it needs no check of its own.
  for (const largest of ladder.toReversed().slice(1)) {
    if (!mayFit(budget, planAt(largest, false))) continue;
    const kept = energy(curve, largest);
    const rank = ladder.find((candidate) => energy(curve, candidate) >= kept) ?? largest;
    return { ...planAt(rank, false), reason: 'reduced' };
  }
  return { ...planAt(ladder[0]!, false), reason: 'infeasible' };
}
