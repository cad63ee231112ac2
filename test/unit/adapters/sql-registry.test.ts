import { spawnSync } from 'node:child_process';
import { mkdtempSync, readdirSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import Database from 'libsql';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { type Generation, noOptions } from '../../../src/adapters/adapter.ts';
import { createBlobStore } from '../../../src/adapters/blobs.ts';
import type { Registry } from '../../../src/adapters/registry.ts';
import { openSqlRegistry, type SqlRegistryOptions } from '../../../src/adapters/sql-registry.ts';
import { fakeGeneration, fakeManifest } from '../../support/fake-registry.ts';

let directory: string;
let registry: Registry;
const blobs = () => createBlobStore(join(directory, 'blobs'));
const open = (limits: Partial<SqlRegistryOptions> = { namesMax: 100 }) =>
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
  it('keeps sixteen generations before the present one, and the blobs of no others', async () => {
    const [first] = await stored(1);
    registry.create('a', first!);
    const made = [first!];
    for (let i = 1; i < 20; i++) {
      const generation = await blobs().put(Uint8Array.of(i));
      registry.store(generation, fakeManifest(8), 1);
      registry.swap('a', generation, null);
      made.push(generation);
    }
    expect(registry.find('a')?.previous).toEqual(made.slice(3, 19).reverse());
    await registry.durable(); // Then the blobs go.
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
    await registry.durable(); // Then the blobs go.
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
    await registry.durable(); // Then the blobs go.
    expect(made.filter((generation) => blobs().has(generation))).toEqual(made.slice(4));
  });

  it.each([
    '',
    'A',
    'a/',
    '/a',
    'a/b/c',
    'a/..',
    'a//b',
    '..',
    'a..b',
    '-a',
    'a\0',
    'é',
    'a'.repeat(65),
  ])('takes no name %j', async (name) => {
    const [first] = await stored(1);
    expect(() => registry.create(name, first!)).toThrow(
      expect.objectContaining({ code: 'INVALID_REQUEST' }),
    );
  });

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

  it.each([1, 3])('refuses schema %i, which it cannot read', (version) => {
    registry.close();
    const db = new Database(join(directory, 'registry.db'));
    db.exec(`UPDATE schema SET version = ${version}`);
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

  it('writes ahead, and a commit does not wait for the disk', () => {
    registry.close();
    const seen: string[] = [];
    const { pragma } = Database.prototype;
    const spied = function (this: Database.Database, text: string): unknown {
      const answer = pragma.call(this, text);
      // What the connection says of itself after the last setting.
      if (text.startsWith('max_page_count')) {
        const read = (name: string) => this.prepare(`PRAGMA ${name}`).raw().get() as unknown[];
        seen.push(
          ...['journal_mode', 'synchronous', 'foreign_keys'].map((name) => String(read(name)[0])),
        );
      }
      return answer;
    };
    Database.prototype.pragma = spied as typeof pragma;
    try {
      registry = open();
    } finally {
      Database.prototype.pragma = pragma;
    }
    expect(seen).toEqual(['wal', '1', '1']); // 1 is NORMAL: `durable` syncs
  });

  it('syncs once for all who wait, and removes no blob before', async () => {
    const [first, second] = await stored(2);
    registry.create('kept', second!);
    registry.create('a', first!);
    registry.close();
    const syncs: (() => void)[] = [];
    const syncFile = () => new Promise<void>((resolve) => syncs.push(resolve));
    registry = open({ syncFile });
    registry.pin('kept');
    const early = registry.durable();
    registry.swap('a', second!, null);
    registry.rollback('a');
    registry.remove('a', null);
    const done: string[] = [];
    const late = Promise.all([0, 1, 2].map(() => registry.durable())).then(() => done.push('late'));
    void early.then(() => done.push('early'));
    syncs[0]!();
    await early;
    expect([done, syncs.length, blobs().has(first!)]).toEqual([['early'], 2, true]);
    syncs[1]!();
    await late;
    expect([done, syncs.length, blobs().has(first!)]).toEqual([['early', 'late'], 2, false]);
    await registry.durable(); // Nothing was written since.
    expect(syncs.length).toBe(2);
  });

  it('acknowledges nothing any more once a sync has failed', async () => {
    registry.close();
    const failures = [Object.assign(new Error('disk'), { code: 'EIO' })];
    registry = open({
      syncFile: () => (failures.length > 0 ? Promise.reject(failures.pop()!) : Promise.resolve()),
    });
    await registry.durable();
    const [first] = await stored(1);
    registry.create('a', first!);
    const lost = expect.objectContaining({ code: 'INTERNAL' });
    await expect(registry.durable()).rejects.toEqual(lost);
    // The system took the pages for clean: a sync that succeeds now says nothing of them.
    await expect(registry.durable()).rejects.toEqual(lost);
  });

  it('follows a name by its aliases, and takes changes by the name itself', async () => {
    const [first, second] = await stored(2);
    registry.create('a', first!);
    expect(registry.alias('b', 'a')).toMatchObject({ name: 'a', aliases: ['b'] });
    registry.swap('a', second!, first!);
    expect(registry.find('b')).toEqual(registry.find('a'));
    {
      using lease = registry.lease('b');
      expect(lease).toMatchObject({ name: 'a', generation: second });
      using old = registry.lease(`b@${first}`);
      expect(old.generation).toBe(first);
    }
    const invalid = expect.objectContaining({ code: 'INVALID_REQUEST' });
    expect(() => registry.swap('b', first!, null)).toThrow(invalid);
    expect(() => registry.rollback('b')).toThrow(invalid);
    expect(() => registry.pin('b')).toThrow(invalid);
    // No alias of an alias, not even of itself: there are no cycles.
    expect(() => registry.alias('c', 'b')).toThrow(invalid);
    expect(() => registry.alias('b', 'b')).toThrow(invalid);
    const exists = expect.objectContaining({ code: 'ADAPTER_EXISTS' });
    expect(() => registry.alias('a', 'a')).toThrow(exists);
    expect(() => registry.create('b', first!)).toThrow(exists);
    const used = expect.objectContaining({ code: 'ADAPTER_IN_USE' });
    expect(() => registry.remove('a', null)).toThrow(used);
    expect(() => registry.remove('b', first!)).toThrow(
      expect.objectContaining({ code: 'GENERATION_MISMATCH' }),
    );
    registry.remove('b', second!);
    expect([registry.find('b'), registry.find('a')?.aliases]).toEqual([null, []]);
    registry.remove('a', null);
  });

  it('has no alias across tenants', async () => {
    const [first] = await stored(1);
    registry.create('acme/a', first!);
    registry.create('shared', first!);
    const invalid = expect.objectContaining({ code: 'INVALID_REQUEST' });
    for (const [name, target] of [
      ['b', 'acme/a'],
      ['other/b', 'acme/a'],
      ['acme/b', 'shared'],
    ] as const) {
      expect(() => registry.alias(name, target)).toThrow(invalid);
    }
    expect(registry.alias('acme/b', 'acme/a').aliases).toEqual(['acme/b']);
  });

  it('keeps a pinned name, and its pins across a new start', async () => {
    const [first, second] = await stored(2);
    registry.create('a', first!);
    expect(registry.pin('a').isPinned).toBe(true);
    registry.swap('a', second!, null);
    registry.close();
    registry = open();
    expect(registry.pinned()).toEqual([second]);
    expect(() => registry.remove('a', null)).toThrow(
      expect.objectContaining({ code: 'ADAPTER_IN_USE' }),
    );
    registry.unpin('a');
    expect(registry.pinned()).toEqual([]);
    registry.remove('a', null);
    await registry.durable(); // Then the blobs go.
    expect([first, second].map((one) => blobs().has(one!))).toEqual([false, false]);
  });

  it('keeps what a generation needs as long as that, and names it never', async () => {
    const [basis] = await stored(1);
    const kind = { kind: 'svfit' as const, options: { ...noOptions, needs: basis! } };
    const tenants: Generation[] = [];
    for (const name of ['a', 'b']) {
      const generation = await blobs().put(new TextEncoder().encode(name));
      registry.store(generation, { ...fakeManifest(8), ...kind }, 1);
      registry.create(name, generation);
      tenants.push(generation);
    }
    await stored(30); // More than are kept unnamed.
    registry.remove('a', null);
    registry.close();
    registry = open();
    expect(blobs().has(basis!)).toBe(true);
    const lease = registry.lease('b');
    registry.remove('b', null);
    expect(blobs().has(basis!)).toBe(true);
    lease.release();
    await registry.durable(); // Then the blobs go.
    expect([basis!, ...tenants].map((one) => blobs().has(one))).toEqual([false, false, false]);
    const other = await blobs().put(Uint8Array.of(99));
    expect(() => registry.store(other, { ...fakeManifest(8), ...kind }, 1)).toThrow(
      expect.objectContaining({ code: 'ADAPTER_NOT_FOUND' }),
    );
  });

  it('names no basis', async () => {
    const generation = await blobs().put(Uint8Array.of(7));
    registry.store(generation, { ...fakeManifest(8), kind: 'basis' }, 1);
    const invalid = expect.objectContaining({ code: 'INVALID_REQUEST', param: 'generation' });
    expect(() => registry.create('a', generation)).toThrow(invalid);
  });

  describe('after kill -9', () => {
    /** Runs `act` in a process that kills itself; what it printed. */
    function die(act: string): string {
      registry.close();
      const script = `
        import Database from 'libsql';
        import { createBlobStore } from './src/adapters/blobs.ts';
        import { openSqlRegistry } from './src/adapters/sql-registry.ts';
        import { fakeManifest } from './test/support/fake-registry.ts';
        const die = () => process.kill(process.pid, 'SIGKILL');
        const blobs = createBlobStore(${JSON.stringify(join(directory, 'blobs'))});
        const path = ${JSON.stringify(join(directory, 'registry.db'))};
        const registry = openSqlRegistry({ path, blobs, nowS: () => 7 });
        const generation = await blobs.put(Uint8Array.of(1, 2, 3));
        ${act}
        die();
      `;
      const args = ['--import', 'tsx', '--input-type=module', '-e', script];
      const { signal } = spawnSync(process.execPath, args);
      registry = open();
      return String(signal);
    }
    const blobFiles = () => readdirSync(join(directory, 'blobs'));
    const store = 'registry.store(generation, fakeManifest(4), 3);';

    it('it has what it acknowledged', () => {
      const acts = `${store} registry.create('survivor', generation); registry.pin('survivor');
        registry.alias('second', 'survivor');`;
      expect(die(acts)).toBe('SIGKILL');
      const record = registry.find('second');
      expect(record).toMatchObject({ name: 'survivor', updatedS: 7, bytes: 3, isPinned: true });
      expect(record).toMatchObject({ manifest: { rankMax: 4 } });
      expect(blobs().has(record!.generation)).toBe(true);
    });

    /** The commit of the n-th transaction never comes. */
    const dieAtCommit = (n: number): string => `
      const { exec } = Database.prototype;
      let commits = 0;
      Database.prototype.exec = function (text) {
        if (text === 'COMMIT' && ++commits === ${n}) die();
        return exec.call(this, text);
      };`;
    it.each([
      ['between the blob and its registration', ''],
      ['in the middle of the registration', `${dieAtCommit(1)} ${store}`],
      ['between the registration and the name', store],
      [
        'in the middle of the naming',
        `${dieAtCommit(2)} ${store} registry.create('half', generation);`,
      ],
    ])('%s, no name points at nothing and no file is left over', (_, acts) => {
      expect(die(acts)).toBe('SIGKILL');
      expect(registry.list()).toEqual([]);
      expect(blobFiles()).toEqual([]);
    });

    it('in the middle of a swap, the name is at what it was, or at what it was to be', async () => {
      const [first] = await stored(1);
      registry.create('a', first!);
      const swap = `${store} registry.swap('a', generation, null);`;
      for (const [acts, isSwapped] of [
        [`${dieAtCommit(2)} ${swap}`, false],
        [swap, true],
      ] as const) {
        expect(die(acts)).toBe('SIGKILL');
        const { generation, previous } = registry.find('a')!;
        expect(generation !== first).toBe(isSwapped);
        for (const one of [generation, ...previous]) expect(blobs().has(one)).toBe(true);
        expect(blobFiles()).toHaveLength(1 + previous.length);
      }
    });
  });
});
