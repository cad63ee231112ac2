// The registry over SQLite: names, the generation each points at, and those before it; aliases and pins. A change survives
// kill -9 at once, and a loss of power when `durable` resolves. One process owns the database (it is locked): leases live
// in memory.

import { type OwnDatabase, openDatabase, type SyncFile } from '../database.ts';
import { GatewayError } from '../errors.ts';
import {
  type AdapterManifest,
  type Generation,
  isAdapterName,
  isGeneration,
  tenantOf,
} from './adapter.ts';
import type { BlobStore } from './blobs.ts';
import { Generations } from './generations.ts';
import type { AdapterRecord, Lease, Registry, StoredGeneration } from './registry.ts';
import { registrySchema } from './registry-schema.ts';

export interface SqlRegistryOptions {
  /** The database file; `:memory:` in tests. */
  readonly path: string;
  readonly blobs: BlobStore;
  /** Unix seconds. */
  readonly nowS: () => number;
  /** Generations that a name keeps besides its present one. */
  readonly previousMax?: number;
  /** Of names and aliases together. */
  readonly namesMax?: number;
  /** Of the database file; beyond, DISK_FULL. */
  readonly bytesMax?: number;
  readonly syncFile?: SyncFile;
}

const previousMaxDefault = 16;
const namesMaxDefault = 4096;
const bytesMaxDefault = 8 * 1024 ** 3; // Every name at its 17 generations, 210 modules each, is under 4 GiB.

export function openSqlRegistry(options: SqlRegistryOptions): Registry {
  return new SqlRegistry(options);
}

interface NameRow {
  readonly name: string;
  readonly generation: Generation;
  readonly updated_s: number;
  readonly is_pinned: number;
}

class SqlRegistry implements Registry {
  readonly #db: OwnDatabase;
  readonly #options: SqlRegistryOptions;
  readonly #generations: Generations;

  constructor(options: SqlRegistryOptions) {
    this.#options = options;
    const { path, bytesMax = bytesMaxDefault, syncFile } = options;
    const sync = syncFile === undefined ? {} : { syncFile };
    const schema = registrySchema;
    this.#db = openDatabase({ path, bytesMax, schema, ...sync });
    this.#generations = new Generations(this.#db, options.blobs);
  }

  list(): readonly AdapterRecord[] {
    const rows = this.#db.sql('SELECT * FROM names ORDER BY name').all() as NameRow[];
    return rows.map((row) => this.#record(row));
  }

  find(name: string): AdapterRecord | null {
    const row = this.#db.sql(selectName).get(name, name) as NameRow | undefined;
    return row === undefined ? null : this.#record(row);
  }

  lease(reference: string): Lease {
    const at = reference.indexOf('@');
    const record = this.#expect(at < 0 ? reference : reference.slice(0, at));
    const { name, generation: current, previous } = record;
    const generation = at < 0 ? current : reference.slice(at + 1);
    // Only a name's own generations: knowing a hash must not open another tenant's adapter.
    const isTheirs = generation === current || previous.some((g) => g === generation);
    if (!isTheirs || !isGeneration(generation)) {
      throw new GatewayError('ADAPTER_NOT_FOUND', `adapter ${name} has no such generation`);
    }
    const { manifest } = this.#generations.expect(generation);
    const release = this.#generations.lease(generation);
    return { name, generation, manifest, release, [Symbol.dispose]: release };
  }

  leases(generation: Generation): number {
    return this.#generations.leases(generation);
  }

  stored(generation: Generation): StoredGeneration | null {
    return this.#generations.stored(generation);
  }

  isNamed(generation: Generation): boolean {
    return this.#has('SELECT 1 FROM names WHERE generation = ?', generation);
  }

  create(name: string, generation: Generation): AdapterRecord {
    return this.#db.atomically(() => {
      this.#expectFree(name);
      if (this.find(name) !== null) {
        throw new GatewayError('ADAPTER_EXISTS', `adapter ${name} exists`);
      }
      this.#generations.expectServable(generation);
      const row = [name, generation, this.#nowS()];
      this.#db.sql('INSERT INTO names (name, generation, updated_s) VALUES (?, ?, ?)').run(...row);
      return this.#expect(name);
    });
  }

  swap(name: string, generation: Generation, expected: Generation | null): AdapterRecord {
    const { previousMax = previousMaxDefault } = this.#options;
    const dropped: Generation[] = [];
    const record = this.#db.atomically(() => {
      const before = this.#expectOwn(name, expected);
      this.#generations.expectServable(generation);
      if (before.generation === generation) return before;
      // The past holds each generation once, at its last use: going back and forth between two forgets no third.
      const forget = this.#db.sql('DELETE FROM previous WHERE name = ? AND generation IN (?, ?)');
      forget.run(name, generation, before.generation);
      const remember = this.#db.sql('INSERT INTO previous (name, generation) VALUES (?, ?)');
      remember.run(name, before.generation);
      const past = before.previous.filter((g) => g !== generation && g !== before.generation);
      dropped.push(...past.slice(previousMax - 1));
      this.#db.sql(dropOldPrevious).run(name, name, previousMax);
      this.#point(name, generation);
      return this.#expect(name);
    });
    for (const old of dropped) this.#generations.collect(old);
    return record;
  }

  rollback(name: string): AdapterRecord {
    let left: Generation | null = null;
    const record = this.#db.atomically(() => {
      const before = this.#expectOwn(name);
      const [generation] = before.previous;
      if (generation === undefined) {
        const message = `adapter ${name} has no generation before ${before.generation}`;
        throw new GatewayError('GENERATION_MISMATCH', message);
      }
      this.#db.sql(dropNewestPrevious).run(name);
      this.#point(name, generation);
      left = before.generation;
      return this.#expect(name);
    });
    if (left !== null) this.#generations.collect(left);
    return record;
  }

  alias(name: string, target: string): AdapterRecord {
    return this.#db.atomically(() => {
      const { name: followed } = this.#expectOwn(target);
      if (tenantOf(name) !== tenantOf(followed)) {
        const message = 'an alias is of the same tenant as what it follows';
        throw new GatewayError('INVALID_REQUEST', message, { param: 'target' });
      }
      if (this.#has('SELECT 1 FROM names WHERE name = ?', name)) {
        throw new GatewayError('ADAPTER_EXISTS', `adapter ${name} exists, and is no alias`);
      }
      if (this.find(name) === null) this.#expectFree(name);
      const upsert = 'INSERT INTO aliases VALUES (?, ?) ON CONFLICT DO UPDATE SET target = ?';
      this.#db.sql(upsert).run(name, followed, followed);
      return this.#expect(name);
    });
  }

  pin(name: string): AdapterRecord {
    return this.#setPinned(name, 1);
  }

  unpin(name: string): AdapterRecord {
    return this.#setPinned(name, 0);
  }

  pinned(): readonly Generation[] {
    const sql = 'SELECT DISTINCT generation FROM names WHERE is_pinned = 1 ORDER BY name';
    const rows = this.#db.sql(sql).all() as { generation: Generation }[];
    return rows.map(({ generation }) => generation);
  }

  remove(name: string, expected: Generation | null): void {
    const lost = this.#db.atomically((): readonly Generation[] => {
      const { generation, previous, aliases, isPinned } = this.#expect(name, expected);
      if (this.#db.sql('DELETE FROM aliases WHERE name = ?').run(name).changes > 0) return [];
      if (isPinned || aliases.length > 0) {
        const why = isPinned ? 'is pinned' : `is followed by ${aliases.join(', ')}`;
        throw new GatewayError('ADAPTER_IN_USE', `adapter ${name} ${why}`);
      }
      this.#db.sql('DELETE FROM names WHERE name = ?').run(name);
      return [generation, ...previous];
    });
    for (const old of new Set(lost)) this.#generations.collect(old);
  }

  store(generation: Generation, manifest: AdapterManifest, bytes: number): void {
    this.#generations.store(generation, manifest, bytes);
  }

  durable(): Promise<void> {
    return this.#db.durable();
  }

  durableNow(): void {
    this.#db.durableNow();
  }

  close(): void {
    this.#db.close();
  }

  /** The record that a name or an alias stands for. */
  #expect(name: string, expected: Generation | null = null): AdapterRecord {
    const record = this.find(name);
    if (record === null) {
      const shown = isAdapterName(name) ? `adapter ${name} does not exist` : 'not an adapter name';
      throw new GatewayError('ADAPTER_NOT_FOUND', shown);
    }
    if (expected !== null && expected !== record.generation) {
      const message = `adapter ${name} is at ${record.generation}, not ${expected}`;
      throw new GatewayError('GENERATION_MISMATCH', message);
    }
    return record;
  }

  /** Of a name that is no alias: who changes one name must not have meant another. */
  #expectOwn(name: string, expected: Generation | null = null): AdapterRecord {
    const record = this.#expect(name, expected);
    if (record.name === name) return record;
    const message = `${name} is an alias: name ${record.name} itself`;
    throw new GatewayError('INVALID_REQUEST', message, { param: 'name' });
  }

  #expectFree(name: string): void {
    if (!isAdapterName(name)) {
      throw new GatewayError('INVALID_REQUEST', `not an adapter name`, { param: 'name' });
    }
    const { namesMax = namesMaxDefault } = this.#options;
    const { count } = this.#db.sql(countNames).get() as { count: number };
    if (count >= namesMax) {
      throw new GatewayError('NO_CAPACITY', `${count} adapters are the most this registry keeps`);
    }
  }

  #has(sql: string, value: string): boolean {
    return this.#db.sql(sql).get(value) !== undefined;
  }

  #nowS(): number {
    return Math.floor(this.#options.nowS());
  }

  #point(name: string, generation: Generation): void {
    const update = 'UPDATE names SET generation = ?, updated_s = ? WHERE name = ?';
    this.#db.sql(update).run(generation, this.#nowS(), name);
  }

  #setPinned(name: string, isPinned: 0 | 1): AdapterRecord {
    return this.#db.atomically(() => {
      this.#expectOwn(name);
      this.#db.sql('UPDATE names SET is_pinned = ? WHERE name = ?').run(isPinned, name);
      return this.#expect(name);
    });
  }

  #record({ name, generation, updated_s: updatedS, is_pinned: pinned }: NameRow): AdapterRecord {
    const past = this.#db.sql('SELECT generation FROM previous WHERE name = ? ORDER BY step DESC');
    const others = this.#db.sql('SELECT name FROM aliases WHERE target = ? ORDER BY name');
    return {
      name,
      generation,
      ...this.#generations.expect(generation),
      previous: (past.all(name) as { generation: Generation }[]).map((row) => row.generation),
      updatedS,
      aliases: (others.all(name) as { name: string }[]).map((row) => row.name),
      isPinned: pinned === 1,
    };
  }
}

const selectName =
  'SELECT * FROM names WHERE name = coalesce((SELECT target FROM aliases WHERE name = ?), ?)';

const countNames = 'SELECT (SELECT count(*) FROM names) + (SELECT count(*) FROM aliases) AS count';

const dropOldPrevious =
  'DELETE FROM previous WHERE name = ? AND step NOT IN ' +
  '(SELECT step FROM previous WHERE name = ? ORDER BY step DESC LIMIT ?)';

const dropNewestPrevious =
  'DELETE FROM previous WHERE step = (SELECT max(step) FROM previous WHERE name = ?)';
