// The ranks of all rows of a step at once: what adapters cost adds up across rows, so no row's rank can be judged by itself.
// All rows get one token a step, so the tightest row that can be in time at all sets the pace, and the ranks that fit into
// such a step go where they gain most quality (a multiple-choice knapsack; Kellerer, Pferschy & Pisinger 2004, ch. 11: greedily
// along each row's upper hull, and once more with each of the first choices that did not fit put in first). A row that cannot
// be in time gets its smallest rank: it ends soonest, and takes nothing from the others. Pure.

export interface RankOption {
  readonly rank: number;
  /** What a row computes at that rank, of all parts. */
  readonly ranks: number;
  /** 0…1. */
  readonly quality: number;
}

export interface BatchRow {
  /** By rising rank, ranks and quality; one: the rank is fixed. */
  readonly options: readonly [RankOption, ...RankOption[]];
  /** The longest step with which it is still in time; Infinity: any. */
  readonly paceMs: number;
}

/** How long a step takes in which all rows together compute so many ranks; does not fall as they grow. */
export type StepCost = (ranks: number) => number;

/** Choices that did not fit and are tried first of all. */
const triesMax = 8;

/** From one option of a row to a larger one. */
interface Rise {
  readonly row: number;
  readonly to: number;
  readonly ranks: number;
  readonly gain: number;
}

interface Filling {
  /** Index of each row's option. */
  readonly options: number[];
  readonly gain: number;
  readonly refused: readonly Rise[];
}

/** Every row's rank. */
export function chooseBatchRanks(rows: readonly BatchRow[], stepMs: StepCost): number[] {
  const leastRanks = rows.reduce((sum, { options }) => sum + options[0].ranks, 0);
  const leastMs = stepMs(leastRanks);
  const isKept = ({ paceMs }: BatchRow): boolean => paceMs >= leastMs;
  const paceMs = Math.min(...rows.filter(isKept).map((row) => row.paceMs)); // Infinity of none
  const rises = rows
    .flatMap((row, i) => (isKept(row) ? risesOf(row.options, i) : []))
    .sort((a, b) => b.gain * a.ranks - a.gain * b.ranks); // by quality per rank; a row's own stay in order
  const most = rises.reduce((sum, { ranks }) => sum + ranks, 0);
  const room = largestWithin(most, (ranks) => stepMs(leastRanks + ranks) <= paceMs);
  let best = fill(rows, rises, room, null);
  for (const first of best.refused.slice(0, triesMax)) {
    const other = fill(rows, rises, room, first);
    if (other.gain > best.gain) best = other;
  }
  return rows.map(({ options }, row) => options[best.options[row]!]!.rank);
}

/** Along the upper hull of quality over ranks, so that each is worth less per rank than the one before it. */
function risesOf(options: readonly RankOption[], row: number): Rise[] {
  const rises: Rise[] = [];
  for (let from = 0; from < options.length - 1; ) {
    let steepest: Rise | null = null;
    for (let to = from + 1; to < options.length; to++) {
      const ranks = options[to]!.ranks - options[from]!.ranks;
      const gain = options[to]!.quality - options[from]!.quality;
      const isSteeper = steepest === null || gain * steepest.ranks > steepest.gain * ranks;
      if (gain > 0 && isSteeper) steepest = { row, to, ranks, gain };
    }
    if (steepest === null) break;
    rises.push(steepest);
    from = steepest.to;
  }
  return rises;
}

function largestWithin(most: number, isWithin: (ranks: number) => boolean): number {
  if (isWithin(most)) return most;
  let [low, high] = [0, most]; // 0 is within, `high` is not
  while (high - low > 1) {
    const middle = Math.floor((low + high) / 2);
    if (isWithin(middle)) low = middle;
    else high = middle;
  }
  return low;
}

/** `first`, and every rise of its row before it, are taken whatever they are worth; when they fit. */
function fill(
  rows: readonly BatchRow[],
  rises: readonly Rise[],
  room: number,
  first: Rise | null,
): Filling {
  const options = rows.map(() => 0);
  const refused: Rise[] = [];
  const stuck = new Set<number>();
  let [left, gain] = [room, 0];
  const take = (rise: Rise): void => {
    if (rise.ranks <= left) {
      left -= rise.ranks;
      gain += rise.gain;
      options[rise.row] = rise.to;
    } else {
      stuck.add(rise.row);
      refused.push(rise);
    }
  };
  const takeAll = (some: readonly Rise[]): void => {
    for (const rise of some) {
      if (!stuck.has(rise.row) && rise.to > options[rise.row]!) take(rise);
    }
  };
  if (first !== null) takeAll(rises.filter(({ row, to }) => row === first.row && to <= first.to));
  takeAll(rises);
  // Last, what lies below the hull and fits.
  for (const { row, to: end } of refused) {
    const own = rows[row]!.options;
    const from = own[options[row]!]!;
    const isWorth = (option: RankOption, to: number): boolean =>
      to < end && option.ranks - from.ranks <= left && option.quality > from.quality;
    const to = own.findLastIndex(isWorth);
    if (to < 0) continue;
    left -= own[to]!.ranks - from.ranks;
    gain += own[to]!.quality - from.quality;
    options[row] = to;
  }
  return { options, gain, refused };
}
