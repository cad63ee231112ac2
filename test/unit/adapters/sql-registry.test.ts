import { spawnSync } from 'node:child_process';
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import Database from 'libsql';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import type { Generation } from '../../../src/adapters/adapter.ts';
import { createBlobStore } from '../../../src/adapters/blobs.ts';
import type { Registry } from '../../../src/adapters/registry.ts';
import { openSqlRegistry, type SqlRegistryOptions } from '../../../src/adapters/sql-registry.ts';
import { fakeGeneration, fakeManifest } from '../../support/fake-registry.ts';

let directory: string;
let registry: Registry;
const blobs = () => createBlobStore(join(directory, 'blobs'));
const open = (limits: Pick<SqlRegistryOptions, 'namesMax' | 'bytesMax'> = { namesMax: 100 }) =>
  openSqlRegistry({
    path: join(directory, 'registry.db'),
    blobs: blobs(),
    nowS: () => 5,
    ...limits,
  });

beforeEach(() => {
  directory = mkdtempSync(join(tmpdir(), 'rankgate-registry-'));
  registry = open();
});
afterEach(() => {
  registry.close();
  rmSync(directory, { recursive: true });
});

async function stored(count: number): Promise<Generation[]> {
  const made: Generation[] = [];
  for (let i = 0; i < count; i++) {
    const generation = await blobs().put(Uint8Array.of(i));
    registry.store(generation, fakeManifest(8), 1);
    made.push(generation);
  }
  return made;
}

describe('the registry over SQLite', () => {
  it('keeps eight generations before the present one, and the blobs of no others', async () => {
    const made = await stored(12);
    registry.create('a', made[0]!);
    for (const generation of made.slice(1)) registry.swap('a', generation, null);
    expect(registry.find('a')?.previous).toEqual(made.slice(3, 11).reverse());
    expect(made.map((generation) => blobs().has(generation))).toEqual(made.map((_, i) => i >= 3));
  });

  it('keeps a removed adapter’s blob until its last lease', async () => {
    const [first] = await stored(1);
    registry.create('a', first!);
    const leases = [registry.lease('a'), registry.lease(`a@${first}`)];
    registry.remove('a', first!);
    leases[0]!.release();
    leases[0]!.release();
    expect([registry.leases(first!), blobs().has(first!)]).toEqual([1, true]);
    leases[1]!.release();
    expect([registry.leases(first!), blobs().has(first!)]).toEqual([0, false]);
  });

  it('leases no generation by the name of another adapter', async () => {
    const [first, second] = await stored(2);
    registry.create('a', first!);
    registry.create('b', second!);
    const notFound = expect.objectContaining({ code: 'ADAPTER_NOT_FOUND' });
    expect(() => registry.lease(`a@${second}`)).toThrow(notFound);
    for (const reference of ['', 'c', 'a@', 'a@sha256:1', '@', '../a', `c@${first}`]) {
      expect(() => registry.lease(reference)).toThrow(notFound);
    }
  });

  it('stores nothing without its blob', () => {
    expect(() => registry.store(fakeGeneration('a'), fakeManifest(8), 1)).toThrow(
      expect.objectContaining({ code: 'ADAPTER_NOT_FOUND' }),
    );
  });

  it('forgets the oldest of many generations that nobody named', async () => {
    const made = await stored(20);
    expect(made.filter((generation) => blobs().has(generation))).toEqual(made.slice(4));
  });

  it.each(['', 'A', 'a/b', '..', 'a..b', '-a', 'a\0', 'é', 'a'.repeat(65)])(
    'takes no name %j',
    async (name) => {
      const [first] = await stored(1);
      expect(() => registry.create(name, first!)).toThrow(
        expect.objectContaining({ code: 'INVALID_REQUEST' }),
      );
    },
  );

  it('refuses names beyond its limit', async () => {
    registry.close();
    registry = open({ namesMax: 1 });
    const [first] = await stored(1);
    registry.create('a', first!);
    expect(() => registry.create('b', first!)).toThrow(
      expect.objectContaining({ code: 'NO_CAPACITY' }),
    );
  });

  it('says so when the disk is full, stays as it was, and goes on when there is room', async () => {
    const [first, second] = await stored(2);
    registry.create('a', first!);
    registry.create('b', second!);
    registry.close();
    registry = open({ bytesMax: 1 }); // The file may not grow by a page.
    let acknowledged = 0;
    const fill = () => {
      for (; acknowledged < 500; acknowledged++) registry.create(`c-${acknowledged}`, first!);
    };
    expect(fill).toThrow(expect.objectContaining({ code: 'DISK_FULL' }));
    expect(registry.list()).toHaveLength(2 + acknowledged);
    registry.close();
    registry = open();
    expect(registry.list()).toHaveLength(2 + acknowledged);
    expect(registry.swap('a', second!, first!).generation).toBe(second);
  });

  it('says so when there is no room to begin with', () => {
    registry.close();
    rmSync(join(directory, 'registry.db'));
    const begin = () => open({ bytesMax: 1 });
    expect(begin).toThrow(expect.objectContaining({ code: 'DISK_FULL' }));
    registry = open();
  });

  it('closes whole, and keeps all, when its log cannot be moved into the database', async () => {
    const [first] = await stored(1);
    registry.create('a', first!);
    const { pragma } = Database.prototype;
    Database.prototype.pragma = function (this: Database.Database, text: string): unknown {
      if (text.startsWith('wal_checkpoint')) throw new Error('database or disk is full');
      return pragma.call(this, text);
    };
    try {
      registry.close();
    } finally {
      Database.prototype.pragma = pragma;
    }
    registry = open();
    expect(registry.find('a')?.generation).toBe(first);
  });

  it('ends a lease and removes a name although the generation cannot be deleted', async () => {
    const [first] = await stored(1);
    registry.create('a', first!);
    const lease = registry.lease('a');
    const other = new Database(join(directory, 'registry.db'));
    const refuse = "SELECT RAISE(ROLLBACK, 'disk')";
    other.exec(`CREATE TRIGGER stuck BEFORE DELETE ON generations BEGIN ${refuse}; END`);
    registry.remove('a', first!);
    lease.release();
    expect([registry.find('a'), registry.leases(first!)]).toEqual([null, 0]);
    other.exec('DROP TRIGGER stuck');
    other.close();
    registry.close();
    registry = open();
    expect(blobs().has(first!)).toBe(false);
  });

  it('is one process’s', () => {
    expect(() => open()).toThrow(expect.objectContaining({ code: 'NO_CAPACITY' }));
    registry.close();
    registry.close();
    registry = open();
  });

  it('refuses a schema that is newer', () => {
    registry.close();
    const db = new Database(join(directory, 'registry.db'));
    db.exec('UPDATE schema SET version = 2');
    db.close();
    expect(() => open()).toThrow(expect.objectContaining({ code: 'UNSUPPORTED' }));
  });

  it('releases a lease after it was closed', async () => {
    const [first] = await stored(1);
    registry.create('a', first!);
    const lease = registry.lease('a');
    registry.close();
    lease.release();
    expect(blobs().has(first!)).toBe(true);
  });

  it('has what it acknowledged after kill -9', () => {
    registry.close();
    const script = `
      import { createBlobStore } from './src/adapters/blobs.ts';
      import { openSqlRegistry } from './src/adapters/sql-registry.ts';
      import { fakeManifest } from './test/support/fake-registry.ts';
      const blobs = createBlobStore(${JSON.stringify(join(directory, 'blobs'))});
      const path = ${JSON.stringify(join(directory, 'registry.db'))};
      const registry = openSqlRegistry({ path, blobs, nowS: () => 7 });
      const generation = await blobs.put(Uint8Array.of(1, 2, 3));
      registry.store(generation, fakeManifest(4), 3);
      registry.create('survivor', generation);
      process.kill(process.pid, 'SIGKILL');
    `;
    const args = ['--import', 'tsx', '--input-type=module', '-e', script];
    const { signal } = spawnSync(process.execPath, args);
    expect(signal).toBe('SIGKILL');
    registry = open();
    const record = registry.find('survivor');
    expect(record).toMatchObject({ updatedS: 7, bytes: 3, manifest: { rankMax: 4 } });
    expect(blobs().has(record!.generation)).toBe(true);
  });
});
