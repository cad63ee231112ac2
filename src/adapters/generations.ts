// The generations that the registry knows, and when each is forgotten: when no name's present or past has it, none that is
// there needs it, and nobody leases it. First its row goes and then, once that is durable, its blob; a crash between the two
// leaves a blob that nothing knows, which the next open sweeps away.

import { LRUCache } from 'lru-cache';
import type { OwnDatabase } from '../database.ts';
import { GatewayError } from '../errors.ts';
import type { AdapterManifest, Generation } from './adapter.ts';
import type { BlobStore } from './blobs.ts';
import { formatManifest, parseManifest } from './manifest.ts';
import type { StoredGeneration } from './registry.ts';

/** Generations that were imported and never named are kept for a retry; beyond this many the oldest go. */
const unnamedMax = 16;
const manifestsMax = 4096; // Measured: 24 KB of heap and 0.8 ms to parse for 210 modules.

export class Generations {
  readonly #db: OwnDatabase;
  readonly #blobs: BlobStore;
  readonly #leases: Map<Generation, number> = new Map();
  readonly #stored: LRUCache<Generation, StoredGeneration> = new LRUCache({ max: manifestsMax });
  /** Their rows are gone, their blobs not yet. */
  readonly #unkept: Set<Generation> = new Set();

  constructor(db: OwnDatabase, blobs: BlobStore) {
    this.#db = db;
    this.#blobs = blobs;
    const drop = db.sql(`DELETE FROM generations WHERE ${unreferenced}`);
    while (drop.run().changes > 0); // Again for what those that went had needed.
    db.durableNow();
    const known = db.sql('SELECT 1 FROM generations WHERE generation = ?');
    blobs.sweep((generation) => known.get(generation) !== undefined);
  }

  leases(generation: Generation): number {
    return this.#leases.get(generation) ?? 0;
  }

  /** Returns the release, which is idempotent. */
  lease(generation: Generation): () => void {
    this.#leases.set(generation, this.leases(generation) + 1);
    let open = true;
    return () => {
      if (!open) return;
      open = false;
      this.#release(generation);
    };
  }

  stored(generation: Generation): StoredGeneration | null {
    const cached = this.#stored.get(generation);
    if (cached !== undefined) return cached;
    const sql = 'SELECT manifest, bytes FROM generations WHERE generation = ?';
    const row = this.#db.sql(sql).get(generation) as
      | { manifest: string; bytes: number }
      | undefined;
    if (row === undefined) return null;
    const stored = { manifest: parseManifest(row.manifest), bytes: row.bytes };
    this.#stored.set(generation, stored);
    return stored;
  }

  expect(generation: Generation): StoredGeneration {
    const stored = this.stored(generation);
    if (stored !== null) return stored;
    throw new GatewayError('ADAPTER_NOT_FOUND', `no adapter has the generation ${generation}`);
  }

  /** Throws when it is not there, and for what adapters share. */
  expectServable(generation: Generation): void {
    const { kind } = this.expect(generation).manifest;
    if (kind !== 'basis' && kind !== 'bank') return;
    const message = `${generation} is what adapters share, a ${kind}, and not one itself`;
    throw new GatewayError('INVALID_REQUEST', message, { param: 'generation' });
  }

  store(generation: Generation, manifest: AdapterManifest, bytes: number): void {
    const { needs } = manifest.options;
    for (const blob of needs === null ? [generation] : [generation, needs]) {
      if (this.#blobs.has(blob)) continue;
      throw new GatewayError('ADAPTER_NOT_FOUND', `adapter ${blob} is not in the blob store`);
    }
    const insert =
      'INSERT INTO generations (generation, manifest, bytes, needs) VALUES (?, ?, ?, ?)';
    this.#db.atomically(() => {
      if (needs !== null) this.expect(needs);
      const row = [generation, formatManifest(manifest), bytes, needs];
      this.#db.sql(`${insert} ON CONFLICT DO NOTHING`).run(...row);
    });
    this.#unkept.delete(generation);
    const old = this.#db.sql(selectOldUnnamed).all(unnamedMax) as { generation: Generation }[];
    for (const { generation: unnamed } of old) this.collect(unnamed);
  }

  #release(generation: Generation): void {
    const left = this.leases(generation) - 1;
    if (left > 0) {
      this.#leases.set(generation, left);
      return;
    }
    this.#leases.delete(generation);
    // A sequence may end after the registry was closed; the next open collects.
    if (this.#db.isOpen) this.collect(generation);
  }

  /** Forgets a generation that nothing refers to any more. Never throws: what its caller did is done, and what a full or
   *  broken disk keeps is left for the next open. */
  collect(generation: Generation): void {
    if (this.leases(generation) > 0) return;
    const sql = `DELETE FROM generations WHERE generation = ? AND ${unreferenced} RETURNING needs`;
    try {
      const gone = this.#db.atomically(() => this.#db.sql(sql).all(generation)) as {
        needs: Generation | null;
      }[];
      if (gone.length === 0) return;
      this.#stored.delete(generation);
      this.#unkept.add(generation);
      void this.#removeUnkept();
      for (const { needs } of gone) if (needs !== null) this.collect(needs);
    } catch {
      // The sweep of the next open.
    }
  }

  /** A loss of power could bring the rows back: their blobs stay until it cannot. */
  async #removeUnkept(): Promise<void> {
    const generations = [...this.#unkept];
    try {
      await this.#db.durable();
      for (const generation of generations) {
        // Stored again meanwhile, it is kept.
        if (this.#db.isOpen && this.#unkept.delete(generation)) this.#blobs.remove(generation);
      }
    } catch {
      // The sweep of the next open.
    }
  }
}

const unreferenced =
  'generation NOT IN (SELECT generation FROM names) ' +
  'AND generation NOT IN (SELECT generation FROM previous) ' +
  'AND NOT EXISTS (SELECT 1 FROM generations AS other WHERE other.needs = generations.generation)';

const selectOldUnnamed = `SELECT generation FROM generations WHERE ${unreferenced} ORDER BY rowid DESC LIMIT -1 OFFSET ?`;
