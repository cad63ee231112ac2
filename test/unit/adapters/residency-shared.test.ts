import { describe, expect, it } from 'vitest';
import type { Generation } from '../../../src/adapters/adapter.ts';
import { openPacked } from '../../../src/adapters/pack.ts';
import {
  type AdapterLoad,
  createResidency,
  type DisposalReason,
  type Residency,
  type ResidencyOptions,
  type ResidentKey,
  type ResidentUse,
} from '../../../src/adapters/residency.ts';
import { GatewayError } from '../../../src/errors.ts';
import { grownBank, type MadeFile, makePacked, tinyModules } from '../../support/make-packed.ts';
import { PageMemory } from '../../support/page-memory.ts';
import { tinyBase } from '../../support/tiny-base.ts';

function setUp(pages: number, files: readonly MadeFile[], over: Partial<ResidencyOptions> = {}) {
  const memory = new PageMemory(pages);
  const disposed: [ResidentKey, DisposalReason][] = [];
  const opened: ResidentKey[] = [];
  const residency = createResidency({
    stepper: memory,
    baseHash: tinyBase.hash,
    open: async (generation) => {
      opened.push(generation);
      const file = files.find((one) => one.generation === generation);
      if (file === undefined) throw new GatewayError('ADAPTER_NOT_FOUND', 'no such blob');
      return openPacked(file.bytes, file.generation);
    },
    onDispose: (generation, reason) => disposed.push([generation, reason]),
    ...over,
  });
  return { memory, residency, disposed, opened };
}

/** Advances as the engine's loop does: again whenever it is told to. */
async function loaded(
  residency: Residency,
  { generation }: { readonly generation: Generation },
  rank?: number,
): Promise<AdapterLoad> {
  let wake = (): void => {};
  const load = residency.beginLoad(generation, () => wake(), rank);
  for (;;) {
    const isWoken = new Promise<void>((resolve) => {
      wake = resolve;
    });
    const progress = load.advance(1e9);
    if (progress === 'done') return load;
    if (progress === 'no-room') throw new Error('no room');
    if (progress === 'reading') await isWoken;
  }
}

async function use(
  residency: Residency,
  file: { readonly generation: Generation },
  rank?: number,
): Promise<ResidentUse> {
  await loaded(residency, file, rank);
  return residency.acquire(file.generation, rank)!;
}

const wide = makePacked({ kind: 'lora', rank: 64, seed: 1 });
const basis = makePacked({ kind: 'basis', rank: 24, seed: 2 });
const [x, y] = [3, 4].map((seed) => makePacked({ kind: 'bank', rank: 8, seed })) as [
  MadeFile,
  MadeFile,
];
const tenant = (seed: number, rank = 20): MadeFile =>
  makePacked({ kind: 'svfit', rank, seed, options: { needs: basis.generation } });
const asking = (bank: MadeFile, seed: number, atoms = 3): MadeFile =>
  makePacked({ kind: 'queryable', rank: 8, seed, atoms, options: { needs: bank.generation } });

describe('a resident grows', () => {
  it('has the pages of the ranks that were asked for, and gets the rest beside its readers', async () => {
    const { residency, memory } = setUp(10, [wide]);
    const few = await use(residency, wide, 4);
    expect([residency.pagesFree, memory.writes]).toEqual([8, 14]);
    const rows = few.rows(4);
    expect(rows).toMatchObject({ pages: [1], rank: 4, gates: null, routing: null, atoms: null });
    expect(residency.acquire(wide.generation)).toBeNull();
    expect(() => few.rows(9)).toThrow('rank 9');
    expect(residency.list()).toMatchObject([{ rank: 8, bytes: 1000 + 1, uses: 1 }]);

    const all = await use(residency, wide);
    expect(all.rows(64).pages).toEqual([1, 2, 3, 4, 5, 6, 7, 8]);
    expect(memory.writes).toBe(8 * 14); // The first page was not written again.
    expect(few.rows(4)).toBe(rows);
    expect(all.rows(4)).toBe(rows);
    expect(few.rows(9).pages).toEqual([1, 2]);
  });

  it('keeps what it has when there is no room for the rest, or that is abandoned', async () => {
    const { residency, disposed } = setUp(9, [wide, basis]);
    const few = await use(residency, wide, 8);
    const other = await use(residency, basis, 8);
    const load = residency.beginLoad(wide.generation, () => {});
    await Promise.resolve().then(() => {});
    await loaded(residency, basis, 8);
    expect(load.advance(1)).toBe('no-room');
    other.release();
    expect(load.advance(1)).toBe('more');
    residency.unload(wide.generation);
    load.abandon();
    expect(disposed).toEqual([
      [basis.generation, 'evicted'],
      [wide.generation, 'load-abandoned'],
    ]);
    expect(few.rows(8).pages).toEqual([1]);
    few.release();
    expect([residency.list(), residency.pagesFree]).toEqual([[], 8]);
  });

  it('writes what a second caller asks for in the load that is running', async () => {
    const { residency } = setUp(10, [wide]);
    const first = residency.beginLoad(wide.generation, () => {}, 8);
    expect(residency.beginLoad(wide.generation, () => {}, 16)).toBe(first);
    expect((await loaded(residency, wide, 8)).advance(1)).toBe('done');
    expect(residency.acquire(wide.generation, 16)).not.toBeNull();
    expect(residency.acquire(wide.generation, 17)).toBeNull();
  });
});

describe('svfit', () => {
  it('shares the pages of one basis: a tenant is its numbers', async () => {
    const tenants = [5, 6, 7].map((seed) => tenant(seed));
    const { residency, opened, memory } = setUp(4, [basis, ...tenants]);
    const uses = [];
    for (const one of tenants) uses.push(await use(residency, one));
    expect([residency.pagesFree, memory.writes]).toEqual([0, 3 * 14]);
    expect(opened.filter((key) => key === basis.generation)).toHaveLength(1);
    const states = new Map(residency.list().map((state) => [state.generation, state]));
    expect(states.get(basis.generation)).toMatchObject({ uses: 3, rank: 24, bytes: 3000 });
    for (const [i, one] of uses.entries()) {
      // 14 modules of 20 f32.
      expect(states.get(tenants[i]!.generation)).toMatchObject({ uses: 1, bytes: 14 * 20 * 4 });
      const { pages, gates } = one.rows(12);
      expect(pages).toEqual([1, 2]);
      const values = openPacked(tenants[i]!.bytes, tenants[i]!.generation).floats.get(
        'gates',
      )!.values;
      for (const [module] of tinyModules.entries()) {
        const mine = gates!.subarray(module * 16, (module + 1) * 16);
        const want = values.subarray(module * 20, module * 20 + 12);
        expect(mine).toEqual(Float32Array.of(...want, 0, 0, 0, 0));
      }
    }
    expect(uses[0]!.rows(12)).toBe(uses[0]!.rows(12));
  });

  it('loads of the basis what a rank needs', async () => {
    const { residency } = setUp(4, [basis, tenant(5)]);
    const few = await use(residency, tenant(5), 8);
    expect(residency.pagesFree).toBe(2);
    expect(residency.acquire(tenant(5).generation, 9)).toBeNull();
    const all = await use(residency, tenant(5));
    expect(residency.pagesFree).toBe(0);
    expect([few.rows(8).pages, all.rows(20).pages]).toEqual([[1], [1, 2, 3]]);
  });

  it('keeps the basis while a tenant is in use or pinned, and goes with it', async () => {
    const other = makePacked({ kind: 'lora', rank: 24, seed: 9 });
    const { residency, disposed } = setUp(4, [basis, tenant(5), other]);
    const one = await use(residency, tenant(5));
    await expect(loaded(residency, other)).rejects.toThrow('no room');
    one.release();
    residency.pin([tenant(5).generation]);
    await expect(loaded(residency, other)).rejects.toMatchObject({ code: 'NO_CAPACITY' });
    residency.pin([]);
    await loaded(residency, other);
    expect(disposed.slice(-2)).toEqual([
      [basis.generation, 'evicted'],
      [tenant(5).generation, 'basis-evicted'],
    ]);
    expect(residency.acquire(tenant(5).generation)).toBeNull();
  });

  it('lets two tenants wait for one basis, and one of them go', async () => {
    const { residency } = setUp(4, [basis, tenant(5), tenant(6)]);
    const loads = [5, 6].map((seed) => residency.beginLoad(tenant(seed).generation, () => {}));
    for (let i = 0; i < 8; i++) await null;
    expect(loads.map((load) => load.advance(1))).toEqual(['reading', 'reading']);
    loads[0]!.abandon();
    await loaded(residency, tenant(6));
    expect(residency.acquire(tenant(6).generation)).not.toBeNull();
    expect(residency.acquire(tenant(5).generation)).toBeNull();
  });

  it.each<[string, MadeFile]>([
    ['ranks beyond its basis', tenant(5, 25)],
    [
      'a basis that is none',
      makePacked({ kind: 'svfit', rank: 8, seed: 5, options: { needs: wide.generation } }),
    ],
  ])('refuses %s', async (_, file) => {
    const { residency } = setUp(12, [basis, wide, file]);
    await expect(loaded(residency, file)).rejects.toMatchObject({ code: 'ADAPTER_CORRUPT' });
    expect(residency.list().map(({ generation }) => generation)).not.toContain(file.generation);
  });

  it('says so when the basis is not there', async () => {
    const { residency } = setUp(4, [tenant(5)]);
    await expect(loaded(residency, tenant(5))).rejects.toMatchObject({ code: 'ADAPTER_NOT_FOUND' });
  });

  it('drops the least recently used tenant when their numbers are too many', async () => {
    const tenants = [5, 6, 7].map((seed) => tenant(seed));
    const { residency, disposed } = setUp(4, [basis, ...tenants], { floatBytesMax: 2500 });
    const held = await use(residency, tenants[0]!); // 1120 bytes
    (await use(residency, tenants[1]!)).release();
    (await use(residency, tenants[2]!)).release();
    expect(disposed).toEqual([[tenants[1]!.generation, 'evicted']]);
    held.release();
  });
});

describe('queryable', () => {
  it('has its bank in the stepper, and may have fewer keys than that has atoms', async () => {
    const [one, two] = [asking(x, 5), asking(x, 6, 2)];
    const { residency, memory } = setUp(6, [x, y, one, two]);
    const first = await use(residency, one);
    expect(memory.bank).toMatchObject({ id: x.generation, K: 3, dq: 4, r: 8, blockLayers: 1 });
    expect(first.labels?.shape).toEqual([3, 64]);
    const { atoms } = (await use(residency, two)).rows(8);
    expect(atoms).toMatchObject({ bank: x.generation, topK: 2 });
    expect([...atoms!.bias]).toEqual([0, 0]);
    expect(atoms!.keys).toHaveLength(8);
    // Whatever the rank: atoms mix them all.
    expect(first.rows(1)).toMatchObject({ rank: 8, pages: [1] });
  });

  it('waits for a second bank while the first is in use, and takes its place afterwards', async () => {
    const { residency, memory, disposed } = setUp(6, [x, y, asking(x, 5), asking(y, 6)]);
    const first = await use(residency, asking(x, 5));
    await expect(loaded(residency, asking(y, 6))).rejects.toThrow('no room');
    expect(memory.bank?.id).toBe(x.generation);
    first.release();
    await loaded(residency, asking(y, 6));
    expect(memory.bank?.id).toBe(y.generation);
    expect(disposed).toContainEqual([asking(x, 5).generation, 'bank-replaced']);
    expect(residency.acquire(asking(x, 5).generation)).toBeNull();
  });

  it('refuses a second bank while an adapter of the first is pinned', async () => {
    const { residency } = setUp(6, [x, y, asking(x, 5), asking(y, 6)]);
    (await use(residency, asking(x, 5))).release();
    residency.pin([asking(x, 5).generation]);
    await expect(loaded(residency, asking(y, 6))).rejects.toMatchObject({ code: 'UNSUPPORTED' });
    residency.pin([]);
    await loaded(residency, asking(y, 6));
  });

  it('keeps what is for a bank that grows, also while it is in use', async () => {
    const larger = grownBank(x, 2);
    const [old, late, young] = [asking(x, 5), asking(x, 6), asking(larger, 7, 5)];
    const { residency, memory, disposed } = setUp(6, [
      x,
      y,
      larger,
      old,
      late,
      young,
      asking(y, 8),
    ]);
    const first = await use(residency, old);
    const rows = first.rows(8);
    const second = await use(residency, young);
    expect(memory.bank).toMatchObject({ id: larger.generation, K: 5 });
    expect(memory.bank?.covers).toEqual(new Set([x.generation]));
    expect(second.rows(8).atoms).toMatchObject({ bank: larger.generation });
    expect(first.rows(8)).toBe(rows);
    // Whoever comes later for the bank as it was needs no other.
    expect((await use(residency, late)).rows(8).atoms).toMatchObject({ bank: x.generation });
    expect(memory.bank?.id).toBe(larger.generation);
    expect(disposed).toEqual([]);
    await expect(loaded(residency, asking(y, 8))).rejects.toThrow('no room');
  });

  it('finds that the bank which is there begins with another', async () => {
    const larger = grownBank(x, 1);
    const { residency, memory } = setUp(6, [x, larger, asking(x, 5), asking(larger, 6)]);
    await use(residency, asking(larger, 6));
    expect(memory.bank?.covers?.size).toBe(0);
    const { atoms } = (await use(residency, asking(x, 5))).rows(8);
    expect(memory.bank?.id).toBe(larger.generation);
    expect(memory.bank?.covers?.has(atoms!.bank)).toBe(true);
  });

  it('has no more keys than its own bank, whatever that has grown to', async () => {
    const larger = grownBank(x, 2);
    const greedy = asking(x, 5, 4);
    const { residency } = setUp(6, [x, larger, greedy, asking(larger, 6)]);
    await use(residency, asking(larger, 6));
    await expect(loaded(residency, greedy)).rejects.toMatchObject({ code: 'ADAPTER_CORRUPT' });
  });

  it.each<[string, MadeFile]>([
    ['more keys than the bank has atoms', asking(x, 5, 4)],
    ['a bank that is none', asking(wide, 5)],
    [
      'another rank than the bank’s',
      makePacked({ kind: 'queryable', rank: 16, seed: 5, options: { needs: x.generation } }),
    ],
    ['to load a bank as an adapter', y],
  ])('refuses %s', async (_, file) => {
    const { residency } = setUp(12, [x, y, wide, file]);
    await expect(loaded(residency, file)).rejects.toMatchObject({ code: 'ADAPTER_CORRUPT' });
    expect(residency.pagesFree).toBe(11);
  });
});
