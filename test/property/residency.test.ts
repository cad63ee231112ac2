import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import type { Generation } from '../../src/adapters/adapter.ts';
import { openPacked } from '../../src/adapters/pack.ts';
import {
  type AdapterLoad,
  createResidency,
  type Residency,
  type ResidentUse,
} from '../../src/adapters/residency.ts';
import { GatewayError } from '../../src/errors.ts';
import type { AdapterRows } from '../../src/model/stepper.ts';
import { type MadeFile, makePacked, tinyModules } from '../support/make-packed.ts';
import { isSamePage, PageMemory } from '../support/page-memory.ts';
import { tinyBase } from '../support/tiny-base.ts';

const basis = makePacked({ kind: 'basis', rank: 24, seed: 1 });
const banks = [2, 3].map((seed) => makePacked({ kind: 'bank', rank: 8, seed }));
const needing = (file: MadeFile) => ({ needs: file.generation });
const adapters = [
  makePacked({ kind: 'lora', rank: 64, seed: 4 }),
  makePacked({ kind: 'lora', rank: 48, seed: 6, modules: tinyModules.slice(0, 3) }),
  makePacked({ kind: 'svfit', rank: 20, seed: 7, options: needing(basis) }),
  makePacked({ kind: 'svfit', rank: 24, seed: 8, options: needing(basis) }),
  makePacked({ kind: 'fly', rank: 16, seed: 9 }),
  makePacked({ kind: 'queryable', rank: 8, seed: 10, options: needing(banks[0]!) }),
  makePacked({ kind: 'queryable', rank: 8, seed: 11, options: needing(banks[1]!) }),
];
const files = [...adapters, basis, ...banks].map(({ bytes, generation }) =>
  openPacked(bytes, generation),
);
const packedOf = (generation: string) => files.find((file) => file.generation === generation)!;
const pages = 14;

function setUp() {
  const memory = new PageMemory(pages);
  const seen = new Set<string>();
  const residency = createResidency({
    stepper: memory,
    baseHash: tinyBase.hash,
    open: async (generation) => packedOf(generation),
    onDispose: (_, reason) => seen.add(reason),
  });
  return { memory, residency, seen };
}

interface Held {
  readonly use: ResidentUse;
  readonly rank: number;
  readonly rows: AdapterRows;
  open: boolean;
}

type Step = {
  readonly kind: 'load' | 'advance' | 'acquire' | 'release' | 'unload' | 'abandon' | 'pin';
  readonly which: number;
  readonly rank: number;
  readonly bytes: number;
};

const weights = { load: 6, advance: 10, acquire: 6, release: 5, unload: 1, abandon: 1, pin: 2 };
const anyStep: fc.Arbitrary<Step> = fc.record({
  kind: fc.oneof(
    ...Object.entries(weights).map(([kind, weight]) => ({
      weight,
      arbitrary: fc.constant(kind as Step['kind']),
    })),
  ),
  which: fc.nat(40),
  rank: fc.oneof(fc.integer({ min: 1, max: 64 }), fc.constant(64)),
  bytes: fc.constantFrom(0, 20_000, 200_000, 1e9),
});

class Run {
  readonly memory: PageMemory;
  readonly residency: Residency;
  readonly seen: Set<string>;
  readonly held: Held[] = [];
  readonly loads: Map<string, AdapterLoad> = new Map();

  constructor(seen: Set<string>) {
    const set = setUp();
    this.memory = set.memory;
    this.residency = set.residency;
    this.seen = seen;
    this.disposed = set.seen;
  }
  readonly disposed: Set<string>;

  async step({ kind, which, rank: wanted, bytes }: Step): Promise<void> {
    const { generation, manifest } = adapters[which % adapters.length]!;
    const rank = Math.min(wanted, manifest.rankMax);
    if (kind === 'load') await this.#load(generation, rank);
    else if (kind === 'advance') this.#advance(which, bytes);
    else if (kind === 'acquire') this.#acquire(generation, rank);
    else if (kind === 'unload') this.residency.unload(generation);
    else if (kind === 'pin') this.residency.pin(which % 3 === 0 ? [generation] : []);
    else if (kind === 'abandon') {
      this.loads.get(generation)?.abandon();
      this.loads.delete(generation);
    } else if (this.held.length > 0) this.#release(this.held[which % this.held.length]!);
  }

  async #load(generation: Generation, rank: number): Promise<void> {
    const load = this.residency.beginLoad(generation, () => {}, rank);
    // Resident at that rank it may be growing for another: that load stays to be ended.
    if (!this.loads.has(generation)) this.loads.set(generation, load);
    for (let i = 0; i < 8; i++) await null; // The files are read.
  }

  #advance(which: number, bytes: number): void {
    const [key, load] = [...this.loads][which % Math.max(1, this.loads.size)] ?? [];
    if (key === undefined || load === undefined) return;
    try {
      const before = this.residency.list().find(({ generation }) => generation === key)?.rank;
      const progress = load.advance(bytes);
      if (progress !== 'done') this.seen.add(progress);
      if (progress === 'done') this.loads.delete(key);
      if (progress === 'done' && before !== undefined) this.seen.add('grown');
    } catch (error) {
      if (!(error instanceof GatewayError)) throw error;
      expect(['UNSUPPORTED', 'NO_CAPACITY', 'CANCELLED']).toContain(error.code);
      this.seen.add(error.code);
      this.loads.delete(key);
    }
  }

  #acquire(generation: Generation, rank: number): void {
    const use = this.residency.acquire(generation, rank);
    if (use !== null) this.held.push({ use, rank, rows: use.rows(rank), open: true });
  }

  #release(held: Held): void {
    held.use.release();
    held.open = false;
  }

  check(): void {
    const owners = new Map<number, string>();
    const uses = new Map<string, number>();
    for (const { use, rank, rows, open } of this.held) {
      if (!open) continue;
      const { manifest } = packedOf(use.generation);
      const { needs } = manifest.options;
      const owner = manifest.kind === 'svfit' ? needs! : use.generation;
      uses.set(use.generation, (uses.get(use.generation) ?? 0) + 1);
      if (owner !== use.generation) uses.set(owner, (uses.get(owner) ?? 0) + 1);
      const isWhole = manifest.kind === 'fly' || manifest.kind === 'queryable';
      expect(rows.pages).toHaveLength(Math.ceil((isWhole ? manifest.rankMax : rank) / 8));
      if (manifest.kind === 'queryable') expect(this.memory.bank?.id).toBe(needs);
      for (const [index, page] of rows.pages.entries()) {
        expect(owners.get(page) ?? owner).toBe(owner); // I2: nobody else's
        owners.set(page, owner);
        const wrong = tinyModules.filter(
          (module) =>
            !isSamePage(this.memory.at(page, module), packedOf(owner).page(module, index)),
        );
        expect(wrong).toEqual([]); // I1
      }
    }
    for (const state of this.residency.list()) {
      expect(state.uses).toBe(uses.get(state.generation) ?? 0);
    }
  }

  end(): void {
    for (const held of this.held) this.#release(held);
    for (const load of this.loads.values()) load.abandon();
    this.residency.pin([]);
    this.check();
    for (const { generation, uses } of this.residency.list()) {
      expect(uses).toBe(0); // I3
      this.residency.unload(generation as Generation);
    }
    expect(this.residency.list()).toEqual([]);
    expect(this.residency.pagesFree).toBe(pages - 1);
    for (const reason of this.disposed) this.seen.add(reason);
  }
}

describe('residency of every kind under any order of calls', () => {
  it('never changes a page in use, loses none, and grows a resident under its readers', async () => {
    const seen = new Set<string>();
    await fc.assert(
      fc.asyncProperty(fc.array(anyStep, { maxLength: 120, size: 'max' }), async (steps) => {
        const run = new Run(seen);
        for (const step of steps) {
          await run.step(step);
          run.check();
        }
        run.end();
      }),
      { numRuns: 150 },
    );
    // The runs came where it matters; to pins that leave no room, or no other bank, only some of them do.
    for (const some of ['NO_CAPACITY', 'UNSUPPORTED', 'load-failed']) seen.delete(some);
    expect(seen).toEqual(
      new Set([
        'bank-replaced',
        'basis-evicted',
        'evicted',
        'grown',
        'load-abandoned',
        'more',
        'no-room',
        'reading',
        'unloaded',
      ]),
    );
  });
});
