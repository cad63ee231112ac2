// Ranks on the way: at step boundaries the ranks of all decoding rows are chosen together (batch-ranks.ts). Rows of a batch
// that is too slow for one of them lose ranks at once, those that are late whatever happens all that they can lose; with
// time to spare they get some back, more slowly, for a change is heard in the stream and costs it its place in the prefix
// cache. Prompts that together cannot begin in time lose ranks too: theirs were planned before the others came. Rows that
// state no time or whose caller fixed the rank keep theirs, and count. Pure.

import { type BatchRow, chooseBatchRanks, type RankOption } from './batch-ranks.ts';
import type { StepCosts } from './messages.ts';
import { type Moment, promptTokenMs, type Runnable, rowMs } from './scheduler.ts';

/** Steps between two looks at a small batch, and at one where a look takes a millisecond or two. */
const governEvery = { few: 2, many: 8 } as const;
const manyRows = 64;
/** From one change of a row to its next rise. Guess. */
const riseAfterSteps = 32;
/** Share of the spare time that is given to ranks: costs are predictions. Guess. */
const spareShare = 0.9;
/** The most of a step that rows are slowed down for so that prompts begin in time. Guess. */
const promptShareMax = 0.5;
/** Units of such a share, whole in batch-ranks.ts. */
const shareUnits = 10_000;

export interface GovernedRow extends Runnable {
  readonly rank: number;
  /** Ranks that it may have, ascending; empty: none but its own. */
  readonly ladder: readonly RankOption[];
  /** The step before which its rank last changed. */
  readonly rankStep: number;
  /** Some of it is computed, or was. */
  readonly hasBegun: boolean;
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
  const every = runnables.length > manyRows ? governEvery.many : governEvery.few;
  if (costs === null || step % every !== 0) return [];
  const prompts = planPrompts(runnables, costs, nowMs);
  const rows = runnables.filter(({ promptTokensLeft }) => promptTokensLeft === 0);
  if (rows.every(({ ladder }) => ladder.length < 2)) return prompts.orders;
  const left = 1 - Math.min(promptShareMax, prompts.share);
  const paces = rows.map((row) => left * row.paceMs(nowMs, runnables.length === 1));
  const options = rows.map((row) => optionsOf(row));
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
  const { orders } = prompts;
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

function optionsOf(
  row: GovernedRow,
  ladder: GovernedRow['ladder'] = row.ladder,
): BatchRow['options'] {
  const [first, ...rest] = ladder;
  return first === undefined
    ? [{ rank: row.rank, ranks: row.rowRanks, quality: 0 }]
    : [first, ...rest];
}

interface PromptPlan<T> {
  /** Of the time from now on, what prompts need to have their first token when it is due. */
  readonly share: number;
  readonly orders: RankOrder<T>[];
}

function planPrompts<T extends GovernedRow>(
  runnables: readonly T[],
  costs: StepCosts,
  nowMs: number,
): PromptPlan<T> {
  // Who is too late already: nobody loses anything for it.
  const prompts = runnables.filter((one) => one.promptTokensLeft > 0 && one.dueMs > nowMs);
  const shareOf = ({ promptTokensLeft, position, dueMs }: T, rowRanks: number): number =>
    (promptTokensLeft * promptTokenMs(costs, { rowRanks, position }, promptTokensLeft)) /
    (dueMs - nowMs);
  const share = prompts.reduce((sum, one) => sum + shareOf(one, one.rowRanks), 0);
  const orders: RankOrder<T>[] = [];
  if (share <= promptShareMax) return { share, orders };
  const inUnits = (one: T, option: RankOption): RankOption => ({
    ...option,
    ranks: Math.round(shareUnits * shareOf(one, option.ranks)),
  });
  const chosen = chooseBatchRanks(
    prompts.map((one): BatchRow => {
      // What has begun stays as it is: a rank before the first token is that of the whole prompt.
      const [least, ...rest] = optionsOf(one, one.hasBegun ? [] : one.ladder);
      const options = [inUnits(one, least), ...rest.map((option) => inUnits(one, option))] as const;
      return { options, paceMs: shareUnits * promptShareMax };
    }),
    (units) => units,
  );
  let left = share;
  for (const [i, row] of prompts.entries()) {
    const option = row.ladder.find(({ rank }) => rank === chosen[i]);
    if (option === undefined || option.rank >= row.rank || row.hasBegun) continue;
    orders.push({ row, rank: option.rank, reason: 'late' });
    left -= shareOf(row, row.rowRanks) - shareOf(row, option.ranks);
  }
  return { share: left, orders };
}
