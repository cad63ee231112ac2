// Whether guessing pays, and how far. Tokens guessed by prompt-lookup.ts ride in a decode step as further rows; each is
// kept while the sequence's own draw says the same, so an answer is what it would have been, only sooner (Leviathan et
// al., arXiv:2211.17192, with the draws fixed in advance). A guess pays when it raises the expected tokens per ms of the
// whole step: by how often this sequence's guesses were right, and by what a row was measured to cost. Wrong guesses
// therefore end guessing, but for one row every `probeSteps`.

import { PromptLookup } from './prompt-lookup.ts';

/** One row and these make 2, 4 or 8: few shapes, few programs (decoder.ts). */
const draftLengths = [1, 3, 7] as const;
/** How often a guess is right before anything is known, and the weight of one guess in what is known then. Guesses. */
const ratePrior = 0.5;
const rateGain = 0.15;
/** Steps between two single guesses of a sequence whose guesses do not pay. */
export const probeSteps = 64;
/** Tokens per ms with guesses ÷ without, below which it is noise. */
const gainMin = 1.05;
/** How much longer the guesses of some may make a step that others share. */
const delayShareMax = 0.25;

/** One sequence's guesses and how good they were. */
export class Drafter {
  readonly #tokens: Int32Array;
  #lookup: PromptLookup | null = null;
  #rate: number = ratePrior;
  #stepsSinceDraft = 0;

  /** `tokens`: the sequence's, prompt then answer, with room for all of it. */
  constructor(tokens: Int32Array) {
    this.#tokens = tokens;
  }

  /** Share of guesses that come true, lately. */
  get rate(): number {
    return this.#rate;
  }

  /** Writes guesses behind the `count` tokens that are known; returns how many. */
  draft(count: number, step: DraftStep): number {
    // The token before the answer's last is the last one that is fed back.
    const room = Math.min(step.draftsMax, this.#tokens.length - 1 - count);
    let best = this.#stepsSinceDraft >= probeSteps ? 1 : 0;
    this.#stepsSinceDraft += 1;
    let bestGain = gainMin;
    for (const length of draftLengths) {
      const gain = this.#gain(length, step);
      if (length > room || gain <= bestGain) continue;
      best = length;
      bestGain = gain;
    }
    if (Math.min(best, room) < 1) return 0;
    this.#lookup ??= new PromptLookup(this.#tokens);
    const drafts = this.#lookup.propose(count, best);
    if (drafts > 0) this.#stepsSinceDraft = 0;
    return drafts;
  }

  /** Tokens per ms with `length` guesses ÷ without. */
  #gain(length: number, { rows, rowShare }: DraftStep): number {
    let expected = 0;
    for (let i = 1; i <= length; i++) expected += this.#rate ** i;
    return (1 + expected / rows) / (1 + length * rowShare);
  }

  /** `accepted` guesses were right; the one behind them was looked at and wrong when `isRejected`. */
  learn(accepted: number, isRejected: boolean): void {
    this.#rate = 1 - (1 - this.#rate) * (1 - rateGain) ** accepted;
    if (isRejected) this.#rate *= 1 - rateGain;
  }
}

export interface DraftStep {
  /** Sequences in the step. */
  readonly rows: number;
  /** What one more row costs ÷ what the step costs. */
  readonly rowShare: number;
  readonly draftsMax: number;
}

export type SpeculationWish = 'auto' | 'off';

/** Anything with a drafter and `count` known tokens. */
interface Drafting {
  readonly count: number;
  readonly drafter: Drafter;
}

/** Drafts for the sequences of a pure decode step; `room` more rows fit. Who guesses best chooses first. */
export function draftAll<T extends Drafting>(
  decoding: readonly T[],
  room: number,
  rowShare: number,
): ReadonlyMap<T, number> {
  const rows = decoding.length;
  let left = rows === 1 ? room : Math.min(room, Math.floor(delayShareMax / rowShare));
  const drafts = new Map<T, number>();
  for (const one of [...decoding].sort((a, b) => b.drafter.rate - a.drafter.rate)) {
    const count = one.drafter.draft(one.count, { rows, rowShare, draftsMax: left });
    drafts.set(one, count);
    left -= count;
  }
  return drafts;
}

/** A further row's share of a one-row step before steps of several sizes were seen: SmolLM2 on one thread, 6.0 → 7.3 ms. */
const rowSharePrior = 0.2;
const costGain = 0.05; // a step counts half after 14 more
/** Weight of the prior against the variance of the row counts seen, in rows². */
const priorRows = 0.25;
/** A step that took this many times the mean paused or recorded a program: no more is learned from it than that. */
const outlierMax = 3;
const rowShareMin = 0.001;

/** What a row costs: slope of time over rows, by moving averages. */
export class RowCost {
  #rows = 0; // means
  #ms = 0;
  #variance = 0; // of rows
  #covariance = 0;

  observe(rows: number, ms: number): void {
    if (!(ms > 0)) return;
    if (this.#ms === 0) {
      this.#rows = rows;
      this.#ms = ms;
      return;
    }
    const dRows = rows - this.#rows;
    const dMs = Math.min(ms, outlierMax * this.#ms) - this.#ms;
    this.#rows += costGain * dRows;
    this.#ms += costGain * dMs;
    this.#variance = (1 - costGain) * (this.#variance + costGain * dRows * dRows);
    this.#covariance = (1 - costGain) * (this.#covariance + costGain * dRows * dMs);
  }

  /** What one more row costs ÷ what a step of `rows` rows costs. */
  share(rows: number): number {
    const prior = rowSharePrior / (1 + rowSharePrior * (this.#rows - 1)); // of the mean step
    const perRow = (this.#covariance + priorRows * prior * this.#ms) / (this.#variance + priorRows);
    const step = this.#ms + perRow * (rows - this.#rows);
    return this.#ms > 0 && step > 0
      ? Math.min(1, Math.max(rowShareMin, perRow / step))
      : rowSharePrior / (1 + rowSharePrior * (rows - 1));
  }
}
