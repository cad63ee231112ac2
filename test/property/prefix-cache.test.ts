import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { blockCells, blocksFor, KvPool } from '../../src/engine/kv-pool.ts';
import type { AdapterUse } from '../../src/engine/messages.ts';
import { type CellHold, type CellIdentity, PrefixCache } from '../../src/engine/prefix-cache.ts';
import { blendOf, useOf } from '../support/adapter-use.ts';
import { fakeGeneration } from '../support/fake-stepper.ts';

// Random sequences over a small pool against a memory that remembers, for every cell, what it was computed from. What
// the cache says needs no compute must lie in the run, cell for cell, and nothing live may ever be written over.

const [one, two] = [fakeGeneration(1), fakeGeneration(2)];
const uses: ReadonlyArray<AdapterUse | null> = [
  null,
  useOf(one, 4),
  useOf(one, 5),
  useOf(two, 4),
  blendOf([[one, 4, 0.5]]),
  blendOf([
    [one, 4, 1],
    [two, 4, 1],
  ]),
  blendOf([
    [one, 4, 1],
    [two, 4, 0.5],
  ]),
  blendOf([[one, 4, 1]], { system: { generation: two, rank: 4, weight: 1 } }),
  blendOf([[one, 4, 1]], { merge: 'ties' }),
  blendOf([[one, 4, 1]], { merge: 'ties', density: 0.5 }),
  blendOf([[one, 4, 1]], { flyTopK: 4 }),
  blendOf([[one, 4, 1]], { prior: { tokens: [1, 2], strength: 1 } }),
  blendOf([[one, 4, 1]], { prior: { tokens: [1, 2], strength: 2 } }),
  blendOf([[one, 4, 1]], { prior: { tokens: [12], strength: 1 } }),
];
const identities: readonly CellIdentity[] = [
  ...uses.map((use) => ({ baseHash: 'base', use, tenant: 'a' })),
  { baseHash: 'base', use: null, tenant: 'b' },
  { baseHash: 'other', use: null, tenant: 'a' },
  // The same characters, cut elsewhere between the parts.
  { baseHash: 'bas', use: null, tenant: 'ea' },
];

interface Live {
  readonly hold: CellHold;
  readonly identity: number;
  readonly tokens: Int32Array;
  readonly cellBase: number;
  readonly cells: number;
  filled: number;
}

const action = fc.oneof(
  {
    weight: 4,
    arbitrary: fc.record({
      kind: fc.constant('admit' as const),
      identity: fc.oneof(
        { weight: 3, arbitrary: fc.constant(0) },
        { weight: 1, arbitrary: fc.nat(identities.length - 1) },
      ),
      // Two families of prompts that differ at one place at most: long common prefixes, and near misses.
      family: fc.nat(1),
      length: fc.integer({ min: 1, max: 90 }),
      change: fc.option(fc.nat(89), { freq: 3, nil: null }),
      answer: fc.integer({ min: 1, max: 40 }),
    }),
  },
  {
    weight: 4,
    arbitrary: fc.record({
      kind: fc.constantFrom('fill' as const, 'retire' as const, 'retire' as const, 'drop' as const),
      pick: fc.nat(),
      count: fc.constantFrom(10, 50, 130, 130),
    }),
  },
);

type Action = typeof action extends fc.Arbitrary<infer T> ? T : never;

class Memory {
  readonly cells: Array<string | null>;
  readonly live: Live[] = [];
  constructor(blocks: number) {
    this.cells = new Array<string | null>(blocks * blockCells).fill(null);
  }

  /** What cell i of a sequence holds: everything up to its own token decides it. */
  content(identity: number, tokens: Int32Array, i: number): string {
    return `${identity}:${tokens.subarray(0, i + 1).join()}`;
  }

  fill(one: Live, count: number): void {
    for (; one.filled < Math.min(count, one.cells); one.filled++) {
      this.cells[one.cellBase + one.filled] = this.content(one.identity, one.tokens, one.filled);
    }
  }

  /** Blocks of the longest stretch that no live sequence owns. */
  longestFree(): number {
    const taken = new Array<boolean>(this.cells.length / blockCells).fill(false);
    taken[0] = true;
    for (const { hold } of this.live) {
      taken.fill(true, hold.run.first, hold.run.first + hold.run.blocks);
    }
    return Math.max(
      ...taken
        .map((isTaken, i) => (isTaken ? 0 : i))
        .map((_, i) => {
          const end = taken.indexOf(true, i);
          return (end < 0 ? taken.length : end) - i;
        }),
    );
  }
}

function run(cache: PrefixCache, memory: Memory, one: Action): void {
  if (one.kind === 'admit') {
    const prompt = Int32Array.from({ length: one.length }, (_, i) => (i * 7 + one.family) % 50);
    if (one.change !== null && one.change < prompt.length) prompt[one.change] = 99;
    const tokens = Int32Array.from([...prompt, ...new Array<number>(one.answer).fill(one.family)]);
    const cells = tokens.length - 1;
    const room = memory.longestFree();
    const admission = cache.admit(identities[one.identity]!, prompt, cells);
    expect(admission !== null).toBe(room >= blocksFor(cells));
    if (admission === null) return;
    const { hold, cellBase, cachedTokens, copyFrom } = admission;
    expect(hold.run.blocks).toBeGreaterThanOrEqual(blocksFor(cells));
    expect(cachedTokens).toBeLessThan(prompt.length);
    if (copyFrom !== null) {
      expect(Math.abs(copyFrom - cellBase)).toBeGreaterThanOrEqual(cachedTokens);
      memory.cells.copyWithin(cellBase, copyFrom, copyFrom + cachedTokens);
    }
    for (const other of memory.live) {
      const [a, b] = [other.hold.run, hold.run];
      expect(a.first + a.blocks <= b.first || b.first + b.blocks <= a.first).toBe(true);
    }
    for (let i = 0; i < cachedTokens; i++) {
      expect(memory.cells[cellBase + i]).toBe(memory.content(one.identity, tokens, i));
    }
    const { identity } = one;
    memory.live.push({ hold, identity, tokens, cellBase, cells, filled: cachedTokens });
    return;
  }
  const live = memory.live[one.pick % Math.max(1, memory.live.length)];
  if (live === undefined) return;
  if (one.kind === 'fill') {
    memory.fill(live, one.count);
    cache.fill(live.hold, live.tokens, live.filled);
    return;
  }
  memory.live.splice(memory.live.indexOf(live), 1);
  if (one.kind === 'retire') cache.retire(live.hold);
  else cache.drop(live.hold);
}

describe('PrefixCache', () => {
  it('hands out only cells that hold what it says, and admits whatever has room', () => {
    let hits = 0;
    fc.assert(
      fc.property(
        fc.integer({ min: 4, max: 30 }),
        fc.array(action, { maxLength: 120, size: 'max' }),
        (blocks, actions) => {
          const pool = new KvPool(blocks * blockCells);
          const cache = new PrefixCache({ pool, tenantShareMax: 0.6 });
          const memory = new Memory(blocks);
          for (const one of actions) {
            run(cache, memory, one);
            const used = memory.live.reduce((sum, live) => sum + live.hold.run.blocks, 0);
            expect(cache.cellsUsed()).toBe(used * blockCells);
            for (const tenant of ['a', 'b', '1a']) {
              expect(cache.cellsIdle(tenant)).toBeLessThanOrEqual(0.6 * blocks * blockCells);
            }
            expect(pool.freeBlocks * blockCells + cache.cellsUsed() + cache.cellsIdle()).toBe(
              (blocks - 1) * blockCells,
            );
          }
          hits += cache.counters().tokensHit;
          for (const live of memory.live) cache.retire(live.hold);
          const all = cache.admit(identities[0]!, Int32Array.of(1), (blocks - 1) * blockCells);
          expect(all).not.toBeNull();
        },
      ),
      { numRuns: 200 },
    );
    expect(hits).toBeGreaterThan(1000); // it was about something
  });

  it('no two identities share a cell, and each finds its own', () => {
    const tokens = Int32Array.from({ length: 40 }, (_, i) => i);
    for (const one of identities) {
      const cache = new PrefixCache({ pool: new KvPool(20 * blockCells), tenantShareMax: 1 });
      const { hold } = cache.admit(one, tokens, 40)!;
      cache.fill(hold, tokens, 40);
      for (const other of identities) {
        const { hold: its, cachedTokens } = cache.admit(other, tokens, 40)!;
        expect(cachedTokens).toBe(other === one ? 32 : 0);
        cache.drop(its);
      }
    }
  });

  it('copies while the source lives or is longer, continues in place when it is a whole prefix', () => {
    const cache = new PrefixCache({ pool: new KvPool(20 * blockCells), tenantShareMax: 1 });
    const identity = identities[0]!;
    const tokens = Int32Array.from({ length: 100 }, (_, i) => i);
    const first = cache.admit(identity, tokens.subarray(0, 40), 48)!;
    cache.fill(first.hold, tokens, 48);
    const beside = cache.admit(identity, tokens.subarray(0, 60), 70)!;
    expect(beside).toMatchObject({ cachedTokens: 48, copyFrom: first.cellBase });
    cache.drop(beside.hold);
    cache.retire(first.hold);
    const shorter = cache.admit(identity, tokens.subarray(0, 40), 48)!;
    expect(shorter).toMatchObject({ cachedTokens: 32, copyFrom: first.cellBase });
    cache.drop(shorter.hold);
    const longer = cache.admit(identity, tokens.subarray(0, 60), 90)!;
    expect(longer).toMatchObject({ cachedTokens: 48, copyFrom: null, cellBase: first.cellBase });
  });

  it('evicts the least recently used first, and nothing when that would not help', () => {
    const cache = new PrefixCache({ pool: new KvPool(10 * blockCells), tenantShareMax: 1 });
    const identity = identities[0]!;
    const tokensOf = (n: number): Int32Array => Int32Array.from({ length: 33 }, (_, i) => n + i);
    for (const n of [100, 200, 300]) {
      const { hold } = cache.admit(identity, tokensOf(n), 32)!;
      cache.fill(hold, tokensOf(n), 32);
      cache.retire(hold);
    }
    const live = cache.admit(identity, tokensOf(100), 33)!; // touches the first; it grows in place or is copied
    expect(live.cachedTokens).toBe(32);
    const idle = cache.cellsIdle();
    expect(cache.admit(identity, tokensOf(900), 9 * blockCells)).toBeNull();
    expect(cache.cellsIdle()).toBe(idle);
    const { hold } = cache.admit(identity, tokensOf(900), 2 * blockCells)!;
    cache.drop(hold);
    expect(cache.admit(identity, tokensOf(300), 33)!.cachedTokens).toBe(32);
    expect(cache.admit(identity, tokensOf(200), 33)!.cachedTokens).toBe(0);
  });

  // Found in review: a waiting sequence asks each step, and a thousand of them hashed their prompts a thousand times.
  it('does not look at the tokens of a prompt that has no room', () => {
    const cache = new PrefixCache({ pool: new KvPool(10 * blockCells), tenantShareMax: 1 });
    const tokens = Int32Array.from({ length: 100 }, (_, i) => i);
    const { hold } = cache.admit(identities[0]!, tokens, 100)!;
    cache.fill(hold, tokens, 100);
    const untouchable = new Proxy(tokens, {
      get: (_, name) => {
        throw new Error(`read ${String(name)}`);
      },
    });
    expect(cache.admit(identities[0]!, untouchable, 100)).toBeNull();
    cache.retire(hold);
    expect(() => cache.admit(identities[0]!, untouchable, 100)).toThrow('read length');
  });
});
