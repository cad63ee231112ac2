// Whether a refreshed adapter may take the place of the one it was trained from: by the losses of both, on the same held-out
// examples, at every rank. Pure; the reasons are data. What is not finite, or too little to judge by, does not pass.

import { type Aurac, aurac } from '../adapters/aurac.ts';
import { createRandom } from '../adapters/families/seeded-random.ts';
import { alphaRank, runTournament, type Tournament, winRates } from './tournament.ts';

/** Mean losses per example, in nats a token. */
export interface Losses {
  /** [ranks][held-out examples]. */
  readonly byRank: readonly (readonly number[])[];
  /** At the largest rank, of texts that have nothing to do with the adapter: [texts]. */
  readonly guard: readonly number[];
}

export interface Comparison {
  readonly ranks: readonly number[];
  readonly before: Losses;
  readonly after: Losses;
  /** Of the generation before `before`, while that is on probation: held-out examples at the largest rank. */
  readonly earlier: readonly number[] | null;
}

export interface GateSettings {
  readonly heldOutMin: number;
  /** What a rank may lose. */
  readonly rankNatsMax: number;
  /** What the guard may lose. */
  readonly guardNatsMax: number;
  /** By how many of its standard errors the AURAC must have risen. */
  readonly errorsMin: number;
  /** A tournament besides, of all generations that were compared: every winner known, and this share of alpha-Rank's mass at
   *  least. null: none is held. */
  readonly tournament: { readonly massMin: number; readonly delta: number } | null;
}

export interface RankChange {
  readonly rank: number;
  readonly before: number;
  readonly after: number;
}

export interface Verdict {
  readonly isPromoted: boolean;
  /** Why not; empty when promoted. */
  readonly reasons: readonly string[];
  readonly heldOut: number;
  readonly ranks: readonly RankChange[];
  /** Nats that were gained; the standard error is v1's. */
  readonly gain: (Aurac & { readonly error: number }) | null;
  readonly guard: { readonly before: number; readonly after: number } | null;
}

/** The error of an error from so many is a fiftieth. */
const resamples = 1000;

/** The first `known` held-out examples judged a refresh before: what is new must not cost what they show. */
export function judge(
  { ranks, before, after, earlier }: Comparison,
  settings: GateSettings,
  known: number,
): Verdict {
  const heldOut = before.byRank[0]?.length ?? 0;
  const all = [before, after].flatMap(({ byRank, guard }) => [...byRank.flat(), ...guard]);
  const isWhole =
    [before, after].every(
      ({ byRank }) =>
        byRank.length === ranks.length && byRank.every(({ length }) => length === heldOut),
    ) && before.guard.length === after.guard.length;
  if (!isWhole || !all.every(Number.isFinite)) {
    return refused(heldOut, 'a loss is missing or not finite');
  }
  if (heldOut < settings.heldOutMin) {
    return refused(heldOut, `${heldOut} held-out examples: at least ${settings.heldOutMin} wanted`);
  }
  const changes = changesOf(ranks, before.byRank, after.byRank);
  const gain = gainOf(ranks, before.byRank, after.byRank);
  const hasGuard = before.guard.length > 0;
  const guard = hasGuard ? { before: mean(before.guard), after: mean(after.guard) } : null;
  const reasons = [
    ...changesAgainst(changes, settings.rankNatsMax, ''),
    ...(known === 0
      ? []
      : changesAgainst(
          changesOf(ranks, knownOf(before, known), knownOf(after, known)),
          settings.rankNatsMax,
          ' on what was known before',
        )),
    ...reasonsAgainst({ gain, guard }, settings),
    ...defeats(
      [after.byRank.at(-1)!, before.byRank.at(-1)!, ...(earlier === null ? [] : [earlier])],
      settings.tournament,
    ),
  ];
  return { isPromoted: reasons.length === 0, reasons, heldOut, ranks: changes, gain, guard };
}

function refused(heldOut: number, reason: string): Verdict {
  return { isPromoted: false, reasons: [reason], heldOut, ranks: [], gain: null, guard: null };
}

function changesOf(
  ranks: readonly number[],
  before: Losses['byRank'],
  after: Losses['byRank'],
): RankChange[] {
  return ranks.map((rank, i) => ({ rank, before: mean(before[i]!), after: mean(after[i]!) }));
}

function knownOf({ byRank }: Losses, known: number): Losses['byRank'] {
  return byRank.map((losses) => losses.slice(0, known));
}

function changesAgainst(changes: readonly RankChange[], natsMax: number, where: string): string[] {
  return changes
    .filter(({ before, after }) => after - before > natsMax)
    .map(({ rank, before, after }) => {
      const lost = `${before.toFixed(4)} before, ${after.toFixed(4)} after`;
      return `rank ${rank} is worse${where} by more than ${natsMax}: ${lost}`;
    });
}

function reasonsAgainst(
  {
    gain,
    guard,
  }: { readonly gain: Aurac & { readonly error: number }; readonly guard: Verdict['guard'] },
  { guardNatsMax, errorsMin }: GateSettings,
): string[] {
  const reasons: string[] = [];
  if (!(gain.v1 > errorsMin * gain.error)) {
    const got = `${gain.v1.toFixed(4)} with a standard error of ${gain.error.toFixed(4)}`;
    reasons.push(`the AURAC must rise by ${errorsMin} standard errors: it rose by ${got}`);
  }
  if (guard !== null && guard.after - guard.before > guardNatsMax) {
    const lost = `${guard.before.toFixed(4)} before, ${guard.after.toFixed(4)} after`;
    reasons.push(`other text is forgotten, by more than ${guardNatsMax}: ${lost}`);
  }
  return reasons;
}

/** The first of the generations is judged, at the largest rank. */
function defeats(
  losses: readonly (readonly number[])[],
  settings: GateSettings['tournament'],
): string[] {
  if (settings === null) return [];
  const { massMin, delta } = settings;
  const { isResolved, masses } = playExamples(losses, delta);
  if (!isResolved) return [`the tournament has no winner at a confidence of ${1 - delta}`];
  const [mass] = masses;
  return mass! >= massMin
    ? []
    : [`alpha-Rank gives it ${mass!.toFixed(4)}: at least ${massMin} wanted`];
}

/** A game is an example, the smaller loss wins it, equal ones by turns; no more are played than tell the winners. `masses`:
 *  alpha-Rank's. */
export function playExamples(
  losses: readonly (readonly number[])[], // [generations][examples]
  delta: number,
): Tournament & { readonly masses: readonly number[] } {
  const met = new Map<number, number>();
  const play = (i: number, j: number): boolean => {
    const game = met.get(i * losses.length + j) ?? 0;
    met.set(i * losses.length + j, game + 1);
    const [own, other] = [losses[i]![game]!, losses[j]![game]!];
    return own === other ? game % 2 === 0 : own < other;
  };
  const rules = { bound: 'clopper-pearson', delta, gamesMax: losses[0]!.length } as const;
  const played = runTournament(losses.length, play, rules);
  const rates = winRates(losses.length, played.games);
  return { ...played, masses: alphaRank(rates, { alpha: 1, size: 50 }) };
}

/** AURAC is linear: its gain is the mean of each example's, whose spread bootstraps its error. */
export function gainOf(
  ranks: readonly number[],
  before: Losses['byRank'],
  after: Losses['byRank'],
): Aurac & { error: number } {
  const gains = before[0]!.map((_, example) =>
    aurac(
      ranks,
      ranks.map((__, i) => before[i]![example]! - after[i]![example]!),
    ),
  );
  const v1 = gains.map((gain) => gain.v1);
  return { v1: mean(v1), v2: mean(gains.map((gain) => gain.v2)), error: bootstrapError(v1) };
}

/** Of the mean. Seeded: the same losses are judged alike. */
export function bootstrapError(values: readonly number[]): number {
  const random = createRandom(0n);
  const means = Array.from({ length: resamples }, () =>
    mean(values.map(() => values[random.below(values.length)]!)),
  );
  const centre = mean(means);
  return Math.sqrt(means.reduce((sum, one) => sum + (one - centre) ** 2, 0) / (resamples - 1));
}

export function mean(values: readonly number[]): number {
  return values.reduce((sum, value) => sum + value, 0) / values.length;
}
