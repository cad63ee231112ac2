import { type AdapterManifest, type Generation, noOptions } from '../../src/adapters/adapter.ts';
import type { SqueezeTarget } from '../../src/adapters/pack-pairs.ts';
import type {
  AdapterRecord,
  ExportedFiles,
  ImportedAdapter,
  Importer,
  ImportOptions,
  Lease,
  Registry,
  StoredGeneration,
} from '../../src/adapters/registry.ts';
import { GatewayError } from '../../src/errors.ts';

/** A generation whose hex digits repeat one digit or pair. */
export function fakeGeneration(digits: string): Generation {
  return `sha256:${digits.repeat(64 / digits.length)}`;
}

export function fakeManifest(rankMax: number): AdapterManifest {
  return {
    format: 'rankgate-adapter/3',
    kind: 'lora',
    describe: '',
    levels: null,
    options: noOptions,
    baseHash: 'b'.repeat(64),
    rankMax,
    modules: [{ block: 0, projection: 'attn_q', rank: rankMax, in: 64, out: 64 }],
    rankCurve: Array.from({ length: rankMax }, (_, i) => (i + 1) / rankMax),
    source: {
      format: 'peft',
      rank: rankMax,
      alpha: 2 * rankMax,
      rslora: false,
      targetModules: ['q_proj'],
      baseName: null,
    },
  };
}

/** The registry's contract in memory, without history limits and blobs. */
export class FakeRegistry implements Registry {
  readonly #names = new Map<string, { generation: Generation; previous: Generation[] }>();
  readonly #stored = new Map<Generation, { manifest: AdapterManifest; bytes: number }>();
  readonly #leases = new Map<Generation, number>();
  readonly #aliases = new Map<string, string>();
  readonly #pinned = new Set<string>();
  isClosed = false;

  list(): readonly AdapterRecord[] {
    if (this.isClosed) throw new Error('the database is closed');
    return [...this.#names.keys()].map((name) => this.#record(name));
  }

  find(name: string): AdapterRecord | null {
    const own = this.#aliases.get(name) ?? name;
    return this.#names.has(own) ? this.#record(own) : null;
  }

  lease(reference: string): Lease {
    const [asked = '', fixed] = reference.split('@');
    const name = this.#aliases.get(asked) ?? asked;
    const entry = this.#names.get(name);
    const generation = (fixed ?? entry?.generation) as Generation | undefined;
    const known = generation === undefined ? undefined : this.#stored.get(generation);
    if (entry === undefined || generation === undefined || known === undefined) {
      throw new GatewayError('ADAPTER_NOT_FOUND', 'no such adapter');
    }
    this.#count(generation, 1);
    let isOpen = true;
    const release = (): void => {
      if (isOpen) this.#count(generation, -1);
      isOpen = false;
    };
    return { name, generation, manifest: known.manifest, release, [Symbol.dispose]: release };
  }

  leases(generation: Generation): number {
    return this.#leases.get(generation) ?? 0;
  }

  stored(generation: Generation): StoredGeneration | null {
    return this.#stored.get(generation) ?? null;
  }

  isNamed(generation: Generation): boolean {
    return [...this.#names.values()].some((entry) => entry.generation === generation);
  }

  alias(name: string, target: string): AdapterRecord {
    this.#entry(target, null);
    this.#aliases.set(name, target);
    return this.#record(target);
  }

  pin(name: string): AdapterRecord {
    this.#entry(name, null);
    this.#pinned.add(name);
    return this.#record(name);
  }

  unpin(name: string): AdapterRecord {
    this.#pinned.delete(name);
    return this.#record(name);
  }

  pinned(): readonly Generation[] {
    return [...this.#pinned].map((name) => this.#names.get(name)!.generation);
  }

  get leasesOpen(): number {
    return [...this.#leases.values()].reduce((sum, count) => sum + count, 0);
  }

  create(name: string, generation: Generation): AdapterRecord {
    if (this.find(name) !== null) throw new GatewayError('ADAPTER_EXISTS', 'the name is taken');
    this.#checkStored(generation);
    this.#names.set(name, { generation, previous: [] });
    return this.#record(name);
  }

  swap(name: string, generation: Generation, expected: Generation | null): AdapterRecord {
    const entry = this.#entry(name, expected);
    this.#checkStored(generation);
    entry.previous.unshift(entry.generation);
    entry.generation = generation;
    return this.#record(name);
  }

  rollback(name: string): AdapterRecord {
    const entry = this.#entry(name, null);
    const before = entry.previous.shift();
    if (before === undefined) throw new GatewayError('GENERATION_MISMATCH', 'no previous one');
    entry.generation = before;
    return this.#record(name);
  }

  remove(name: string, expected: Generation | null): void {
    if (this.#aliases.delete(name)) return;
    this.#entry(name, expected);
    this.#names.delete(name);
  }

  store(generation: Generation, manifest: AdapterManifest, bytes: number): void {
    this.#stored.set(generation, { manifest, bytes });
  }

  durable(): Promise<void> {
    return Promise.resolve();
  }

  durableNow(): void {}

  close(): void {
    this.isClosed = true;
  }

  #entry(name: string, expected: Generation | null) {
    const entry = this.#names.get(name);
    if (entry === undefined) throw new GatewayError('ADAPTER_NOT_FOUND', 'no such adapter');
    if (expected !== null && expected !== entry.generation) {
      throw new GatewayError('GENERATION_MISMATCH', 'the name points at another generation');
    }
    return entry;
  }

  #checkStored(generation: Generation): void {
    if (!this.#stored.has(generation)) {
      throw new GatewayError('ADAPTER_NOT_FOUND', 'no such generation');
    }
  }

  #record(name: string): AdapterRecord {
    const { generation, previous } = this.#names.get(name)!;
    const { manifest, bytes } = this.#stored.get(generation)!;
    const aliases = [...this.#aliases].filter(([, target]) => target === name);
    return {
      name,
      generation,
      manifest,
      bytes,
      previous: [...previous],
      updatedS: 1_700_000_000,
      aliases: aliases.map(([alias]) => alias),
      isPinned: this.#pinned.has(name),
    };
  }

  #count(generation: Generation, change: number): void {
    this.#leases.set(generation, this.leases(generation) + change);
  }
}

/** Imports nothing: hands out the generations it was given, and remembers which directories it was sent to. */
export class FakeImporter implements Importer {
  readonly directories: string[] = [];
  readonly options: Array<ImportOptions | undefined> = [];
  readonly squeezed: Array<{ generation: Generation; target: SqueezeTarget }> = [];
  readonly #registry: Registry;
  next: ImportedAdapter | GatewayError;

  constructor(registry: Registry, next: ImportedAdapter) {
    this.#registry = registry;
    this.next = next;
  }

  async importPeft(directory: string, options?: ImportOptions): Promise<ImportedAdapter> {
    this.directories.push(directory);
    this.options.push(options);
    if (this.next instanceof GatewayError) throw this.next;
    this.#registry.store(this.next.generation, this.next.manifest, this.next.bytes);
    return this.next;
  }

  async exportPeft(generation: Generation, rank: number): Promise<ExportedFiles> {
    return {
      configName: 'adapter_config.json',
      config: JSON.stringify({ r: rank, generation }),
      weights: new Uint8Array(1000).fill(rank),
    };
  }

  async squeeze(generation: Generation, target: SqueezeTarget): Promise<ImportedAdapter> {
    this.squeezed.push({ generation, target });
    if (this.next instanceof GatewayError) throw this.next;
    this.#registry.store(this.next.generation, this.next.manifest, this.next.bytes);
    return this.next;
  }

  async close(): Promise<void> {}
}
