// Requests as they arrive: a Poisson process, steady, in bursts or over a day, of adapters by Zipf's law and budgets by
// tier. Same settings, same requests. By thinning (Lewis and Shedler 1979): candidates come at the highest rate of all and
// stay with the probability of the rate of their moment.

import type { Budget } from '../../../src/router/policy.ts';
import { createRng, type Rng } from '../random.ts';
import { numberTokens } from './simulated-stepper.ts';

export interface Arrival {
  readonly atMs: number;
  /** null: the base model. */
  readonly adapter: string | null;
  readonly tenant: string;
  readonly tier: string;
  readonly promptTokens: number;
  readonly tokensMax: number;
  /** What the answer will have, which nobody knows before; the end token not counted. */
  readonly answerTokens: number;
  readonly budget: Budget;
}

export interface TrafficTier {
  readonly name: string;
  readonly share: number;
  /** Total budget: so much, and so much per token of the request's limit; each evenly over its logarithm. null: none. */
  readonly firstMs: Span | null;
  readonly perTokenMs: Span;
  readonly strict: boolean;
  readonly priority: number;
}

export type Span = readonly [min: number, max: number];

export interface Traffic {
  readonly seed: number;
  readonly seconds: number;
  readonly perSecond: number;
  /** bursts: 2 s at four times the rate and 8 s at a quarter of it, on average. diurnal: one period of a sine. */
  readonly shape: 'steady' | 'bursts' | 'diurnal';
  readonly adapters: number;
  /** Adapter i is asked for in proportion to i^-zipf. */
  readonly zipf: number;
  readonly tenants: number;
  readonly tiers: readonly TrafficTier[];
  /** Evenly over its logarithm. */
  readonly promptTokens: Span;
  /** Limits that callers set, one as likely as another. */
  readonly tokensMax: readonly number[];
  /** Share of answers that end before their limit, anywhere. */
  readonly endsEarly: number;
}

const instant = { name: 'instant', share: 0.3, strict: false, priority: 8 } as const;
const balanced = { name: 'balanced', share: 0.4, strict: false, priority: 5 } as const;
const quality = { name: 'quality', share: 0.3, strict: false, priority: 2 } as const;

/** For smallMachine, where a row alone takes 5.5 to 6.4 ms a token, eight rows together 16 to 24; and for dearMachine: 10 to 19
 *  and 28 to 95. */
export const smallTiers: readonly TrafficTier[] = [
  { ...instant, firstMs: [300, 600], perTokenMs: [40, 70] },
  { ...balanced, firstMs: [600, 1500], perTokenMs: [70, 140] },
  { ...quality, firstMs: [1500, 4000], perTokenMs: [140, 400] },
];

/** For largeMachine, whose steps take 4 ms and more. */
export const largeTiers: readonly TrafficTier[] = [
  { ...instant, firstMs: [50, 150], perTokenMs: [10, 20] },
  { ...balanced, firstMs: [150, 400], perTokenMs: [20, 50] },
  { ...quality, firstMs: [400, 1500], perTokenMs: [40, 100] },
];

export function createTraffic(traffic: Traffic): Arrival[] {
  const { seed, seconds, perSecond, adapters, zipf } = traffic;
  const rng = createRng(seed);
  const pickAdapter = createZipf(adapters, zipf);
  const { rateMax, rateAt } = createRate(traffic, createRng(seed ^ 0x5bd1_e995));
  const arrivals: Arrival[] = [];
  for (let atMs = 0; ; ) {
    atMs += (-Math.log(1 - rng.next()) * 1000) / (perSecond * rateMax);
    if (atMs >= 1000 * seconds) return arrivals;
    if (rng.next() * rateMax >= rateAt(atMs)) continue;
    arrivals.push(arrive(traffic, rng, { atMs, adapter: `a${pickAdapter(rng)}` }));
  }
}

function arrive(
  { tenants, tiers, promptTokens, tokensMax: limits, endsEarly }: Traffic,
  rng: Rng,
  when: Pick<Arrival, 'atMs' | 'adapter'>,
): Arrival {
  const tokensMax = limits[rng.below(limits.length)]!;
  const answerTokens = rng.next() < endsEarly ? 1 + rng.below(tokensMax) : tokensMax;
  const tier = pickTier(tiers, rng.next());
  const totalMs =
    tier.firstMs === null
      ? null
      : between(tier.firstMs, rng) + tokensMax * between(tier.perTokenMs, rng);
  return {
    ...when,
    tenant: `t${rng.below(tenants)}`,
    tier: tier.name,
    promptTokens: Math.max(numberTokens, Math.round(between(promptTokens, rng))),
    tokensMax,
    answerTokens,
    budget: {
      ...{ totalMs, ttftMs: null, perTokenMs: null },
      ...{ strict: tier.strict, rank: null, rankMin: 1, priority: tier.priority },
    },
  };
}

/** Evenly over the logarithm. */
function between([min, max]: Span, rng: Rng): number {
  return min * (max / min) ** rng.next();
}

function pickTier(tiers: readonly TrafficTier[], draw: number): TrafficTier {
  let left = draw * tiers.reduce((sum, { share }) => sum + share, 0);
  for (const tier of tiers) {
    left -= tier.share;
    if (left < 0) return tier;
  }
  return tiers.at(-1)!;
}

/** 0…count−1, 0 the likeliest. */
export function createZipf(count: number, exponent: number): (rng: Rng) => number {
  const ends = new Float64Array(count);
  let total = 0;
  for (let i = 0; i < count; i++) {
    total += (i + 1) ** -exponent;
    ends[i] = total;
  }
  return (rng) => {
    const draw = rng.next() * total;
    let [low, high] = [0, count - 1];
    while (low < high) {
      const middle = (low + high) >> 1;
      if (ends[middle]! > draw) high = middle;
      else low = middle + 1;
    }
    return low;
  };
}

interface Rate {
  /** As shares of the mean rate. */
  readonly rateMax: number;
  readonly rateAt: (atMs: number) => number;
}

const burst = { rate: 4, quietRate: 0.25, meanMs: 2000, quietMeanMs: 8000 } as const;
const daySwing = 0.8;

function createRate({ shape, seconds }: Traffic, rng: Rng): Rate {
  switch (shape) {
    case 'steady':
      return { rateMax: 1, rateAt: () => 1 };
    case 'diurnal': {
      const rateAt = (atMs: number): number =>
        1 + daySwing * Math.sin((2 * Math.PI * atMs) / (1000 * seconds));
      return { rateMax: 1 + daySwing, rateAt };
    }
    case 'bursts':
      return { rateMax: burst.rate, rateAt: createBursts(rng) };
  }
}

/** Two states that last exponentially long (a Markov-modulated Poisson process); asked in order of time. 4 · 2 + ¼ · 8
 *  over 10 s: the mean stays 1. */
function createBursts(rng: Rng): (atMs: number) => number {
  const { rate, quietRate, meanMs, quietMeanMs } = burst;
  let isBurst = false;
  let untilMs = -Math.log(1 - rng.next()) * quietMeanMs;
  return (atMs) => {
    while (atMs >= untilMs) {
      isBurst = !isBurst;
      untilMs -= Math.log(1 - rng.next()) * (isBurst ? meanMs : quietMeanMs);
    }
    return isBurst ? rate : quietRate;
  };
}
