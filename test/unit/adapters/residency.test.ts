import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import type { Generation } from '../../../src/adapters/adapter.ts';
import type { PackedAdapter } from '../../../src/adapters/pack.ts';
import {
  type AdapterLoad,
  createResidency,
  type DisposalReason,
  type Residency,
  type ResidentKey,
  type ResidentUse,
} from '../../../src/adapters/residency.ts';
import { GatewayError } from '../../../src/errors.ts';
import { projectionShape, projections } from '../../../src/model/decoder-config.ts';
import type { AtomBank, ModuleRef, PageData } from '../../../src/model/stepper.ts';
import { fakeGeneration, fakeManifest } from '../../support/fake-registry.ts';
import { tinyBase } from '../../support/tiny-base.ts';

const { config, hash: baseHash } = tinyBase;

/** Adapter number i has `rank` ranks in `modules` modules; its page p holds 100·i + p in every element of `a`. */
function packedAdapter(i: number, rank: number, modules: readonly ModuleRef[]): PackedAdapter {
  const pages = Math.ceil(rank / 8);
  return {
    generation: generationAt(i),
    manifest: {
      ...fakeManifest(rank),
      baseHash,
      modules: modules.map((m) => ({ ...m, rank, ...projectionShape(config, m.projection) })),
    },
    pages,
    floats: new Map(),
    bytes: 0,
    page(module, index) {
      const isThere = modules.some(
        (m) => m.block === module.block && m.projection === module.projection,
      );
      if (!isThere || index >= pages) return null;
      const shape = projectionShape(config, module.projection);
      return {
        a: new Uint16Array(8 * shape.in).fill(100 * i + index),
        b: new Uint16Array(8 * shape.out),
      };
    },
  };
}

function generationAt(i: number): Generation {
  return fakeGeneration('abcdef0123456789'[i]!);
}

const q0: ModuleRef = { block: 0, projection: 'attn_q' };
const all: readonly ModuleRef[] = [0, 1].flatMap((block) =>
  projections.map((projection) => ({ block, projection })),
);

/** A stepper's pages, remembered: what each module's page holds, or null for zeros. */
class Pages {
  readonly config = config;
  readonly pages: number;
  readonly pageBytes = 1000;
  readonly held: Map<string, number | null> = new Map();
  bank: AtomBank | null = null;

  constructor(pages: number) {
    this.pages = pages;
  }

  writePage(page: number, { block, projection }: ModuleRef, data: PageData | null): void {
    expect(page).toBeGreaterThan(0);
    expect(page).toBeLessThan(this.pages);
    this.held.set(`${page}.${block}.${projection}`, data === null ? null : data.a[0]!);
  }

  setAtomBank(bank: AtomBank | null): void {
    this.bank = bank;
  }

  at(page: number, { block, projection }: ModuleRef): number | null | undefined {
    return this.held.get(`${page}.${block}.${projection}`);
  }
}

function setUp(pages: number, adapters: readonly PackedAdapter[]) {
  const stepper = new Pages(pages);
  const disposed: [ResidentKey, DisposalReason][] = [];
  const residency = createResidency({
    stepper,
    baseHash,
    open: async (generation) => {
      const packed = adapters.find((adapter) => adapter.generation === generation);
      if (packed === undefined) throw new GatewayError('ADAPTER_NOT_FOUND', 'no such blob');
      return packed;
    },
    onDispose: (generation, reason) => disposed.push([generation, reason]),
  });
  return { stepper, residency, disposed };
}

async function read(residency: Residency, generation: Generation): Promise<AdapterLoad> {
  return new Promise((resolve) => {
    const load = residency.beginLoad(generation, () => resolve(load));
    if (load.advance(0) !== 'reading') resolve(load);
  });
}

async function loadWhole(residency: Residency, generation: Generation): Promise<ResidentUse> {
  const load = await read(residency, generation);
  expect(load.advance(Number.POSITIVE_INFINITY)).toBe('done');
  return residency.acquire(generation)!;
}

describe('residency', () => {
  it('zeroes the modules that an adapter lacks, where one with more was before', async () => {
    const adapters = [packedAdapter(0, 8, all), packedAdapter(1, 8, [q0])];
    const { residency, stepper } = setUp(2, adapters);
    (await loadWhole(residency, generationAt(0))).release();
    const use = await loadWhole(residency, generationAt(1));
    expect(use.rows(8).pages).toEqual([1]);
    expect(stepper.at(1, q0)).toBe(100);
    for (const module of all.slice(1)) expect(stepper.at(1, module)).toBeNull();
  });

  it('writes in pieces, and hands nothing out before the last', async () => {
    const { residency } = setUp(4, [packedAdapter(0, 16, all)]);
    const load = await read(residency, generationAt(0));
    let pieces = 0;
    while (load.advance(5_000) === 'more') {
      pieces += 1;
      expect(residency.acquire(generationAt(0))).toBeNull();
    }
    // 2 pages × 2 blocks of 14,848 bytes.
    expect(pieces).toBeGreaterThan(4);
    expect(residency.acquire(generationAt(0))?.rows(16).pages).toEqual([1, 2]);
  });

  it('evicts the least recently used, only what is unused, and only when that helps', async () => {
    const adapters = [0, 1, 2].map((i) => packedAdapter(i, 8, [q0]));
    const large = packedAdapter(3, 24, [q0]);
    const { residency, disposed } = setUp(4, [...adapters, large]);
    const uses = [];
    for (const i of [0, 1, 2]) uses.push(await loadWhole(residency, generationAt(i)));
    uses[1]!.release();
    uses[0]!.release();
    const load = await read(residency, generationAt(3));
    expect(load.advance(1)).toBe('no-room');
    expect(disposed).toEqual([]);
    uses[2]!.release();
    expect(load.advance(1)).toBe('more');
    expect(disposed.map(([generation]) => generation)).toEqual([1, 0, 2].map(generationAt));
    expect(disposed.every(([, reason]) => reason === 'evicted')).toBe(true);
  });

  it('shares one load among all who want it', async () => {
    const { residency } = setUp(4, [packedAdapter(0, 8, [q0])]);
    let calls = 0;
    const first = residency.beginLoad(generationAt(0), () => calls++);
    const second = residency.beginLoad(generationAt(0), () => calls++);
    expect(second).toBe(first);
    await read(residency, generationAt(0));
    expect(calls).toBe(2);
    expect(first.advance(1e9)).toBe('done');
    expect(residency.beginLoad(generationAt(0), () => {}).advance(0)).toBe('done');
  });

  it('unloads at the last use, unless it is wanted again before', async () => {
    const { residency, disposed } = setUp(4, [packedAdapter(0, 8, [q0])]);
    const uses = [await loadWhole(residency, generationAt(0))];
    residency.unload(generationAt(0));
    uses.push(residency.acquire(generationAt(0))!);
    uses[0]!.release();
    uses[0]!.release();
    expect(residency.list()).toMatchObject([{ uses: 1 }]);
    uses[1]!.release();
    expect(residency.list()).toEqual([]);
    expect(disposed).toEqual([[generationAt(0), 'unloaded']]);

    const again = await loadWhole(residency, generationAt(0));
    residency.unload(generationAt(0));
    residency.beginLoad(generationAt(0), () => {});
    again.release();
    expect(residency.list()).toMatchObject([{ uses: 0 }]);
    residency.unload(generationAt(0));
    expect(residency.pagesFree).toBe(3);
  });

  it('forgets what was unloaded while it was loaded, after the use it was for', async () => {
    const { residency } = setUp(4, [packedAdapter(0, 8, [q0])]);
    const load = await read(residency, generationAt(0));
    residency.unload(generationAt(0));
    load.advance(1e9);
    residency.acquire(generationAt(0))?.release();
    expect([residency.list(), residency.pagesFree]).toEqual([[], 3]);
  });

  it('gives the pages of an abandoned load back', async () => {
    const { residency, disposed } = setUp(4, [packedAdapter(0, 24, all)]);
    const load = await read(residency, generationAt(0));
    expect(load.advance(1)).toBe('more');
    expect(residency.pagesFree).toBe(0);
    load.abandon();
    load.abandon();
    expect([residency.pagesFree, disposed]).toEqual([3, [[generationAt(0), 'load-abandoned']]]);
    expect(() => load.advance(1)).toThrow('abandoned');
    (await loadWhole(residency, generationAt(0))).release();
  });

  it.each<[string, PackedAdapter, string]>([
    ['more pages than there are', packedAdapter(0, 64, [q0]), 'UNSUPPORTED'],
    ['a block too far', packedAdapter(0, 8, [{ ...q0, block: 2 }]), 'BASE_MISMATCH'],
    [
      'another base',
      { ...packedAdapter(0, 8, [q0]), manifest: { ...fakeManifest(8), baseHash: 'c'.repeat(64) } },
      'BASE_MISMATCH',
    ],
    [
      'another width',
      {
        ...packedAdapter(0, 8, [q0]),
        manifest: { ...fakeManifest(8), baseHash, modules: [{ ...q0, rank: 8, in: 32, out: 64 }] },
      },
      'BASE_MISMATCH',
    ],
    ['a missing blob', packedAdapter(1, 8, [q0]), 'ADAPTER_NOT_FOUND'],
  ])('refuses %s, and can be asked again', async (_, packed, code) => {
    const { residency, disposed } = setUp(4, [packed]);
    for (let attempt = 0; attempt < 2; attempt++) {
      await new Promise<void>((resolve) => {
        residency.beginLoad(generationAt(0), resolve);
      });
      const load = residency.beginLoad(generationAt(0), () => {});
      expect(() => load.advance(1)).toThrow(expect.objectContaining({ code }));
    }
    expect([disposed.length, residency.pagesFree]).toEqual([2, 3]);
  });
});

type Step =
  | { readonly kind: 'load' | 'acquire' | 'unload' | 'abandon'; readonly which: number }
  | { readonly kind: 'release'; readonly which: number }
  | { readonly kind: 'advance'; readonly which: number; readonly bytes: number };

const which = fc.nat(5);
const anyStep: fc.Arbitrary<Step> = fc.oneof(
  { weight: 4, arbitrary: fc.record({ kind: fc.constant('load' as const), which }) },
  {
    weight: 8,
    arbitrary: fc.record({ kind: fc.constant('advance' as const), which, bytes: fc.nat(120_000) }),
  },
  { weight: 5, arbitrary: fc.record({ kind: fc.constant('acquire' as const), which }) },
  {
    weight: 5,
    arbitrary: fc.record({ kind: fc.constant('release' as const), which: fc.nat(40) }),
  },
  {
    weight: 2,
    arbitrary: fc.record({ kind: fc.constantFrom('unload' as const, 'abandon' as const), which }),
  },
);

describe('residency under any order of calls', () => {
  const ranks = [8, 16, 8, 24, 4, 32];
  const modulesOf = [all, [q0], all.slice(3), all, [q0], all];
  const adapters = ranks.map((rank, i) => packedAdapter(i, rank, modulesOf[i]!));

  it('never changes a page in use, and loses none', async () => {
    const seen = new Set<string>();
    await fc.assert(
      fc.asyncProperty(fc.array(anyStep, { maxLength: 80, size: 'max' }), async (steps) => {
        const { residency, stepper, disposed } = setUp(6, adapters);
        const loads = new Map<number, AdapterLoad>();
        const uses: { readonly use: ResidentUse; readonly i: number; open: boolean }[] = [];
        for (const step of steps) {
          if (step.kind === 'load') {
            loads.set(step.which, await read(residency, generationAt(step.which)));
          } else if (step.kind === 'advance') {
            const started = [...loads.keys()];
            const i = started[step.which % Math.max(1, started.length)] ?? -1;
            const progress = loads.get(i)?.advance(step.bytes);
            if (progress === 'done') loads.delete(i);
            if (progress === 'no-room') seen.add('no-room');
          } else if (step.kind === 'abandon') {
            loads.get(step.which)?.abandon();
            loads.delete(step.which);
          } else if (step.kind === 'unload') {
            residency.unload(generationAt(step.which));
          } else if (step.kind === 'acquire') {
            const use = residency.acquire(generationAt(step.which));
            if (use !== null) uses.push({ use, i: step.which, open: true });
          } else if (uses.length > 0) {
            const held = uses[step.which % uses.length]!;
            held.use.release();
            held.open = false;
          }
          check(residency, stepper, uses);
        }
        for (const held of uses) {
          held.use.release();
          held.open = false;
        }
        for (const load of loads.values()) load.abandon();
        check(residency, stepper, uses);
        for (const { generation, uses: left } of residency.list()) {
          expect(left).toBe(0); // I3
          residency.unload(generation as Generation);
        }
        expect(residency.pagesFree).toBe(5);
        for (const [, reason] of disposed) seen.add(reason);
      }),
      { numRuns: 200 },
    );
    // The runs came where it matters.
    expect(seen).toEqual(new Set(['no-room', 'evicted', 'unloaded', 'load-abandoned']));
  });

  interface Held {
    readonly use: ResidentUse;
    readonly i: number;
    readonly open: boolean;
  }

  function check(residency: Residency, stepper: Pages, uses: readonly Held[]): void {
    const owners = new Map<number, number>();
    for (const { use, i, open } of uses) {
      if (!open) continue;
      const { pages } = use.rows(ranks[i]!);
      expect(pages).toHaveLength(Math.ceil(ranks[i]! / 8));
      pages.forEach((page, index) => {
        expect(owners.get(page) ?? i).toBe(i); // I2: nobody else's
        owners.set(page, i);
        for (const module of all) {
          const wanted = modulesOf[i]!.some(
            (m) => m.block === module.block && m.projection === module.projection,
          );
          expect(stepper.at(page, module)).toBe(wanted ? 100 * i + index : null); // I1
        }
      });
    }
    for (const { generation, uses: count } of residency.list()) {
      const open = uses.filter((held) => held.open && held.use.generation === generation);
      expect(count).toBe(open.length);
    }
  }
});
