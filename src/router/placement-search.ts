// A good placement, better the longer one looks: adaptive large neighbourhood search (Ropke & Pisinger 2006; Balans,
// algorithms.md section 31). An iteration takes a few copies away and puts them back; an ε-greedy bandit learns which way of
// taking and of putting pays. Starts from what is running; accepts what is little worse than the best (record-to-record
// travel, Dueck 1993), which needs no end to be known: whoever has waited long enough stops. Pure and seeded.

import { createRandom, type Random } from '../adapters/families/seeded-random.ts';
import { Assignment, type Placement, type PlacementProblem } from './placement.ts';

interface Copy {
  readonly a: number;
  readonly r: number;
}

type Destroy = (state: Assignment, count: number, random: Random) => readonly Copy[];
/** The order in which adapters without a place are given one: the next of them. */
type Next = (state: Assignment, waiting: readonly number[], random: Random) => number;

/** How much worse than the best, of its peak, may be gone on from. */
const slack = 0.01;
const copiesMin = 2;
const copiesMax = 12;
const explored = 0.5;
/** Balans' scores: a new best, better than the last, accepted, rejected. */
const scores = { best: 4, better: 3, accepted: 2, rejected: 1 } as const;
/** Prefers the emptier of two replicas that cost the same. */
const tieWeight = 1e-4;

const destroyers: Readonly<Record<string, Destroy>> = {
  random: (state, count, random) => some(copiesOf(state), count, random),
  /** Half from the busiest replica. */
  peak(state, count, random) {
    const r = busiest(state);
    const all = copiesOf(state);
    const there = some(
      all.filter((copy) => copy.r === r),
      Math.ceil(count / 2),
      random,
    );
    const others = all.filter((copy) => copy.r !== r);
    return [...there, ...some(others, count - there.length, random)];
  },
  /** Between the busiest replica and one other. */
  pair(state, count, random) {
    const r = busiest(state);
    const other = (r + 1 + random.below(Math.max(1, state.replicaCount - 1))) % state.replicaCount;
    const both = copiesOf(state).filter((copy) => copy.r === r || copy.r === other);
    return some(both, count, random);
  },
  /** What is alike in load, or shares the same: these change places. */
  related(state, count, random) {
    const all = copiesOf(state);
    if (all.length === 0) return [];
    const { a } = all[random.below(all.length)]!;
    const far = (copy: Copy): number =>
      (state.needs(a) >= 0 && state.needs(copy.a) === state.needs(a) ? 0 : 1) *
      Math.abs(state.share(copy.a) - state.share(a));
    return all.sort((x, y) => far(x) - far(y) || x.a - y.a || x.r - y.r).slice(0, count);
  },
  /** What is not where it runs now: maybe it need not have moved. */
  moved(state, count, random) {
    const all = copiesOf(state);
    const moved = all.filter(({ a, r }) => !state.isThere(a, r));
    return some(moved.length > 0 ? moved : all, count, random);
  },
};

const orders: Readonly<Record<string, Next>> = {
  largest: (state, waiting) => argmax(waiting, (a) => state.share(a)),
  shuffled: (_, waiting, random) => random.below(waiting.length),
  /** Whose second-best place is the most worse. */
  regret: (state, waiting) =>
    argmax(waiting, (a) => {
      const prices = pricesOf(state, a).filter(Number.isFinite);
      const [first, second] = prices.sort((x, y) => x - y);
      return first === undefined ? -1 : (second ?? Number.POSITIVE_INFINITY) - first;
    }),
};

export interface Arm {
  readonly destroy: keyof typeof destroyers;
  readonly order: keyof typeof orders;
}

export const arms: readonly Arm[] = Object.keys(destroyers).flatMap((destroy) =>
  Object.keys(orders).map((order) => ({ destroy, order })),
);

/** ε-greedy over the mean score of each arm. */
class OperatorBandit {
  readonly #arms: readonly Arm[];
  readonly #sums: number[];
  readonly #counts: number[];

  constructor(arms: readonly Arm[]) {
    this.#arms = arms;
    this.#sums = arms.map(() => 0);
    this.#counts = arms.map(() => 0);
  }

  pick(random: Random): number {
    if (random.uniform() < explored) return random.below(this.#arms.length);
    const mean = (i: number): number =>
      this.#counts[i] === 0 ? Number.POSITIVE_INFINITY : this.#sums[i]! / this.#counts[i]!;
    return argmax(
      this.#arms.map((_, i) => i),
      mean,
    );
  }

  learn(arm: number, score: number): void {
    this.#sums[arm]! += score;
    this.#counts[arm]! += 1;
  }
}

export interface SearchOptions {
  readonly seed: number;
  /** All of them when absent. */
  readonly arms?: readonly Arm[];
}

/** The best placement so far, first what is running with the rest filled in, then once an iteration. Never ends by itself.
 *  Its cost never rises, and its pages always fit. */
export function* searchPlacement(
  problem: PlacementProblem,
  { seed, arms: allowed = arms }: SearchOptions,
): Generator<Placement, never> {
  const random = createRandom(BigInt(seed));
  const bandit = new OperatorBandit(allowed);
  const state = new Assignment(problem);
  settle(state, random);
  let best = state.view();
  let cost = best.cost;
  yield best;
  for (;;) {
    const index = bandit.pick(random);
    const { destroy, order } = allowed[index]!;
    const count = copiesMin + random.below(copiesMax - copiesMin + 1);
    const taken = destroyers[destroy]!(state, count, random);
    for (const { a, r } of taken) state.remove(a, r);
    const placed = repair(state, orders[order]!, random);
    const found = state.cost;
    if (found < best.cost - 1e-12) {
      best = state.view();
      bandit.learn(index, scores.best);
      cost = found;
    } else if (found <= best.cost + slack * best.peak) {
      bandit.learn(index, found < cost ? scores.better : scores.accepted);
      cost = found;
    } else {
      bandit.learn(index, scores.rejected);
      for (const { a, r } of placed) state.remove(a, r);
      for (const { a, r } of taken) state.place(a, r);
    }
    yield best;
  }
}

/** The best placement after so many iterations. */
export function findPlacement(
  problem: PlacementProblem,
  { iterations, ...options }: SearchOptions & { readonly iterations: number },
): Placement {
  const search = searchPlacement(problem, options);
  let best = search.next().value;
  for (let i = 0; i < iterations; i++) best = search.next().value;
  return best;
}

/** What is running, as far as it fits and is wanted, the largest loads first; then the rest. */
function settle(state: Assignment, random: Random): void {
  const there = pairs(state, (a, r) => state.isThere(a, r));
  there.sort((x, y) => state.share(y.a) - state.share(x.a) || x.a - y.a || x.r - y.r);
  for (const { a, r } of there) if (state.missing(a) > 0 && state.fits(a, r)) state.place(a, r);
  repair(state, orders.largest!, random);
}

/** Gives every missing copy the place that costs least now. What fits nowhere stays missing. */
function repair(state: Assignment, next: Next, random: Random): readonly Copy[] {
  const waiting: number[] = [];
  for (let a = 0; a < state.adapterCount; a++) {
    for (let copy = state.missing(a); copy > 0; copy--) waiting.push(a);
  }
  const placed: Copy[] = [];
  while (waiting.length > 0) {
    const [a] = waiting.splice(next(state, waiting, random), 1) as [number];
    const prices = pricesOf(state, a);
    const r = argmax(prices, (price) => -price);
    if (r < 0 || prices[r] === Number.POSITIVE_INFINITY) continue;
    state.place(a, r);
    placed.push({ a, r });
  }
  return placed;
}

/** What a copy would cost on each replica; infinite where it does not fit. */
function pricesOf(state: Assignment, a: number): number[] {
  const { peak } = state;
  return Array.from({ length: state.replicaCount }, (_, r) => {
    if (!state.fits(a, r)) return Number.POSITIVE_INFINITY;
    const busy = state.utilisation(r, a);
    const { moveCost } = state.problem;
    return Math.max(peak, busy) + moveCost * state.pagesToLoad(a, r) + tieWeight * busy;
  });
}

/** Where `is` holds, of all pairs of an adapter and a replica. */
function pairs(state: Assignment, is: (a: number, r: number) => boolean): Copy[] {
  const found: Copy[] = [];
  for (let a = 0; a < state.adapterCount; a++) {
    for (let r = 0; r < state.replicaCount; r++) if (is(a, r)) found.push({ a, r });
  }
  return found;
}

const copiesOf = (state: Assignment): Copy[] => pairs(state, (a, r) => state.hosts(a, r));

function busiest(state: Assignment): number {
  return argmax(
    Array.from({ length: state.replicaCount }, (_, r) => state.utilisation(r)),
    (busy) => busy,
  );
}

/** The first of the largest; -1 of nothing. */
function argmax<T>(items: readonly T[], value: (item: T) => number): number {
  let best = -1;
  let most = Number.NEGATIVE_INFINITY;
  for (const [i, item] of items.entries()) {
    const one = value(item);
    if (best >= 0 && !(one > most)) continue;
    best = i;
    most = one;
  }
  return best;
}

/** `count` of them, each as likely; fewer when there are fewer. */
function some<T>(items: readonly T[], count: number, random: Random): T[] {
  const rest = [...items];
  for (let i = 0; i < Math.min(count, rest.length); i++) {
    const j = i + random.below(rest.length - i);
    [rest[i], rest[j]] = [rest[j]!, rest[i]!];
  }
  return rest.slice(0, count);
}
