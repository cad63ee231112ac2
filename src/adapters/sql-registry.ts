// The registry over SQLite: names, the generation each points at, and up to eight before it. What is acknowledged survives
// kill -9 and power loss (WAL, synchronous=FULL). One process owns the database (it is locked): leases live in memory.
//
// A generation is referenced by a name's present or past, or leased. When neither, first its row goes and then its blob;
// a crash between the two leaves a blob that nothing knows, which the next open sweeps away.

import type Database from 'libsql';
import { LRUCache } from 'lru-cache';
import { GatewayError } from '../errors.ts';
import { type AdapterManifest, type Generation, isAdapterName, isGeneration } from './adapter.ts';
import type { BlobStore } from './blobs.ts';
import { formatManifest, parseManifest } from './manifest.ts';
import type { AdapterRecord, Lease, Registry } from './registry.ts';
import { openDatabase } from './registry-schema.ts';

export interface SqlRegistryOptions {
  /** The database file; `:memory:` in tests. */
  readonly path: string;
  readonly blobs: BlobStore;
  /** Unix seconds. */
  readonly nowS: () => number;
  readonly namesMax?: number;
  /** Of the database file; beyond, DISK_FULL. */
  readonly bytesMax?: number;
}

const previousMax = 8;
/** Generations that were imported and never named are kept for a retry; beyond this many the oldest go. */
const unnamedMax = 16;
const namesMaxDefault = 4096;
const bytesMaxDefault = 8 * 1024 ** 3; // Every name at its nine generations, 210 modules each, is under 2 GiB.
const manifestsMax = 4096; // Measured: 24 KB of heap and 0.8 ms to parse for 210 modules.

export function openSqlRegistry(options: SqlRegistryOptions): Registry {
  return new SqlRegistry(options);
}

interface NameRow {
  readonly name: string;
  readonly generation: Generation;
  readonly updated_s: number;
  readonly bytes: number;
}

class SqlRegistry implements Registry {
  readonly #db: Database.Database;
  readonly #closeDatabase: () => void;
  readonly #blobs: BlobStore;
  readonly #nowS: () => number;
  readonly #namesMax: number;
  readonly #leases: Map<Generation, number> = new Map();
  readonly #manifests: LRUCache<Generation, AdapterManifest> = new LRUCache({ max: manifestsMax });
  readonly #statements: Map<string, Database.Statement> = new Map();

  constructor(options: SqlRegistryOptions) {
    const { path, blobs, nowS } = options;
    const { db, close } = openDatabase(path, options.bytesMax ?? bytesMaxDefault);
    this.#db = db;
    this.#closeDatabase = close;
    this.#blobs = blobs;
    this.#nowS = () => Math.floor(nowS());
    this.#namesMax = options.namesMax ?? namesMaxDefault;
    this.#sql(`DELETE FROM generations WHERE ${unreferenced}`).run();
    blobs.sweep((generation) => this.#isStored(generation));
  }

  list(): readonly AdapterRecord[] {
    const rows = this.#sql(`${selectNames} ORDER BY name`).all() as NameRow[];
    return rows.map((row) => this.#record(row));
  }

  find(name: string): AdapterRecord | null {
    const row = this.#sql(`${selectNames} WHERE name = ?`).get(name) as NameRow | undefined;
    return row === undefined ? null : this.#record(row);
  }

  lease(reference: string): Lease {
    const at = reference.indexOf('@');
    const name = at < 0 ? reference : reference.slice(0, at);
    const current = this.#expect(name).generation;
    const generation = at < 0 ? current : reference.slice(at + 1);
    // Only a name's own generations: knowing a hash must not open another tenant's adapter.
    const isTheirs = generation === current || this.#previous(name).some((g) => g === generation);
    if (!isGeneration(generation) || !isTheirs) {
      throw new GatewayError('ADAPTER_NOT_FOUND', `adapter ${name} has no such generation`);
    }
    const manifest = this.#manifest(generation);
    this.#leases.set(generation, this.leases(generation) + 1);
    let open = true;
    const release = (): void => {
      if (!open) return;
      open = false;
      this.#release(generation);
    };
    return { name, generation, manifest, release, [Symbol.dispose]: release };
  }

  leases(generation: Generation): number {
    return this.#leases.get(generation) ?? 0;
  }

  create(name: string, generation: Generation): AdapterRecord {
    if (!isAdapterName(name)) {
      throw new GatewayError('INVALID_REQUEST', `not an adapter name`, { param: 'name' });
    }
    return this.#atomically(() => {
      if (this.find(name) !== null) {
        throw new GatewayError('ADAPTER_EXISTS', `adapter ${name} exists`);
      }
      const { count } = this.#sql('SELECT count(*) AS count FROM names').get() as { count: number };
      if (count >= this.#namesMax) {
        throw new GatewayError('NO_CAPACITY', `${count} adapters are the most this registry keeps`);
      }
      this.#expectStored(generation);
      const row = [name, generation, this.#nowS()];
      this.#sql('INSERT INTO names (name, generation, updated_s) VALUES (?, ?, ?)').run(...row);
      return this.#expect(name);
    });
  }

  swap(name: string, generation: Generation, expected: Generation | null): AdapterRecord {
    const dropped: Generation[] = [];
    const record = this.#atomically(() => {
      const before = this.#expect(name, expected);
      this.#expectStored(generation);
      if (before.generation === generation) return before;
      // The past holds each generation once, at its last use: going back and forth between two forgets no third.
      const forget = this.#sql('DELETE FROM previous WHERE name = ? AND generation IN (?, ?)');
      forget.run(name, generation, before.generation);
      this.#sql('INSERT INTO previous (name, generation) VALUES (?, ?)').run(
        name,
        before.generation,
      );
      const past = before.previous.filter((g) => g !== generation && g !== before.generation);
      dropped.push(...past.slice(previousMax - 1));
      this.#sql(dropOldPrevious).run(name, name, previousMax);
      this.#point(name, generation);
      return this.#expect(name);
    });
    for (const old of dropped) this.#collect(old);
    return record;
  }

  rollback(name: string): AdapterRecord {
    let left: Generation | null = null;
    const record = this.#atomically(() => {
      const before = this.#expect(name);
      const [generation] = before.previous;
      if (generation === undefined) {
        const message = `adapter ${name} has no generation before ${before.generation}`;
        throw new GatewayError('GENERATION_MISMATCH', message);
      }
      this.#sql(dropNewestPrevious).run(name);
      this.#point(name, generation);
      left = before.generation;
      return this.#expect(name);
    });
    if (left !== null) this.#collect(left);
    return record;
  }

  remove(name: string, expected: Generation | null): void {
    const { generation, previous } = this.#atomically(() => {
      const before = this.#expect(name, expected);
      this.#sql('DELETE FROM names WHERE name = ?').run(name);
      return before;
    });
    for (const old of new Set([generation, ...previous])) this.#collect(old);
  }

  store(generation: Generation, manifest: AdapterManifest, bytes: number): void {
    if (!this.#blobs.has(generation)) {
      throw new GatewayError('ADAPTER_NOT_FOUND', `adapter ${generation} is not in the blob store`);
    }
    const row = [generation, formatManifest(manifest), bytes];
    const insert = 'INSERT INTO generations (generation, manifest, bytes) VALUES (?, ?, ?)';
    this.#atomically(() => this.#sql(`${insert} ON CONFLICT DO NOTHING`).run(...row));
    const old = this.#sql(selectOldUnnamed).all(unnamedMax) as { generation: Generation }[];
    for (const { generation: unnamed } of old) this.#collect(unnamed);
  }

  close(): void {
    this.#closeDatabase();
  }

  #release(generation: Generation): void {
    const left = this.leases(generation) - 1;
    if (left > 0) {
      this.#leases.set(generation, left);
      return;
    }
    this.#leases.delete(generation);
    // A sequence may end after the registry was closed; the next open collects.
    if (this.#db.open) this.#collect(generation);
  }

  /** Forgets a generation that nothing refers to any more. Never throws: what its caller did is done, and what a full or
   *  broken disk keeps is left for the next open. */
  #collect(generation: Generation): void {
    if (this.leases(generation) > 0) return;
    const sql = `DELETE FROM generations WHERE generation = ? AND ${unreferenced}`;
    try {
      if (this.#atomically(() => this.#sql(sql).run(generation)).changes === 0) return;
      this.#manifests.delete(generation);
      this.#blobs.remove(generation);
    } catch {
      // The sweep of the next open.
    }
  }

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

  #expectStored(generation: Generation): void {
    if (this.#isStored(generation)) return;
    throw new GatewayError('ADAPTER_NOT_FOUND', `no adapter has the generation ${generation}`);
  }

  #isStored(generation: Generation): boolean {
    return (
      this.#sql('SELECT 1 FROM generations WHERE generation = ?').get(generation) !== undefined
    );
  }

  #point(name: string, generation: Generation): void {
    const update = 'UPDATE names SET generation = ?, updated_s = ? WHERE name = ?';
    this.#sql(update).run(generation, this.#nowS(), name);
  }

  #record({ name, generation, updated_s: updatedS, bytes }: NameRow): AdapterRecord {
    const manifest = this.#manifest(generation);
    return { name, generation, manifest, previous: this.#previous(name), updatedS, bytes };
  }

  #previous(name: string): Generation[] {
    const rows = this.#sql('SELECT generation FROM previous WHERE name = ? ORDER BY step DESC');
    return (rows.all(name) as { generation: Generation }[]).map((row) => row.generation);
  }

  #manifest(generation: Generation): AdapterManifest {
    const cached = this.#manifests.get(generation);
    if (cached !== undefined) return cached;
    const sql = 'SELECT manifest FROM generations WHERE generation = ?';
    const row = this.#sql(sql).get(generation) as { manifest: string };
    const manifest = parseManifest(row.manifest);
    this.#manifests.set(generation, manifest);
    return manifest;
  }

  #sql(text: string): Database.Statement {
    const known = this.#statements.get(text);
    if (known !== undefined) return known;
    const statement = this.#db.prepare(text);
    this.#statements.set(text, statement);
    return statement;
  }

  /** One transaction; an error of SQLite comes out as DISK_FULL or INTERNAL. */
  #atomically<T>(work: () => T): T {
    try {
      // Not libsql's transaction(): SQLite has rolled back by itself when the disk is full, and the error of rolling back
      // once more would take that error's place.
      this.#db.exec('BEGIN IMMEDIATE');
      const result = work();
      this.#db.exec('COMMIT');
      return result;
    } catch (error) {
      if (this.#db.inTransaction) this.#db.exec('ROLLBACK');
      if (error instanceof GatewayError) throw error;
      const isFull = (error as { readonly code?: string }).code?.startsWith('SQLITE_FULL') ?? false;
      const code = isFull ? 'DISK_FULL' : 'INTERNAL';
      throw new GatewayError(code, 'the registry could not be written', { cause: error });
    }
  }
}

const selectNames =
  'SELECT name, names.generation, updated_s, bytes FROM names JOIN generations USING (generation)';

const unreferenced =
  'generation NOT IN (SELECT generation FROM names) ' +
  'AND generation NOT IN (SELECT generation FROM previous)';

const selectOldUnnamed = `SELECT generation FROM generations WHERE ${unreferenced} ORDER BY rowid DESC LIMIT -1 OFFSET ?`;

const dropOldPrevious =
  'DELETE FROM previous WHERE name = ? AND step NOT IN ' +
  '(SELECT step FROM previous WHERE name = ? ORDER BY step DESC LIMIT ?)';

const dropNewestPrevious =
  'DELETE FROM previous WHERE step = (SELECT max(step) FROM previous WHERE name = ?)';
