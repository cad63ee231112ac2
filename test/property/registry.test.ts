import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import {
  type AdapterManifest,
  type Generation,
  noOptions,
  tenantOf,
} from '../../src/adapters/adapter.ts';
import type { BlobStore } from '../../src/adapters/blobs.ts';
import type { Lease, Registry } from '../../src/adapters/registry.ts';
import { openSqlRegistry } from '../../src/adapters/sql-registry.ts';
import { GatewayError } from '../../src/errors.ts';
import { fakeGeneration, fakeManifest } from '../support/fake-registry.ts';

const generations: readonly Generation[] = ['a', 'b', 'c', 'd', 'e'].map(fakeGeneration);
/** The last two are served with the first. */
const needsOf = (generation: Generation): Generation | null =>
  generations.indexOf(generation) >= 3 ? generations[0]! : null;
const manifestOf = (generation: Generation): AdapterManifest => {
  const needs = needsOf(generation);
  const plain = fakeManifest(8);
  return needs === null ? plain : { ...plain, kind: 'svfit', options: { ...noOptions, needs } };
};
const names = ['x', 'y', 'a/z'] as const;
const aliasNames = ['x', 'p', 'a/q'] as const;

const previousMax = 2; // Of five generations: the bound is met often.

/** Blobs as a set. */
function memoryBlobs() {
  const held = new Set<Generation>();
  const store: BlobStore = {
    put: () => Promise.reject(new Error('not used')),
    has: (generation) => held.has(generation),
    remove: (generation) => void held.delete(generation),
    sweep: (isKnown) => {
      for (const generation of held) if (!isKnown(generation)) held.delete(generation);
    },
  };
  return { held, store };
}

interface Entry {
  generation: Generation;
  previous: Generation[];
}

/** What the registry should hold, written plainly. */
class Model {
  readonly entries: Map<string, Entry> = new Map();
  readonly stored: Set<Generation> = new Set();
  readonly leases: { readonly generation: Generation; open: boolean }[] = [];
  readonly aliases: Map<string, string> = new Map();
  readonly pinned: Set<string> = new Set();

  own(name: string): string {
    return this.aliases.get(name) ?? name;
  }

  aliasesOf(name: string): string[] {
    return [...this.aliases].flatMap(([alias, target]) => (target === name ? [alias] : [])).sort();
  }

  isNeeded(generation: Generation): boolean {
    return [...this.stored].some((one) => needsOf(one) === generation);
  }

  isNamed(generation: Generation): boolean {
    return [...this.entries.values()].some(
      (entry) => entry.generation === generation || entry.previous.includes(generation),
    );
  }

  count(generation: Generation): number {
    return this.leases.filter((lease) => lease.open && lease.generation === generation).length;
  }

  /** Called for generations that just lost a name or a lease. */
  drop(lost: readonly Generation[]): void {
    for (const generation of lost) {
      if (this.isNamed(generation) || this.count(generation) > 0) continue;
      if (this.isNeeded(generation) || !this.stored.delete(generation)) continue;
      const needs = needsOf(generation);
      if (needs !== null) this.drop([needs]);
    }
  }
}

type Command =
  | { readonly kind: 'store'; readonly generation: Generation }
  | { readonly kind: 'create'; readonly name: string; readonly generation: Generation }
  | {
      readonly kind: 'swap';
      readonly name: string;
      readonly generation: Generation;
      readonly expected: Generation | null;
    }
  | { readonly kind: 'rollback'; readonly name: string }
  | { readonly kind: 'alias'; readonly name: string; readonly target: string }
  | { readonly kind: 'pin' | 'unpin'; readonly name: string }
  | { readonly kind: 'remove'; readonly name: string; readonly expected: Generation | null }
  | { readonly kind: 'lease'; readonly name: string; readonly fixed: Generation | null }
  | { readonly kind: 'release'; readonly index: number }
  | { readonly kind: 'reopen' };

const name = fc.constantFrom(...names, ...aliasNames);
const generation = fc.constantFrom(...generations);
const maybe = fc.option(generation, { freq: 3 });
const command: fc.Arbitrary<Command> = fc.oneof(
  { weight: 4, arbitrary: fc.record({ kind: fc.constant('store' as const), generation }) },
  { weight: 3, arbitrary: fc.record({ kind: fc.constant('create' as const), name, generation }) },
  {
    weight: 6,
    arbitrary: fc.record({ kind: fc.constant('swap' as const), name, generation, expected: maybe }),
  },
  { weight: 3, arbitrary: fc.record({ kind: fc.constant('rollback' as const), name }) },
  {
    weight: 2,
    arbitrary: fc.record({ kind: fc.constant('remove' as const), name, expected: maybe }),
  },
  {
    weight: 3,
    arbitrary: fc.record({ kind: fc.constant('alias' as const), name, target: name }),
  },
  {
    weight: 1,
    arbitrary: fc.record({ kind: fc.constantFrom('pin' as const, 'unpin' as const), name }),
  },
  { weight: 4, arbitrary: fc.record({ kind: fc.constant('lease' as const), name, fixed: maybe }) },
  {
    weight: 4,
    arbitrary: fc.record({ kind: fc.constant('release' as const), index: fc.nat(50) }),
  },
  { weight: 1, arbitrary: fc.constant({ kind: 'reopen' as const }) },
);

/** What a call returned, or the code it threw. */
function outcome<T>(act: () => T): T | string {
  try {
    return act();
  } catch (error) {
    if (error instanceof GatewayError) return error.code;
    throw error;
  }
}

class Run {
  readonly model: Model = new Model();
  readonly blobs = memoryBlobs();
  readonly leases: Lease[] = [];
  readonly #open: () => Registry;
  registry: Registry;

  constructor(path: string) {
    this.#open = () =>
      openSqlRegistry({ path, blobs: this.blobs.store, nowS: () => 1_000.7, previousMax });
    this.registry = this.#open();
  }

  apply(step: Command): void {
    const { model, registry } = this;
    switch (step.kind) {
      case 'store': {
        const needs = needsOf(step.generation);
        this.blobs.held.add(step.generation);
        const wanted = needs === null || model.stored.has(needs) ? 'done' : 'ADAPTER_NOT_FOUND';
        const manifest = manifestOf(step.generation);
        this.expectOutcome(() => registry.store(step.generation, manifest, 123), wanted);
        if (wanted === 'done') model.stored.add(step.generation);
        else this.blobs.held.delete(step.generation);
        return;
      }
      case 'create': {
        const isFree = !model.entries.has(model.own(step.name));
        const isStored = model.stored.has(step.generation);
        const wanted = isFree ? (isStored ? 'done' : 'ADAPTER_NOT_FOUND') : 'ADAPTER_EXISTS';
        this.expectOutcome(() => registry.create(step.name, step.generation), wanted);
        if (wanted !== 'done') return;
        model.entries.set(step.name, { generation: step.generation, previous: [] });
        return;
      }
      case 'swap':
        this.swap(step);
        return;
      case 'rollback':
        this.rollback(step.name);
        return;
      case 'remove':
        this.remove(step);
        return;
      case 'alias':
        this.alias(step.name, step.target);
        return;
      case 'pin':
      case 'unpin': {
        const wanted = this.expected(step.name, null);
        this.expectOutcome(() => registry[step.kind](step.name), wanted);
        if (wanted !== 'done') return;
        if (step.kind === 'pin') model.pinned.add(step.name);
        else model.pinned.delete(step.name);
        return;
      }
      case 'lease':
        this.lease(step.name, step.fixed);
        return;
      case 'release':
        this.release(step.index);
        return;
      case 'reopen':
        this.reopen();
        return;
    }
  }

  /** Of a call that changes a name, which an alias is not. */
  expected(name: string, expected: Generation | null): string {
    const read = this.expectedRead(name, expected);
    return read === 'done' && this.model.aliases.has(name) ? 'INVALID_REQUEST' : read;
  }

  expectedRead(name: string, expected: Generation | null): string {
    const entry = this.model.entries.get(this.model.own(name));
    if (entry === undefined) return 'ADAPTER_NOT_FOUND';
    return expected === null || expected === entry.generation ? 'done' : 'GENERATION_MISMATCH';
  }

  remove({ name, expected }: Command & { kind: 'remove' }): void {
    const { model } = this;
    const read = this.expectedRead(name, expected);
    const isUsed = model.pinned.has(name) || model.aliasesOf(name).length > 0;
    const isAlias = model.aliases.has(name);
    const wanted = read === 'done' && !isAlias && isUsed ? 'ADAPTER_IN_USE' : read;
    this.expectOutcome(() => this.registry.remove(name, expected), wanted);
    const entry = model.entries.get(name);
    if (wanted !== 'done') return;
    if (isAlias) model.aliases.delete(name);
    if (isAlias || entry === undefined) return;
    model.entries.delete(name);
    model.drop([entry.generation, ...entry.previous]);
  }

  alias(name: string, target: string): void {
    const { model } = this;
    const read = this.expected(target, null);
    let wanted = read;
    if (read === 'done' && tenantOf(name) !== tenantOf(target)) wanted = 'INVALID_REQUEST';
    else if (read === 'done' && model.entries.has(name)) wanted = 'ADAPTER_EXISTS';
    this.expectOutcome(() => this.registry.alias(name, target), wanted);
    if (wanted === 'done') model.aliases.set(name, target);
  }

  expectOutcome(act: () => unknown, wanted: string): void {
    const got = outcome(act);
    expect(typeof got === 'string' ? got : 'done').toBe(wanted);
  }

  swap(step: Command & { kind: 'swap' }): void {
    const before = this.expected(step.name, step.expected);
    const isStored = this.model.stored.has(step.generation);
    const wanted = before === 'done' && !isStored ? 'ADAPTER_NOT_FOUND' : before;
    this.expectOutcome(() => this.registry.swap(step.name, step.generation, step.expected), wanted);
    const entry = this.model.entries.get(step.name);
    if (wanted !== 'done' || entry === undefined || entry.generation === step.generation) return;
    const { generation: now } = entry;
    entry.previous = [now, ...entry.previous.filter((g) => g !== now && g !== step.generation)];
    entry.generation = step.generation;
    this.model.drop(entry.previous.splice(previousMax));
  }

  rollback(name: string): void {
    const entry = this.model.entries.get(name);
    const [before] = entry?.previous ?? [];
    const may = this.expected(name, null);
    const wanted = may === 'done' && before === undefined ? 'GENERATION_MISMATCH' : may;
    this.expectOutcome(() => this.registry.rollback(name), wanted);
    if (wanted !== 'done' || entry === undefined || before === undefined) return;
    const left = entry.generation;
    entry.previous.shift();
    entry.generation = before;
    this.model.drop([left]);
  }

  lease(name: string, fixed: Generation | null): void {
    const entry = this.model.entries.get(this.model.own(name));
    const generation = fixed ?? entry?.generation;
    const isTheirs =
      entry !== undefined && [entry.generation, ...entry.previous].some((g) => g === generation);
    const got = outcome(() => this.registry.lease(fixed === null ? name : `${name}@${fixed}`));
    if (!isTheirs || generation === undefined || typeof got === 'string') {
      expect(got).toBe('ADAPTER_NOT_FOUND');
      expect(isTheirs).toBe(false);
      return;
    }
    expect(got.generation).toBe(generation);
    this.leases.push(got);
    this.model.leases.push({ generation, open: true });
  }

  /** Any lease, also one that was released already. */
  release(index: number): void {
    if (this.leases.length === 0) return;
    const at = index % this.leases.length;
    this.leases[at]!.release();
    const lease = this.model.leases[at]!;
    if (!lease.open) return;
    lease.open = false;
    this.model.drop([lease.generation]);
  }

  /** A new process: leases are gone, and with them what only they kept. */
  reopen(): void {
    this.registry.close();
    this.blobs.held.add(fakeGeneration('f')); // A blob that a crash left.
    for (const lease of this.model.leases) lease.open = false;
    this.registry = this.#open();
    this.model.drop([...this.model.stored]);
  }

  check(): void {
    const { model, registry } = this;
    const wanted = [...model.entries]
      .sort(([a], [b]) => (a < b ? -1 : 1))
      .map(([name, entry]) => [
        name,
        entry,
        { aliases: model.aliasesOf(name), isPinned: model.pinned.has(name) },
      ]);
    expect(
      registry
        .list()
        .map((record) => [
          record.name,
          { generation: record.generation, previous: record.previous },
          { aliases: record.aliases, isPinned: record.isPinned },
        ]),
    ).toEqual(wanted);
    expect(this.blobs.held).toEqual(model.stored);
    for (const generation of generations) {
      expect(registry.leases(generation)).toBe(model.count(generation));
      // Nothing that is named or leased was ever deleted.
      if (model.isNamed(generation) || model.count(generation) > 0) {
        expect(this.blobs.held.has(generation)).toBe(true);
      }
    }
    const pinned = [...model.pinned].map((name) => model.entries.get(name)!.generation);
    expect(new Set(registry.pinned())).toEqual(new Set(pinned));
    for (const name of [...names, ...aliasNames]) {
      const record = registry.find(name);
      expect(record?.generation).toBe(model.entries.get(model.own(name))?.generation);
      if (record !== null) expect(record).toMatchObject({ bytes: 123, updatedS: 1_000 });
    }
  }
}

describe('the registry', () => {
  it('agrees with a plain model under any order of calls, also across reopening', async () => {
    const directory = mkdtempSync(join(tmpdir(), 'rankgate-registry-'));
    let runs = 0;
    try {
      await fc.assert(
        fc.asyncProperty(fc.array(command, { maxLength: 60, size: 'max' }), async (steps) => {
          const run = new Run(join(directory, `${runs++}.db`));
          try {
            for (const step of [...steps, { kind: 'reopen' } as const]) {
              run.apply(step);
              await run.registry.durable(); // Then blobs that nothing needs have gone.
              run.check();
            }
          } finally {
            run.registry.close();
          }
        }),
        { numRuns: 60 },
      );
    } finally {
      rmSync(directory, { recursive: true });
    }
  });
});
