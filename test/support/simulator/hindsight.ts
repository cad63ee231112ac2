// What could have been: ranks chosen knowing how everything went. Choosing best is a search over all requests at once (they
// slow each other down), so this is a local search that starts from the best of what was tried and can only improve: a lower
// bound of the true optimum, never less than any contestant. summary.ts, qualityAlone is an upper bound.
// A round sets a price of the machine's time and gives some requests the rank that is worth most at it among those with which
// they would have been in time, had nobody else changed; and keeps that in those windows of time where it paid: a request
// touches others that run near it in time only, because the machine's noise depends on the time and an idle machine has
// forgotten who was there.

import { meets } from '../../../src/router/budget.ts';
import { createRng, type Rng } from '../random.ts';
import { givenRanks, rankLadder } from './contestants.ts';
import type { Ended, Result, Scenario } from './scenario.ts';
import { createAdapters, fidelityAt } from './simulated-adapter.ts';
import { simulate } from './simulation.ts';
import { feasibleOf, qualities } from './summary.ts';
import type { Arrival } from './traffic.ts';

const windowMs = 4000;
/** Share of ranks that a round changes, falling from the first to the last round. */
const changes = { first: 0.5, last: 0.05 } as const;
/** Of the times, kept free for what others change; up to this much. */
const marginMax = 0.15;
/** Fidelity per ms, evenly over its logarithm: a rank-16 answer of 30 tokens takes 62 ms more than one without. */
const prices = { min: 1e-5, max: 1e-2 } as const;

interface Tried {
  readonly result: Result;
  readonly ranks: readonly number[];
  readonly qualities: readonly number[];
  readonly total: number;
}

export interface Hindsight {
  readonly result: Result;
  readonly ranks: readonly number[];
}

/** `starts`: results of this scenario. */
export async function searchHindsight(
  scenario: Scenario,
  starts: readonly Result[],
  rounds: number,
): Promise<Hindsight> {
  const feasible = feasibleOf(scenario);
  const judge = (result: Result, ranks: readonly number[]): Tried => {
    const each = qualities(scenario, feasible, result);
    return { result, ranks, qualities: each, total: each.reduce((a, b) => a + b, 0) };
  };
  const attempt = async (ranks: readonly number[]): Promise<Tried> =>
    judge(await simulate(scenario, givenRanks('hindsight', ranks)), ranks);
  const better = (a: Tried, b: Tried): Tried => (b.total > a.total ? b : a);

  const rng = createRng(scenario.seed);
  const tried = starts.map((result) =>
    judge(
      result,
      result.ended.map(({ rankMean }) => Math.round(rankMean)),
    ),
  );
  // What the engine changed on the way cannot be repeated: the search itself goes on from ranks that stay.
  let best: Tried | null = null;
  for (const { ranks } of tried) {
    const again = await attempt(ranks);
    best = best === null ? again : better(best, again);
  }
  if (best === null) throw new RangeError('a search from nothing');
  for (let round = 0; round < rounds; round++) {
    const price = prices.min * (prices.max / prices.min) ** rng.next();
    const share = changes.first * (changes.last / changes.first) ** (round / rounds);
    const changed = await attempt(change(scenario, best, { feasible, share, price, rng }));
    best = better(better(best, changed), await attempt(mergeWindows(scenario, best, changed)));
  }
  const { result, ranks } = tried.reduce(better, best);
  return { result: { ...result, contestant: 'hindsight' }, ranks };
}

interface Change {
  readonly feasible: readonly boolean[];
  readonly share: number;
  readonly price: number;
  readonly rng: Rng;
}

function change(
  scenario: Scenario,
  last: Tried,
  { feasible, share, price, rng }: Change,
): number[] {
  const adapterOf = createAdapters(scenario.adapters);
  return last.ranks.map((rank, i) => {
    const arrival = scenario.arrivals[i]!;
    const { adapter, budget } = arrival;
    const ended = last.result.ended[i]!;
    if (adapter === null || !feasible[i]!) return budget.rankMin; // It can only be in the way.
    if (rng.next() >= share || ended.outcome !== 'answered') return rank;
    const own = adapterOf(adapter);
    const margin = marginMax * rng.next();
    const worth = (one: number): number => {
      const more = ownMs(scenario, arrival, ended, one - rank);
      const isIn = meets(budget, {
        ttftMs: (1 + margin) * (ended.ttftMs + more.prefill),
        totalMs: (1 + margin) * (ended.totalMs + more.prefill + more.decode),
        perTokenMs:
          ((1 + margin) * (ended.totalMs - ended.ttftMs + more.decode)) /
          Math.max(1, ended.tokens - 1),
      });
      const { prefill, decode } = ownMs(scenario, arrival, ended, one);
      return (isIn ? fidelityAt(own, one) : 0) - price * (prefill + decode);
    };
    const ranks = [budget.rankMin, ...rankLadder].filter((one) => one <= own.rankMax);
    return ranks.reduce((best, one) => (worth(one) > worth(best) ? one : best));
  });
}

/** What so many ranks of its own take of the steps that it takes part in. */
function ownMs(
  { machine }: Scenario,
  { promptTokens }: Arrival,
  { tokens }: Ended,
  ranks: number,
): { readonly prefill: number; readonly decode: number } {
  const { prefillRank, decodeRank } = machine.cost;
  return { prefill: promptTokens * ranks * prefillRank, decode: tokens * ranks * decodeRank };
}

/** Per window of arrivals, the ranks of whichever did better in it. */
function mergeWindows({ arrivals }: Scenario, a: Tried, b: Tried): number[] {
  const gains = new Map<number, number>();
  const windowOf = (i: number): number => Math.floor(arrivals[i]!.atMs / windowMs);
  for (const [i, quality] of b.qualities.entries()) {
    const window = windowOf(i);
    gains.set(window, (gains.get(window) ?? 0) + quality - a.qualities[i]!);
  }
  return a.ranks.map((rank, i) => (gains.get(windowOf(i))! > 0 ? b.ranks[i]! : rank));
}
