// Whether a generation is worse than the one before it, told while observations come in: an e-process, so it may be looked at
// after each of them, and a generation that is no worse is ever accused with probability at most alpha (Ville's inequality).
// Pure.
//
// A pair (before, now) of numbers in [0, 1] is a bet: capital × (1 − λ·(now − before)), which is expected to shrink as long as
// E[now] ≥ E[before], whatever their spread, for every λ in [0, 1). Several λ at once, a mixture, win little less than the
// best of them. Pairs must not be chosen by their values.

/** Logarithm of what each λ's capital has become, 0 at the start. */
export type Capitals = readonly number[];

const bets = [1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4, 15 / 16];
export const noCapitals: Capitals = bets.map(() => 0);

export interface Pair {
  /** 0…1, more is better. */
  readonly before: number;
  readonly now: number;
}

export function afterPair(capitals: Capitals, { before, now }: Pair): Capitals {
  return capitals.map((log, i) => log + Math.log1p(-bets[i]! * (now - before)));
}

/** Against "it is no worse": their mean. */
export function evidence(capitals: Capitals): number {
  return capitals.reduce((sum, log) => sum + Math.exp(log), 0) / capitals.length;
}

export const isWorse = (capitals: Capitals, alpha: number): boolean =>
  evidence(capitals) >= 1 / alpha;

/** Losses as such numbers: which is larger by so many nats counts, up to one. */
export function lossPair(before: number, now: number): Pair {
  const worse = Math.min(1, Math.max(-1, now - before));
  return { before: (1 + worse) / 2, now: (1 - worse) / 2 };
}
