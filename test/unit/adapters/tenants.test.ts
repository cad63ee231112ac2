import { mkdtempSync, rmSync, statSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import type { Generation, PackedKind } from '../../../src/adapters/adapter.ts';
import { blobPath, createBlobStore } from '../../../src/adapters/blobs.ts';
import { createHostTier } from '../../../src/adapters/host-tier.ts';
import { readPacked } from '../../../src/adapters/pack.ts';
import { createResidency } from '../../../src/adapters/residency.ts';
import { makePacked } from '../../support/make-packed.ts';
import { PageMemory } from '../../support/page-memory.ts';
import { tinyBase } from '../../support/tiny-base.ts';

const count = 1000;
const rank = 16;
const moduleCount = 14;

describe('a thousand tenants of one base', () => {
  const folder = mkdtempSync(join(tmpdir(), 'rankgate-tenants-'));
  const blobs = createBlobStore(folder);
  const bytesOf = (generation: Generation): number => statSync(blobPath(folder, generation)).size;
  let basis: Generation;
  let loraBytes: number;

  async function store(kind: PackedKind, seeds: number): Promise<Generation[]> {
    const stored: Generation[] = [];
    for (let seed = 1; seed <= seeds; seed++) {
      const options = kind === 'svfit' ? { needs: basis } : {};
      stored.push(await blobs.put(makePacked({ kind, rank, seed, options }).bytes));
    }
    return stored;
  }

  function open(pages: number) {
    const memory = new PageMemory(pages);
    const host = createHostTier({
      bytesMax: 1e9,
      read: (key) => readPacked(blobPath(folder, key as Generation), key as Generation),
    });
    const residency = createResidency({
      stepper: memory,
      baseHash: tinyBase.hash,
      open: (key) => host.open(key),
    });
    return { host, memory, residency };
  }

  async function load(residency: ReturnType<typeof open>['residency'], generation: Generation) {
    let wake = (): void => {};
    const load = residency.beginLoad(generation, () => wake());
    for (;;) {
      const isWoken = new Promise<void>((resolve) => {
        wake = resolve;
      });
      const progress = load.advance(1e9);
      if (progress === 'done') return;
      expect(progress).not.toBe('no-room');
      if (progress === 'reading') await isWoken;
    }
  }

  beforeAll(async () => {
    [basis] = (await store('basis', 1)) as [Generation];
    const [lora] = (await store('lora', 1)) as [Generation];
    loraBytes = bytesOf(lora);
  });
  afterAll(() => rmSync(folder, { recursive: true, force: true }));

  it('svfit: at most 1/16 of a LoRA on disk, no page of memory, all resident at once', async () => {
    const tenants = await store('svfit', count);
    expect(new Set(tenants).size).toBe(count);
    const disk = tenants.reduce((sum, one) => sum + bytesOf(one), 0) / count;
    expect(disk).toBeLessThanOrEqual(loraBytes / 16);

    const { residency, memory, host } = open(3);
    for (const one of tenants) await load(residency, one);
    const states = residency.list().filter(({ generation }) => generation !== basis);
    expect(states).toHaveLength(count);
    expect(memory.writes).toBe(2 * moduleCount); // The basis, once.
    const uses = tenants.map((one) => residency.acquire(one)!);
    const rows = uses.map((use) => use.rows(rank));
    expect(new Set(rows.map(({ pages }) => pages.join())).size).toBe(1);
    expect(new Set(rows.map(({ gates }) => gates![0])).size).toBe(count);
    // Their numbers as they were read, and as the kernels take them: 4 bytes a rank and module each.
    const own = residency.list().filter(({ generation }) => generation !== basis);
    const floats = 4 * rank * moduleCount;
    for (const { bytes } of own) expect(bytes).toBe(2 * floats + 1);
    expect(host.bytes / count).toBeLessThan(loraBytes / 16);
  }, 120_000);

  it('fly: at most 0.6 of a LoRA on disk, and A comes back from the seed', async () => {
    const tenants = await store('fly', count);
    expect(new Set(tenants).size).toBe(count);
    const disk = tenants.reduce((sum, one) => sum + bytesOf(one), 0) / count;
    expect(disk).toBeLessThanOrEqual(0.6 * loraBytes);

    // In memory A is there like any other's: pages for eight hold the last eight.
    const { residency } = open(17);
    for (const one of tenants.slice(0, 40)) await load(residency, one);
    expect(residency.list()).toHaveLength(8);
    const [state] = residency.list();
    expect(state!.bytes).toBe(2 * 1000 + 4 * rank * moduleCount);
  }, 120_000);
});
