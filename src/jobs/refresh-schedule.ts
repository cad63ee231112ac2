// When an adapter's next refresh starts, or why it does not. Pure. Time is asked first: what there is to learn takes long to
// read.

export interface ScheduleSettings {
  /** Between two starts. */
  readonly everyS: number;
  /** Accepted examples that came since the last start. */
  readonly freshMin: number;
  /** Accepted ones to train on, and to judge by. */
  readonly trainingMin: number;
  readonly heldOutMin: number;
}

export interface Timing {
  readonly nowS: number;
  /** null: none has been started. */
  readonly lastS: number | null;
  readonly isRunning: boolean;
}

export interface Learnable {
  readonly fresh: number;
  readonly training: number;
  readonly heldOut: number;
}

/** Whatever there is to learn; null: now. `asked`: by somebody, who need not wait for its time. */
export function whyNotNow(
  { nowS, lastS, isRunning }: Timing,
  { everyS }: ScheduleSettings,
  asked: boolean,
): string | null {
  if (isRunning) return 'a refresh of it is under way';
  if (asked) return null;
  // A clock that was set back does not hold refreshes up for longer than their interval.
  const sinceS = lastS === null ? Infinity : Math.abs(nowS - lastS);
  return sinceS < everyS ? `${sinceS} s since the last: at least ${everyS} wanted` : null;
}

/** null: there is enough to learn. */
export function whyTooLittle(
  { fresh, training, heldOut }: Learnable,
  { freshMin, trainingMin, heldOutMin }: ScheduleSettings,
  asked: boolean,
): string | null {
  if (training < trainingMin) {
    return `${training} accepted examples to train on: at least ${trainingMin} wanted`;
  }
  if (heldOut < heldOutMin) {
    return `${heldOut} accepted examples to judge by: at least ${heldOutMin} wanted`;
  }
  if (asked) return null;
  return fresh < freshMin ? `${fresh} new accepted examples: at least ${freshMin} wanted` : null;
}
