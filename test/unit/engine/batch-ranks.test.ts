import { describe, expect, it } from 'vitest';
import { type BatchRow, chooseBatchRanks, type StepCost } from '../../../src/engine/batch-ranks.ts';

const cost: StepCost = (ranks) => 10 + ranks;
const never = Number.POSITIVE_INFINITY;

function rowOf(leftMs: number, tokensLeft: number, ranks = [0, 1, 2, 4, 8]): BatchRow {
  const [first, ...others] = ranks.map((rank) => ({
    ...{ rank, ranks: rank, quality: 1 - 2 ** -rank },
  }));
  return { options: [first!, ...others], paceMs: leftMs / tokensLeft };
}

describe('the ranks of a batch', () => {
  it('are all of them where nothing is due', () => {
    expect(chooseBatchRanks([rowOf(never, 5), rowOf(never, 5, [2, 4])], cost)).toEqual([8, 4]);
    expect(chooseBatchRanks([], cost)).toEqual([]);
  });

  it('fit into the step that the tightest row allows', () => {
    // 14 ms a token: four ranks, of which two rows gain most with two each.
    const rowsAt = (nowMs: number): BatchRow[] =>
      [1140, 9000].map((deadlineMs) => rowOf(deadlineMs - nowMs, 10));
    expect(chooseBatchRanks(rowsAt(1000), cost)).toEqual([2, 2]);
    expect(chooseBatchRanks(rowsAt(1001), cost)).toEqual([2, 1]); // 13.9 ms
  });

  it('leave a row that cannot be in time its smallest, and do not slow the others down for it', () => {
    const rows = [rowOf(50, 10), rowOf(never, 10), rowOf(200, 10)];
    expect(chooseBatchRanks(rows, cost)).toEqual([0, 4, 4]);
    expect(chooseBatchRanks([rowOf(-5, 10), rowOf(never, 3)], cost)).toEqual([0, 8]);
  });

  it('keep a fixed rank, and count it', () => {
    const rows = [rowOf(never, 10, [6]), rowOf(180, 10)];
    expect(chooseBatchRanks(rows, cost)).toEqual([6, 2]);
  });

  it('do not pay for a rank that adds nothing', () => {
    const flat: BatchRow = {
      options: [
        { rank: 1, ranks: 1, quality: 0.5 },
        { rank: 4, ranks: 4, quality: 0.9 },
        { rank: 8, ranks: 8, quality: 0.9 },
      ],
      paceMs: never,
    };
    expect(chooseBatchRanks([flat], cost)).toEqual([4]);
  });

  it('are fewer where a step takes longer', () => {
    const slower: StepCost = (ranks) => 12 + ranks;
    expect(chooseBatchRanks([rowOf(140, 10)], cost)).toEqual([4]);
    expect(chooseBatchRanks([rowOf(140, 10)], slower)).toEqual([2]);
  });

  it('are found in less than 2 ms of CPU for 256 rows', () => {
    const rows = Array.from({ length: 256 }, (_, i) =>
      rowOf(i % 3 === 0 ? never : 100_000 + 1000 * i, 50 + i, [0, 1, 2, 4, 8, 16, 32, 64]),
    );
    const run = (): void => void chooseBatchRanks(rows, cost);
    for (let i = 0; i < 50; i++) run();
    const before = process.cpuUsage();
    for (let i = 0; i < 50; i++) run();
    const { user, system } = process.cpuUsage(before);
    expect((user + system) / 50 / 1000).toBeLessThan(2);
  });
});
