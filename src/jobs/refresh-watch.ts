// Whether a generation is worse than the one before it, told while observations come in: an e-process, so it may be looked at
// after each of them, and a generation that is no worse is ever accused with at most the rate that it is given. Pure.
//
// An observation is a gain g ≤ 1 whose mean is at least 0 while the generation is no worse. It is a bet: capital × (1 − λ·g)
// is then expected not to grow, for every λ in [0, 1), whatever the spread, and it ever gets to 1/rate with probability at
// most the rate (Ville's inequality). Several λ at once, a mixture, win little less than the best of them.

/** Logarithm of what each λ's capital has become. */
export type Capitals = readonly number[];

const bets = [1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4, 15 / 16];
export const noCapitals: Capitals = bets.map(() => 0);

export function afterGain(capitals: Capitals, gain: number): Capitals {
  return capitals.map((log, i) => log + Math.log1p(-bets[i]! * gain));
}

/** Their mean: evidence against "it is no worse". */
export function evidence(capitals: Capitals): number {
  return capitals.reduce((sum, log) => sum + Math.exp(log), 0) / capitals.length;
}

export const isWorse = (capitals: Capitals, rate: number): boolean =>
  evidence(capitals) >= 1 / rate;

/** Under the mean of scores in [0, 1], of which these are a sample, but for the rate (Hoeffding's inequality); 0 or less: they
 *  say nothing. */
export function lowerBound(scores: readonly number[], rate: number): number {
  const mean = scores.reduce((sum, score) => sum + score, 0) / Math.max(1, scores.length);
  return mean - Math.sqrt(Math.log(1 / rate) / (2 * Math.max(1, scores.length)));
}

/** Of a score in [0, 1], over a bound below 1. */
export const scoreGain = (score: number, bound: number): number => (score - bound) / (1 - bound);

/** Of the same example's losses: nats, one being the most that counts. */
export const lossGain = (before: number, now: number): number =>
  Math.min(1, Math.max(-1, before - now));
