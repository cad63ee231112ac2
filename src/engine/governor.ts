// Ranks on the way: at step boundaries the ranks of all decoding rows are chosen together (batch-ranks.ts). Rows of a batch
// that is too slow for one of them lose ranks at once, those that are late whatever happens all that they can lose; with
// time to spare they get some back, more slowly, for a change is heard in the stream and costs it its place in the prefix
// cache. Rows that state no time or whose caller fixed the rank keep theirs, and count. Pure.

import { type BatchRow, chooseBatchRanks, type RankOption } from './batch-ranks.ts';
import type { StepCosts } from './messages.ts';
import { type Moment, promptTokenMs, type Runnable, rowMs } from './scheduler.ts';

/** Steps between two looks at the batch, and from one change of a row to its next rise. Guesses. */
const governEvery = 4;
const riseAfterSteps = 32;
/** Share of the spare time that is given to ranks: costs are predictions. Guess. */
const spareShare = 0.9;
/** The most of a step that rows are slowed down for so that prompts begin in time. Guess. */
const promptShareMax = 0.5;

export interface GovernedRow extends Runnable {
  readonly rank: number;
  /** Ranks that it may have, ascending; empty: none but its own. */
  readonly ladder: readonly RankOption[];
  /** The step before which its rank last changed. */
  readonly rankStep: number;
}

export interface RankOrder<T> {
  readonly row: T;
  readonly rank: number;
  readonly reason: 'late' | 'slack';
}

export function planRanks<T extends GovernedRow>(
  runnables: readonly T[],
  moment: Moment,
): RankOrder<T>[] {
  const { costs, nowMs, step } = moment;
  if (costs === null || step % governEvery !== 0) return [];
  const rows = runnables.filter(({ promptTokensLeft }) => promptTokensLeft === 0);
  if (rows.every(({ ladder }) => ladder.length < 2)) return [];
  const left = 1 - promptShare(runnables, costs, nowMs);
  const paces = rows.map((row) => left * row.paceMs(nowMs));
  const options = rows.map(optionsOf);
  const ranksNow = rows.reduce((sum, { rowRanks }) => sum + rowRanks, 0);
  const bareMs =
    rows.reduce((ms, row) => ms + rowMs(costs, row), costs.step) - costs.decodeRank * ranksNow;
  const stepMs = (ranks: number): number => bareMs + costs.decodeRank * ranks;
  const leastMs = stepMs(options.reduce((sum, [least]) => sum + least.ranks, 0));
  const limitMs = Math.min(...paces.filter((pace) => pace >= leastMs)); // Infinity of none
  const plannedMs = (ranks: number): number => leastMs + (stepMs(ranks) - leastMs) / spareShare;
  const chosen = chooseBatchRanks(
    options.map((own, i): BatchRow => ({ options: own, paceMs: paces[i]! })),
    plannedMs,
  );
  const isSlow = stepMs(ranksNow) > limitMs;
  let ranks = ranksNow;
  const orders: RankOrder<T>[] = [];
  const order = (row: T, option: RankOption, reason: 'late' | 'slack'): void => {
    orders.push({ row, rank: option.rank, reason });
    ranks += option.ranks - row.rowRanks;
  };
  for (const [i, row] of rows.entries()) {
    const rank = chosen[i]!;
    if (rank < row.rank && (isSlow || paces[i]! < leastMs)) {
      order(row, options[i]!.find((one) => one.rank === rank)!, 'late');
    }
    if (rank <= row.rank || isSlow || step - row.rankStep < riseAfterSteps) continue;
    // Others may keep more than was chosen for them.
    const higher = options[i]!.findLast(
      (one) => one.rank <= rank && plannedMs(ranks + one.ranks - row.rowRanks) <= limitMs,
    );
    if (higher !== undefined && higher.rank > row.rank) order(row, higher, 'slack');
  }
  return orders;
}

function optionsOf({ rank, ladder, rowRanks }: GovernedRow): BatchRow['options'] {
  const [first, ...rest] = ladder;
  return first === undefined ? [{ rank, ranks: rowRanks, quality: 0 }] : [first, ...rest];
}

/** Of the time from now on, what prompts need to have their first token when it is due. */
function promptShare(runnables: readonly Runnable[], costs: StepCosts, nowMs: number): number {
  let share = 0;
  for (const one of runnables) {
    const { promptTokensLeft, dueMs } = one;
    if (promptTokensLeft === 0 || dueMs <= nowMs) continue; // too late already: nobody is slowed down for it
    const ms = promptTokensLeft * promptTokenMs(costs, one, promptTokensLeft);
    share += ms / (dueMs - nowMs);
  }
  return Math.min(promptShareMax, share);
}
