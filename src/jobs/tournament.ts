// Who of several generations is best, from games between pairs: alpha-Rank (arXiv 1903.01373), the share of time that a
// population spends on each where a better one takes over sooner, and which games are still worth playing
// (ResponseGraphUCB, arXiv 1909.09849): those of pairs whose winner is not known yet. Pure.

/** Games of i against j, i < j: how many, and how many i won. */
export interface Games {
  readonly played: number;
  readonly won: number;
}

export interface AlphaRankOptions {
  /** Selection: the larger, the more a difference counts. */
  readonly alpha: number;
  /** Of the population. */
  readonly size: number;
}

/** Beyond, what never happens and what hardly does are alike: e^-200. */
const exponentMax = 200;

/** Of each strategy, in all 1. `payoffs[i][j]`: what i gets against j. */
export function alphaRank(
  payoffs: readonly (readonly number[])[],
  { alpha, size }: AlphaRankOptions,
): number[] {
  const rates = payoffs.map((row, from) =>
    row.map((_, to) =>
      from === to ? 0 : fixation(alpha * (payoffs[to]![from]! - payoffs[from]![to]!), size),
    ),
  );
  return stationary(rates);
}

/** Probability that one with an advantage of u takes over from all others: (1 − e^-u) / (1 − e^-mu), without overflow. */
function fixation(u: number, m: number): number {
  if (Math.abs(u) < 1e-14) return 1 / m;
  if (u > 0) return -Math.expm1(-u) / -Math.expm1(-m * u);
  const lost = Math.min((m - 1) * -u, exponentMax);
  return (Math.exp(-lost) * -Math.expm1(u)) / -Math.expm1(m * u);
}

/** Of the chain with these rates between states: Grassmann, Taksar and Heyman's elimination, which subtracts nothing. */
function stationary(rates: readonly (readonly number[])[]): number[] {
  const q = rates.map((row) => [...row]);
  for (let n = q.length - 1; n > 0; n--) {
    const out = q[n]!.slice(0, n).reduce((sum, rate) => sum + rate, 0);
    for (let i = 0; i < n; i++) {
      q[i]![n]! /= out;
      for (let j = 0; j < n; j++) if (j !== i) q[i]![j]! += q[i]![n]! * q[n]![j]!;
    }
  }
  let shares = [1];
  for (let n = 1; n < q.length; n++) {
    const next = shares.reduce((sum, share, i) => sum + share * q[i]![n]!, 0);
    const all = [...shares, next];
    const most = Math.max(...all);
    shares = all.map((share) => share / most);
  }
  const total = shares.reduce((sum, share) => sum + share, 0);
  return shares.map((share) => share / total);
}

export type Bound = 'ucb-standard' | 'clopper-pearson';

/** i's: 1 won, -1 lost, 0 not known yet at this confidence. */
export function winner({ played, won }: Games, bound: Bound, delta: number): -1 | 0 | 1 {
  if (played === 0) return 0;
  const isAhead = 2 * won > played;
  const most = isAhead ? won : played - won;
  const isKnown =
    bound === 'ucb-standard'
      ? most / played - 0.5 > Math.sqrt(Math.log(2 / delta) / (2 * played))
      : fairTail(most, played) < delta / 2;
  if (!isKnown) return 0;
  return isAhead ? 1 : -1;
}

/** P(at least so many of n fair games): Clopper and Pearson's interval leaves ½ out when it is less than delta/2. */
function fairTail(wins: number, n: number): number {
  let log = -n * Math.LN2; // of the probability of n wins
  let sum = Math.exp(log);
  for (let k = n - 1; k >= wins; k--) {
    log += Math.log((k + 1) / (n - k));
    sum += Math.exp(log);
  }
  return sum;
}

export interface Tournament {
  /** By i·n + j, i < j. */
  readonly games: ReadonlyMap<number, Games>;
  /** Whether every winner is known. */
  readonly isResolved: boolean;
  readonly played: number;
}

export interface TournamentOptions {
  readonly bound: Bound;
  /** Of one pair. */
  readonly delta: number;
  /** Of one pair; then its winner stays unknown. */
  readonly gamesMax: number;
}

/** Plays the pair that is not known yet and has been played least. `play`: whether i won. */
export function runTournament(
  n: number,
  play: (i: number, j: number) => boolean,
  { bound, delta, gamesMax }: TournamentOptions,
): Tournament {
  const games = new Map<number, Games>();
  for (let i = 0; i < n; i++) {
    for (let j = i + 1; j < n; j++) games.set(i * n + j, { played: 0, won: 0 });
  }
  const open = new Set(games.keys());
  let played = 0;
  let isResolved = true;
  while (open.size > 0) {
    const pair = [...open].reduce((a, b) => (games.get(b)!.played < games.get(a)!.played ? b : a));
    const before = games.get(pair)!;
    const won = play(Math.floor(pair / n), pair % n) ? 1 : 0;
    const after = { played: before.played + 1, won: before.won + won };
    games.set(pair, after);
    played += 1;
    const isKnown = winner(after, bound, delta) !== 0;
    if (!isKnown && after.played < gamesMax) continue;
    open.delete(pair);
    isResolved &&= isKnown;
  }
  return { games, isResolved, played };
}

/** Of i against j; ½ where they have not met. */
export function winRates(n: number, games: Tournament['games']): number[][] {
  return Array.from({ length: n }, (_, i) =>
    Array.from({ length: n }, (__, j) => {
      const { played, won } = games.get(Math.min(i, j) * n + Math.max(i, j)) ?? {
        played: 0,
        won: 0,
      };
      if (played === 0) return 0.5;
      return i < j ? won / played : 1 - won / played;
    }),
  );
}
