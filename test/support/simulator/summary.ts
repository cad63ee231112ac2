// A result in numbers. A request counts as feasible when its smallest allowed rank would meet its budget alone on the
// machine, without noise and with its adapter in memory; shares are of the feasible ones.

import { quantile } from '../../../bench/measure.ts';
import { meets, wasMet } from '../../../src/router/budget.ts';
import { timesAlone } from './machine.ts';
import type { Ended, Result, Scenario } from './scenario.ts';
import { createAdapters, fidelityAt, type SimulatedAdapter } from './simulated-adapter.ts';
import type { Arrival } from './traffic.ts';

export interface Summary {
  readonly contestant: string;
  readonly requests: number;
  readonly feasible: number;
  readonly answered: number;
  readonly refused: Readonly<Record<string, number>>;
  /** Answered within the budget. */
  readonly metShare: number;
  /** Mean fidelity of the feasible, where one that is late or refused counts nothing. */
  readonly quality: number;
  /** Of those answered. */
  readonly rankMean: number;
  readonly fidelityMean: number;
  /** Answers in time per second of traffic. */
  readonly goodput: number;
  readonly ttftMsP50: number;
  readonly ttftMsP99: number;
  readonly totalMsP50: number;
  readonly totalMsP99: number;
  /** |predicted − total| ÷ total; null when nothing was predicted. */
  readonly errorMedian: number | null;
  readonly errorP90: number | null;
}

export function summarise(scenario: Scenario, result: Result): Summary {
  const { arrivals } = scenario;
  const { ended, contestant } = result;
  const feasible = feasibleOf(scenario);
  const answered = ended.filter(({ outcome }) => outcome === 'answered');
  const met = ended.map((one, i) => isMet(arrivals[i]!, one));
  const inTime = ended.filter((_, i) => feasible[i]! && met[i]!);
  const feasibleCount = count(feasible);
  const refused: Record<string, number> = {};
  for (const { outcome } of ended) {
    if (outcome !== 'answered') refused[outcome] = (refused[outcome] ?? 0) + 1;
  }
  const errors = answered.flatMap(({ plan, totalMs }) =>
    plan?.prediction ? [Math.abs(plan.prediction.totalMs - totalMs) / totalMs] : [],
  );
  return {
    contestant,
    requests: ended.length,
    feasible: feasibleCount,
    answered: answered.length,
    refused,
    metShare: inTime.length / feasibleCount,
    quality: sum(inTime, ({ fidelity }) => fidelity) / feasibleCount,
    rankMean: sum(answered, ({ rankMean }) => rankMean) / answered.length,
    fidelityMean: sum(answered, ({ fidelity }) => fidelity) / answered.length,
    goodput: (1000 * count(met)) / Math.max(1, arrivals.at(-1)!.atMs),
    ttftMsP50: quantile(
      answered.map(({ ttftMs }) => ttftMs),
      0.5,
    ),
    ttftMsP99: quantile(
      answered.map(({ ttftMs }) => ttftMs),
      0.99,
    ),
    totalMsP50: quantile(
      answered.map(({ totalMs }) => totalMs),
      0.5,
    ),
    totalMsP99: quantile(
      answered.map(({ totalMs }) => totalMs),
      0.99,
    ),
    errorMedian: errors.length === 0 ? null : quantile(errors, 0.5),
    errorP90: errors.length === 0 ? null : quantile(errors, 0.9),
  };
}

/** What the times say; a request without a budget is met by any answer. */
export function isMet({ budget }: Arrival, ended: Ended): boolean {
  return ended.outcome === 'answered' && (wasMet(budget, ended) ?? true);
}

/** Quality of each request, 0 for the infeasible. */
export function qualities(
  { arrivals }: Scenario,
  feasible: readonly boolean[],
  { ended }: Result,
): number[] {
  return ended.map((one, i) => (feasible[i]! && isMet(arrivals[i]!, one) ? one.fidelity : 0));
}

export function feasibleOf({ machine, arrivals }: Scenario): boolean[] {
  return arrivals.map((arrival) =>
    meets(arrival.budget, timesAlone(machine, arrival, arrival.budget.rankMin)),
  );
}

/** The quality that nobody can exceed but by lucky noise: each feasible request at the largest rank that meets its budget
 *  alone. */
export function qualityAlone({ machine, arrivals, adapters }: Scenario): number {
  const adapterOf = createAdapters(adapters);
  const best = arrivals.flatMap((arrival) => {
    const adapter = arrival.adapter === null ? null : adapterOf(arrival.adapter);
    const isIn = (rank: number): boolean =>
      meets(arrival.budget, timesAlone(machine, arrival, rank));
    if (!isIn(arrival.budget.rankMin)) return [];
    return [adapter === null ? 1 : fidelityAt(adapter, largestRank(adapter, isIn))];
  });
  return sum(best, (one) => one) / best.length;
}

function largestRank({ rankMax }: SimulatedAdapter, isIn: (rank: number) => boolean): number {
  let rank = rankMax;
  while (rank > 0 && !isIn(rank)) rank -= 1;
  return rank;
}

function sum<T>(items: readonly T[], figure: (item: T) => number): number {
  return items.reduce((total, item) => total + figure(item), 0);
}

function count(flags: readonly boolean[]): number {
  return flags.reduce((total, flag) => total + (flag ? 1 : 0), 0);
}
