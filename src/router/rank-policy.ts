// The ranks that a request may have, and three choices among them: the largest whose prediction, mean + 2σ, fits every
// stated budget (design.md section 8, step 3); the caller's; the operator's. Candidates are the powers of two, the smallest
// allowed rank and the adapter's own R. Parts of a blend have one rank, each cut to its own R; the system adapter goes
// before any of theirs. Pure.

import { pageRanks, rankMaxLimit } from '../adapters/adapter.ts';
import { GatewayError } from '../errors.ts';
import { meets, noTime, statesTime } from './budget.ts';
import type { Budget, Plan, Predict, Prediction, RouteInput } from './policy.ts';

export const guardSigmas = 2;

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
export function energy(curve: readonly number[], rank: number): number {
  return rank === 0 ? 0 : (curve[rank - 1] ?? 1);
}

/** ‖Δ‖_F of going from rank k to rank n ≥ k, as a share of the whole adapter's: the root of the energy between them
 *  (algorithms.md section 11, its guardrail). */
export function perturbation(curve: readonly number[], k: number, n: number): number {
  return Math.sqrt(Math.max(0, energy(curve, n) - energy(curve, k)));
}

/** Pages that one row can read (model/step-inputs.ts). */
const rowPagesMax = rankMaxLimit / pageRanks;

type Planned = Omit<Plan, 'reason'>;

function pagesAt({ adapter, system }: RouteInput, rank: number, hasSystem: boolean): number {
  return (adapter?.pages[rank - 1] ?? 0) + (hasSystem ? (system?.pages ?? 0) : 0);
}

/** Less than the largest for blends of large adapters only. */
function largestRankWithRoom(input: RouteInput): number {
  let rank = input.adapter?.rankMax ?? 0;
  while (pagesAt(input, rank, false) > rowPagesMax) rank -= 1;
  return rank;
}

/** What a row would have at a rank, with or without the system adapter. */
function planAt(input: RouteInput, predict: Predict, rank: number, hasSystem: boolean): Planned {
  const { adapter, system } = input;
  const ranks = (adapter?.ranks[rank - 1] ?? 0) + (hasSystem ? (system?.ranks ?? 0) : 0);
  const rankMax = adapter?.rankMax ?? 0;
  return { rank, rankMax, hasSystem, ranks, prediction: predict(input, ranks) };
}

function hasRoom(input: RouteInput, rank: number): boolean {
  return input.system !== null && pagesAt(input, rank, true) <= rowPagesMax;
}

/** The largest rank that fits. */
export function chooseRank(input: RouteInput, predict: Predict): Plan {
  const { adapter, budget, system } = input;
  const top = largestRankWithRoom(input);
  if (adapter !== null && budget.rank !== null) {
    checkFixed(budget.rank, top, adapter);
    const { rank } = budget;
    return { ...planAt(input, predict, rank, hasRoom(input, rank)), reason: 'fixed' };
  }
  for (const hasSystem of hasRoom(input, top) ? [true, false] : [false]) {
    const whole = planAt(input, predict, top, hasSystem);
    if (!mayFit(budget, whole)) continue;
    if (top < whole.rankMax) return { ...whole, reason: 'reduced' };
    if (system !== null && !hasSystem) return { ...whole, reason: 'system-dropped' };
    if (adapter === null) return { ...whole, reason: 'base' };
    const isFree = whole.prediction === null || !statesTime(budget);
    return { ...whole, reason: isFree ? 'full' : 'fits' };
  }
  return reduce(input, predict, top);
}

/** The operator's rank: at least what the request asks, at most what the adapter has. A rank that the caller fixed, and the
 *  base model's answer, are as ever. */
export function planConfigured(input: RouteInput, predict: Predict, wanted: number): Plan {
  const { adapter, budget } = input;
  if (adapter === null || budget.rank !== null) return chooseRank(input, predict);
  const rank = Math.min(largestRankWithRoom(input), Math.max(budget.rankMin, wanted));
  for (const hasSystem of hasRoom(input, rank) ? [true, false] : [false]) {
    const plan = planAt(input, predict, rank, hasSystem);
    if (mayFit(budget, plan)) return { ...plan, reason: 'configured' };
  }
  return { ...planAt(input, predict, rank, false), reason: 'infeasible' };
}

function checkFixed(rank: number, top: number, adapter: NonNullable<RouteInput['adapter']>): void {
  if (rank <= top) return;
  const { name, rankMax } = adapter;
  const has = top < rankMax ? `fit up to rank ${top} together` : `has ${rankMax} ranks`;
  throw new GatewayError('INVALID_BUDGET', `latency.rank: ${name} ${has}, ${rank} were asked for`, {
    param: 'latency.rank',
  });
}

/** Nothing learned yet means nothing known against it, unless the time is over before it began. */
function mayFit(budget: Budget, { prediction }: Planned): boolean {
  return prediction === null ? meets(budget, noTime) : fits(budget, prediction);
}

/** Without the system adapter, and with less than `top` ranks when that is what fits. */
function reduce(input: RouteInput, predict: Predict, top: number): Plan {
  const { adapter, budget } = input;
  const ladder = candidateRanks(budget.rankMin, top);
  const curve = adapter?.rankCurve ?? [];
  // Downwards, so that the first that fits is the largest. A smaller rank is never slower, even when less is known of it
  // and its σ is larger: it needs no check of its own.
  for (const largest of ladder.toReversed().slice(1)) {
    if (!mayFit(budget, planAt(input, predict, largest, false))) continue;
    const kept = energy(curve, largest);
    const rank = ladder.find((candidate) => energy(curve, candidate) >= kept) ?? largest;
    return { ...planAt(input, predict, rank, false), reason: 'reduced' };
  }
  return { ...planAt(input, predict, ladder[0]!, false), reason: 'infeasible' };
}

/** Largest ‖Δ‖ between the largest rank that fits and one that is taken instead, as a share of the adapter's (guess). */
const perturbationMax = 0.5;
const explored: readonly Plan['reason'][] = ['fits', 'reduced', 'system-dropped'];

/** What a policy that learns may choose from: first the largest rank that fits, then those below it that lose little by the
 *  rank curve. The first alone when the request has no budget or nothing is known: nobody's answer is an experiment then. */
export function safePlans(input: RouteInput, predict: Predict): readonly [Plan, ...Plan[]] {
  const largest = chooseRank(input, predict);
  const { adapter, budget } = input;
  if (adapter === null || largest.prediction === null) return [largest];
  if (!explored.includes(largest.reason) || !statesTime(budget)) return [largest];
  const smaller = candidateRanks(budget.rankMin, largest.rank)
    .slice(0, -1)
    .filter((rank) => perturbation(adapter.rankCurve, rank, largest.rank) <= perturbationMax)
    .map((rank): Plan => {
      return { ...planAt(input, predict, rank, largest.hasSystem), reason: 'learned' };
    });
  return [largest, ...smaller];
}

/** How many σ lie between a plan's prediction and the tightest of what is stated; Infinity: nothing is. */
export function slackOf({ budget }: RouteInput, { prediction }: Plan): number {
  if (prediction === null) return Number.POSITIVE_INFINITY;
  const slack = (limit: number | null, mean: number, sigma: number): number =>
    limit === null ? Number.POSITIVE_INFINITY : (limit - mean) / Math.max(sigma, 1e-9);
  return Math.min(
    slack(budget.totalMs, prediction.totalMs, prediction.sigmaMs),
    slack(budget.ttftMs, prediction.ttftMs, prediction.ttftSigmaMs),
    slack(budget.perTokenMs, prediction.perTokenMs, prediction.perTokenSigmaMs),
  );
}
