import { describe, expect, it } from 'vitest';
import { type BlendKey, blendKey } from '../../../src/adapters/blend-key.ts';
import { openPacked } from '../../../src/adapters/pack.ts';
import {
  createResidency,
  type DisposalReason,
  type Residency,
  type ResidencyOptions,
  type ResidentKey,
  type ResidentUse,
} from '../../../src/adapters/residency.ts';
import { heldBytes } from '../../support/held-bytes.ts';
import { makePacked } from '../../support/make-packed.ts';
import { PageMemory } from '../../support/page-memory.ts';
import { tinyBase } from '../../support/tiny-base.ts';

// Blends that have to be merged are residents of their own, one for every set of weights that a request thinks of: however
// many these are, memory is not theirs.

const [plain, merged] = [1, 2].map((seed) => makePacked({ kind: 'lora', rank: 8, seed }));
const wide = makePacked({ kind: 'lora', rank: 64, seed: 3 });

const blendOf = (weight: number): BlendKey =>
  blendKey({
    ...{ merge: 'ties', density: 0.5 },
    parts: [{ generation: plain!.generation, rank: 8, weight }],
  });

function setUp(pages: number, over: Partial<ResidencyOptions> = {}) {
  const disposed: [ResidentKey, DisposalReason][] = [];
  const opened: ResidentKey[] = [];
  const residency = createResidency({
    stepper: new PageMemory(pages),
    baseHash: tinyBase.hash,
    open: async (key) => {
      opened.push(key);
      const file = key === plain!.generation ? plain! : key === blendOf(64) ? wide : merged!;
      return { ...openPacked(file.bytes, file.generation), generation: key };
    },
    onDispose: (key, reason) => disposed.push([key, reason]),
    ...over,
  });
  return { residency, disposed, opened };
}

async function use(residency: Residency, key: ResidentKey): Promise<ResidentUse> {
  const known = residency.acquire(key);
  if (known !== null) return known;
  let wake = (): void => {};
  const load = residency.beginLoad(key, () => wake());
  for (;;) {
    const isWoken = new Promise<void>((resolve) => {
      wake = resolve;
    });
    const progress = load.advance(1e9);
    if (progress === 'done') return residency.acquire(key)!;
    if (progress === 'no-room') throw new Error('no room');
    if (progress === 'reading') await isWoken;
  }
}

const isBlend = (key: ResidentKey): boolean => key.startsWith('blend:');
const blendsIn = (residency: Residency): ResidentKey[] =>
  residency
    .list()
    .map(({ generation }) => generation)
    .filter(isBlend);

describe('merged blends', () => {
  it('of thousands of weights take a few pages and no memory, and put no adapter out', async () => {
    const { residency, disposed } = setUp(64, { blendsMax: 8 });
    (await use(residency, plain!.generation)).release();
    const run = async (from: number, count: number): Promise<void> => {
      for (let i = from; i < from + count; i++) {
        (await use(residency, blendOf(1 + i / 1000))).release();
        expect(blendsIn(residency).length).toBeLessThanOrEqual(8);
      }
    };
    await run(0, 500); // what is compiled and cached once
    disposed.length = 0;
    const before = heldBytes();
    await run(500, 3000);
    expect(disposed).toHaveLength(3000);
    expect(disposed.every(([key, reason]) => isBlend(key) && reason === 'evicted')).toBe(true);
    disposed.length = 0;
    expect(heldBytes() - before).toBeLessThan(1e6); // one blend more would be 33 KB
    expect(residency.acquire(plain!.generation)).not.toBeNull();
    expect(residency.pagesFree).toBe(63 - 1 - 8);
  });

  it('have half of the pages', async () => {
    const { residency, disposed } = setUp(12);
    for (const weight of [1, 2, 3, 4, 5, 6, 7]) {
      (await use(residency, blendOf(weight))).release();
    }
    expect(disposed).toEqual([[blendOf(1), 'evicted']]);
    expect(residency.pagesFree).toBe(11 - 6);
    // One that is larger may be there alone; beside one in use it waits, and puts nothing out in vain.
    const held = await use(residency, blendOf(7));
    await expect(use(residency, blendOf(64))).rejects.toThrow('no room');
    expect(blendsIn(residency)).toHaveLength(6);
    held.release();
    (await use(residency, blendOf(64))).release();
    expect(blendsIn(residency)).toEqual([blendOf(64)]);
  });

  it('that are in use stay: one more is refused, before it is merged', async () => {
    const { residency, opened } = setUp(64, { blendsMax: 2 });
    const first = await use(residency, blendOf(1));
    await use(residency, blendOf(2));
    opened.length = 0;
    await expect(use(residency, blendOf(3))).rejects.toMatchObject({
      code: 'CONTENDED',
      message: '2 merged blends are in use, no more are served at once',
    });
    expect(opened).toEqual([]);
    // Their own weights are no others.
    (await use(residency, blendOf(2))).release();
    first.release();
    await use(residency, blendOf(3));
    expect(blendsIn(residency)).toEqual([blendOf(2), blendOf(3)]);
  });

  it('go least recently used first, when there is no other way', async () => {
    const { residency } = setUp(64, { blendsMax: 3 });
    for (const weight of [1, 2, 3, 1, 4]) (await use(residency, blendOf(weight))).release();
    expect(blendsIn(residency)).toEqual([blendOf(3), blendOf(1), blendOf(4)]);
  });
});
