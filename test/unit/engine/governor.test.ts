import { describe, expect, it } from 'vitest';
import { type GovernedRow, planRanks } from '../../../src/engine/governor.ts';
import type { Moment } from '../../../src/engine/scheduler.ts';

const never = Number.POSITIVE_INFINITY;
const ladder = [0, 1, 2, 4, 8, 16, 32].map((rank) => ({
  ...{ rank, ranks: rank },
  quality: Math.sqrt(rank / 32),
}));

/** A decoding row at `rank`, which may have any of the ladder, with `pace` ms a step. */
function row(id: string, rank: number, pace: number, over: Partial<GovernedRow> = {}): GovernedRow {
  return {
    ...{ id, tenant: 't', arrival: 0, priority: 5, dueMs: never, promptTokensLeft: 0 },
    ...{ position: 100, lastStep: 0, rankStep: -never, hasBegun: true },
    ...{ rank, rowRanks: rank, ladder, paceMs: () => pace },
    ...over,
  };
}

// Rows take 8 + 2 ms each, and 0.5 ms a rank.
const moment: Moment = {
  ...{ step: 400, nowMs: 1000, creditMs: () => 0 },
  costs: { step: 8, decodeRow: 2, prefillToken: 1, decodeRank: 0.5, prefillRank: 0, kvCell: 0 },
};
const told = (rows: readonly GovernedRow[], at: Moment = moment): string[] =>
  planRanks(rows, at).map(({ row: { id }, rank, reason }) => `${id} ${rank} ${reason}`);

describe('planRanks', () => {
  it('takes ranks from the rows of a batch that is too slow for one of them', () => {
    // 12 + 32 ms; with 30 ms a step 32 ranks fit, of which 0.9 are given away: 16 each would be too many.
    const orders = planRanks([row('a', 32, 30), row('b', 32, 200)], moment);
    const ranks = new Map(orders.map(({ row: { id }, rank }) => [id, rank]));
    const [a, b] = [ranks.get('a') ?? 32, ranks.get('b') ?? 32];
    expect(12 + 0.5 * (a + b)).toBeLessThanOrEqual(30);
    expect(a + b).toBeGreaterThanOrEqual(24);
    expect(orders.every(({ reason }) => reason === 'late')).toBe(true);
  });

  it('leaves alone what is in time, looks at every second step, and does nothing without costs', () => {
    const rows = [row('a', 32, 50), row('b', 32, 200)];
    expect(told(rows)).toEqual([]);
    const slow = [row('a', 32, 30), row('b', 32, 200)];
    expect(told(slow)).not.toEqual([]);
    expect(told(slow, { ...moment, step: 401 })).toEqual([]);
    expect(told(slow, { ...moment, costs: null })).toEqual([]);
  });

  it('gives the smallest rank to a row that is late whatever happens, and does not slow it down for that', () => {
    expect(told([row('late', 32, 9), row('free', 32, never)])).toEqual(['late 0 late']);
    expect(told([row('over', 8, -20), row('free', 32, never)])).toEqual(['over 0 late']);
    const least = ladder.filter(({ rank }) => rank >= 4);
    expect(told([row('least', 16, -20, { ladder: least })])).toEqual(['least 4 late']);
  });

  it('does not touch who states no time or fixed the rank, but counts it', () => {
    const fixed = row('fixed', 32, 20, { ladder: [] });
    // 12 + 16 ms of its own: it is late whatever happens to the other.
    expect(told([fixed, row('a', 32, never)])).toEqual([]);
    // 12 + 16 of the fixed one and 16 of the other are too many for 35 ms; 12 of them fit.
    const [order] = told([row('fixed', 32, 35, { ladder: [] }), row('a', 32, 100)]);
    expect(order).toMatch(/^a (4|8) late$/);
  });

  it('gives ranks back when there is time, not before 32 steps have passed', () => {
    const low = (step: number): string[] =>
      told([row('a', 4, 60, { rankStep: 400 }), row('b', 32, 60)], { ...moment, step });
    expect(low(404)).toEqual([]);
    expect(low(428)).toEqual([]);
    expect(low(432)).toEqual(['a 32 slack']);
    // 12 + 32 ms fit into 46 ms, not into 0.9 of what is spare.
    expect(told([row('a', 4, 46), row('b', 32, never)])).toEqual(['a 16 slack']);
  });

  it('does not undo at once what it did', () => {
    for (const pace of [14, 20, 25, 31, 38, 43]) {
      let rows = [row('a', 32, pace), row('b', 32, 3 * pace), row('c', 16, never, { ladder: [] })];
      let changes = 0;
      for (let step = 400; step < 800; step++) {
        const orders = planRanks(rows, { ...moment, step });
        changes += orders.length;
        rows = rows.map((one) => {
          const order = orders.find(({ row: { id } }) => id === one.id);
          if (order === undefined) return one;
          return { ...one, rank: order.rank, rowRanks: order.rank, rankStep: step };
        });
      }
      expect(changes, `${pace} ms`).toBeLessThanOrEqual(2);
    }
  });

  it('makes room for prompts that have to begin', () => {
    const prompt = row('p', 0, never, { promptTokensLeft: 100, dueMs: 1400, ladder: [] });
    const rows = [row('a', 32, 46), row('b', 32, never)];
    expect(told(rows)).toEqual([]);
    // A quarter of the time until its first token is due is the prompt's own.
    const orders = planRanks([...rows, prompt], moment);
    const ranks = 64 + orders.reduce((sum, { row: { rank }, rank: to }) => sum + to - rank, 0);
    expect(12 + 0.5 * ranks).toBeLessThanOrEqual(0.75 * 46);
    expect(told([...rows, { ...prompt, dueMs: 900 }])).toEqual([]); // too late already
  });

  it('takes ranks from prompts that together cannot begin in time, where that costs least', () => {
    const costs = { ...moment.costs!, prefillRank: 0.05 };
    const prompt = (id: string, dueMs: number, over: Partial<GovernedRow> = {}): GovernedRow =>
      row(id, 32, never, { promptTokensLeft: 100, position: 0, hasBegun: false, dueMs, ...over });
    const share = (rank: number, ms: number): number => (100 * (1 + 0.05 * rank)) / ms;
    const at = { ...moment, costs };
    expect(told([prompt('p', 1600)], at)).toEqual([]); // 260 of 600 ms
    const two = [prompt('p', 1600), prompt('q', 2000)];
    const orders = planRanks(two, at);
    const ranks = new Map(orders.map(({ row: { id }, rank }) => [id, rank]));
    const all = (p: number, q: number): number => share(p, 600) + share(q, 1000);
    const [p, q] = [ranks.get('p') ?? 32, ranks.get('q') ?? 32];
    expect(all(32, 32)).toBeGreaterThan(0.5);
    expect(all(p, q)).toBeLessThanOrEqual(0.5);
    expect(orders.every(({ reason }) => reason === 'late')).toBe(true);
    // No other choice within it has more quality.
    const worth = (rank: number): number => Math.sqrt(rank / 32);
    for (const { rank: a } of ladder) {
      for (const { rank: b } of ladder) {
        if (all(a, b) > 0.5) continue;
        expect(worth(a) + worth(b)).toBeLessThanOrEqual(worth(p) + worth(q) + 0.1);
      }
    }
    // Nobody loses anything for who is too late, or for who fixed its rank when that alone is too much.
    expect(told([prompt('p', 1600), prompt('late', 900)], at)).toEqual([]);
    const fixed = prompt('fixed', 1300, { ladder: [] });
    expect(told([fixed], at)).toEqual([]);
    expect(told([fixed, prompt('p', 1600)], at)).toEqual(['p 0 late']);
    // The ranks of a prompt are those of all of it.
    expect(told([fixed, prompt('p', 1600, { hasBegun: true })], at)).toEqual([]);
  });
});
