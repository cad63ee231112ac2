// When an adapter's next refresh starts, or why it does not. Pure.

export interface ScheduleSettings {
  /** Between two starts. */
  readonly everyS: number;
  /** Accepted examples that came since the last start. */
  readonly freshMin: number;
  /** Accepted ones to train on, and to judge by. */
  readonly trainingMin: number;
  readonly heldOutMin: number;
}

export interface ScheduleFacts {
  readonly nowS: number;
  /** null: none has been started. */
  readonly lastS: number | null;
  readonly fresh: number;
  readonly training: number;
  readonly heldOut: number;
  readonly isRunning: boolean;
}

/** null: start. `asked`: by somebody, who need not wait for its time. */
export function whyNot(
  { nowS, lastS, fresh, training, heldOut, isRunning }: ScheduleFacts,
  { everyS, freshMin, trainingMin, heldOutMin }: ScheduleSettings,
  asked: boolean,
): string | null {
  if (isRunning) return 'a refresh of it is under way';
  if (training < trainingMin) {
    return `${training} accepted examples to train on: at least ${trainingMin} wanted`;
  }
  if (heldOut < heldOutMin) {
    return `${heldOut} accepted examples to judge by: at least ${heldOutMin} wanted`;
  }
  if (asked) return null;
  if (fresh < freshMin) return `${fresh} new accepted examples: at least ${freshMin} wanted`;
  // A clock that was set back does not hold refreshes up for longer than their interval.
  const sinceS = lastS === null ? Infinity : Math.abs(nowS - lastS);
  return sinceS < everyS ? `${sinceS} s since the last: at least ${everyS} wanted` : null;
}
