import fc from 'fast-check';
import { expect, it } from 'vitest';
import { type BatchRow, chooseBatchRanks, type StepCost } from '../../src/engine/batch-ranks.ts';

// Small batches, so that every assignment can be tried.

const never = Number.POSITIVE_INFINITY;
const ladder = [0, 1, 2, 4, 8, 16, 32];

/** Concave, as energies of ordered ranks are: the gain of a rank never grows. `parts`: ranks computed per rank of a blend. */
const concaveRow: fc.Arbitrary<BatchRow> = fc
  .record({
    from: fc.nat(2),
    count: fc.integer({ min: 1, max: 4 }),
    decay: fc.double({ min: 0.5, max: 1, noNaN: true }),
    parts: fc.integer({ min: 1, max: 3 }),
    tokensLeft: fc.integer({ min: 1, max: 50 }),
    dueMs: fc.option(fc.double({ min: 1, max: 3000, noNaN: true })),
  })
  .map(({ from, count, decay, parts, tokensLeft, dueMs }) => {
    const ranks = ladder.slice(from, from + count);
    const energy = (rank: number): number =>
      Array.from({ length: rank }, (_, i) => decay ** i).reduce((a, b) => a + b, 0);
    const whole = energy(ranks.at(-1)!) || 1;
    const [first, ...others] = ranks.map((rank) => ({
      ...{ rank, ranks: parts * rank, quality: energy(rank) / whole },
    }));
    return { options: [first!, ...others], paceMs: (dueMs ?? never) / tokensLeft };
  });
/** Any rising qualities. */
const anyRow: fc.Arbitrary<BatchRow> = fc
  .record({
    rises: fc.array(fc.tuple(fc.integer({ min: 1, max: 20 }), fc.nat(10)), { maxLength: 3 }),
    tokensLeft: fc.integer({ min: 1, max: 50 }),
    dueMs: fc.option(fc.double({ min: 1, max: 3000, noNaN: true })),
  })
  .map(({ rises, tokensLeft, dueMs }) => {
    let last = { rank: 0, ranks: 0, quality: 0 };
    const others = rises.map(([ranks, quality]) => {
      last = {
        rank: last.rank + 1,
        ranks: last.ranks + ranks,
        quality: last.quality + quality / 10,
      };
      return last;
    });
    return {
      options: [{ rank: 0, ranks: 0, quality: 0 }, ...others],
      paceMs: (dueMs ?? never) / tokensLeft,
    };
  });
const stepCost: fc.Arbitrary<StepCost> = fc
  .record({
    base: fc.double({ min: 0.1, max: 64, noNaN: true }),
    perRank: fc.double({ min: 0, max: 3.2, noNaN: true }),
  })
  .map(
    ({ base, perRank }) =>
      (ranks) =>
        base + perRank * ranks,
  );

interface Judged {
  readonly ranks: number;
  readonly quality: number;
  /** Rows in time, by index. */
  readonly inTime: readonly boolean[];
}

function judge(
  rows: readonly BatchRow[],
  picks: readonly number[],
  cost: StepCost,
  toleranceMs = 1e-8,
): Judged {
  const options = rows.map((row, i) => row.options[picks[i]!]!);
  const ranks = options.reduce((sum, one) => sum + one.ranks, 0);
  const ms = cost(ranks);
  const inTime = rows.map(({ paceMs }) => ms <= paceMs + toleranceMs);
  return { ranks, quality: options.reduce((sum, one) => sum + one.quality, 0), inTime };
}

/** Who can be kept in time. A batch with a row that rounding decides about is no case. */
function keepable(rows: readonly BatchRow[], cost: StepCost): readonly boolean[] {
  const least = rows.map(() => 0);
  const [all, sure] = [1e-8, -1e-8].map((ms) => judge(rows, least, cost, ms).inTime);
  fc.pre(all!.every((one, i) => one === sure![i]));
  return all!;
}

function assignments(rows: readonly BatchRow[]): number[][] {
  return rows.reduce<number[][]>(
    (all, { options }) => all.flatMap((one) => options.map((_, i) => [...one, i])),
    [[]],
  );
}

/** Of all assignments that keep whoever can be kept, with the others at their smallest rank: the best quality. */
function bestQuality(rows: readonly BatchRow[], cost: StepCost): number {
  const least = keepable(rows, cost);
  const kept = assignments(rows)
    .filter((picks) => picks.every((pick, i) => least[i] || pick === 0))
    .map((picks) => judge(rows, picks, cost))
    .filter(({ inTime }) => inTime.every((one, i) => one || !least[i]));
  return Math.max(...kept.map(({ quality }) => quality));
}

function chosen(rows: readonly BatchRow[], cost: StepCost): number[] {
  const ranks = chooseBatchRanks(rows, cost);
  return rows.map(({ options }, i) => options.findIndex(({ rank }) => rank === ranks[i]));
}

const concaveBatch = fc.array(concaveRow, { minLength: 1, maxLength: 5 });
const anyBatch = fc.array(anyRow, { minLength: 1, maxLength: 5 });

it('no row is late that any ranks could keep in time, and who cannot be kept takes nothing', () => {
  fc.assert(
    fc.property(fc.oneof(concaveBatch, anyBatch), stepCost, (rows, cost) => {
      const picks = chosen(rows, cost);
      const least = keepable(rows, cost);
      const { inTime } = judge(rows, picks, cost);
      for (const [i, could] of least.entries()) {
        if (could) expect(inTime[i]).toBe(true);
        else expect(picks[i]).toBe(0);
      }
    }),
    { numRuns: 1000 },
  );
});

it('the quality is at least 0.95 of the best that keeps them all, where gains never grow', () => {
  fc.assert(
    fc.property(concaveBatch, stepCost, (rows, cost) => {
      const { quality } = judge(rows, chosen(rows, cost), cost);
      expect(quality).toBeGreaterThanOrEqual(0.95 * bestQuality(rows, cost) - 1e-9);
    }),
    { numRuns: 1000 },
  );
});

it('and at least half of it whatever the qualities are', () => {
  fc.assert(
    fc.property(anyBatch, stepCost, (rows, cost) => {
      const { quality } = judge(rows, chosen(rows, cost), cost);
      expect(quality).toBeGreaterThanOrEqual(0.5 * bestQuality(rows, cost) - 1e-9);
    }),
    { numRuns: 1000 },
  );
});

it('a later deadline never takes quality away', () => {
  fc.assert(
    fc.property(concaveBatch, stepCost, fc.nat(4), (rows, cost, at) => {
      const index = at % rows.length;
      const least = keepable(rows, cost);
      fc.pre(least[index] === true);
      const looser = rows.map((row, i) => (i === index ? { ...row, paceMs: never } : row));
      const [before, after] = [bestQuality(rows, cost), judge(looser, chosen(looser, cost), cost)];
      expect(after.quality).toBeGreaterThanOrEqual(0.95 * before - 1e-9);
    }),
  );
});
