import { describe, expect, it } from 'vitest';
import type { Generation } from '../../../src/adapters/adapter.ts';
import { createHostTier } from '../../../src/adapters/host-tier.ts';
import { openPacked } from '../../../src/adapters/pack.ts';
import type { ResidentKey } from '../../../src/adapters/residency.ts';
import { makePacked } from '../../support/make-packed.ts';

const files = [1, 2, 3].map((seed) => makePacked({ kind: 'lora', rank: 8, seed }));
const [one, two, three] = files.map(({ generation }) => generation) as [
  Generation,
  Generation,
  Generation,
];
const bytesEach = openPacked(files[0]!.bytes, one).bytes;

function setUp(bytesMax: number) {
  const reads: string[] = [];
  const disposed: [string, string][] = [];
  const tier = createHostTier({
    bytesMax,
    read: async (key) => {
      reads.push(key);
      const file = files.find(({ generation }) => generation === key);
      if (file === undefined) throw new Error('no such file');
      return openPacked(file.bytes, file.generation);
    },
    onDispose: (key, reason) => disposed.push([key, reason]),
  });
  return { tier, reads, disposed };
}

describe('createHostTier', () => {
  it('reads a file once while there is room for it', async () => {
    const { tier, reads } = setUp(1e6);
    const first = await tier.open(one);
    expect(await tier.open(one)).toBe(first);
    expect(reads).toEqual([one]);
    expect(tier.has(one)).toBe(true);
    expect(tier.bytes).toBeGreaterThanOrEqual(bytesEach);
  });

  it('lets the least recently used go, and never holds more bytes than it may', async () => {
    const { tier, reads, disposed } = setUp(2 * bytesEach + 2000);
    for (const key of [one, two, one, three]) await tier.open(key);
    expect(disposed).toEqual([[two, 'evict']]);
    expect(tier.bytes).toBeLessThanOrEqual(2 * bytesEach + 2000);
    await tier.open(two);
    expect(reads).toEqual([one, two, three, two]);
  });

  it('reads once for two who ask at once, and again after a failure', async () => {
    const { tier, reads } = setUp(1e6);
    const [x, y] = await Promise.all([tier.open(one), tier.open(one)]);
    expect(x).toBe(y);
    const missing: Generation = `sha256:${'f'.repeat(64)}`;
    const answers = await Promise.allSettled([tier.open(missing), tier.open(missing)]);
    expect(answers.map(({ status }) => status)).toEqual(['rejected', 'rejected']);
    await expect(tier.open(missing)).rejects.toThrow('no such file');
    expect(reads).toEqual([one, missing, missing]);
  });

  it('tells what it has whenever that has changed', async () => {
    const { tier } = setUp(2 * bytesEach + 2000);
    const told = (): Set<ResidentKey> | null => {
      const keys = tier.changed();
      return keys === null ? null : new Set(keys);
    };
    expect(told()).toBeNull();
    await tier.open(one);
    expect(told()).toEqual(new Set([one]));
    await tier.open(one);
    expect(told()).toBeNull();
    for (const key of [two, three]) await tier.open(key);
    expect(told()).toEqual(new Set([two, three]));
    const none = setUp(0);
    await none.tier.open(one);
    expect(none.tier.changed()).toBeNull();
  });

  it('keeps nothing of 0 bytes, and no file that is larger than all of it', async () => {
    for (const bytesMax of [0, bytesEach - 1]) {
      const { tier, reads } = setUp(bytesMax);
      await tier.open(one);
      await tier.open(one);
      expect([reads.length, tier.bytes, tier.has(one)]).toEqual([2, 0, false]);
    }
  });
});
