import { existsSync, mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { mkdir, open, rename, unlink } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { basename, join } from 'node:path';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import type { Generation } from '../../../src/adapters/adapter.ts';
import {
  type BlobFiles,
  blobPath,
  createBlobStore,
  keptPath,
} from '../../../src/adapters/blobs.ts';
import { generationOf } from '../../../src/adapters/pack.ts';

const bytes = new TextEncoder().encode('an adapter, whole or not at all');
const generation = generationOf(bytes);

let directory: string;
beforeEach(() => {
  directory = join(mkdtempSync(join(tmpdir(), 'rankgate-blobs-')), 'blobs');
});
afterEach(() => rmSync(join(directory, '..'), { recursive: true }));

/** Real calls of which the `failing`-th throws; `cut` writes half of the bytes first, as a full disk does. */
function filesThatFail(failing: number, code: string) {
  let calls = 0;
  const log: string[] = [];
  const step = async <T>(name: string, act: () => Promise<T>): Promise<T> => {
    calls += 1;
    log.push(name);
    if (calls === failing) throw Object.assign(new Error(`${code}: ${directory}`), { code });
    return act();
  };
  const files: BlobFiles = {
    mkdir: ((path: string, options: { recursive: true }) =>
      step('mkdir', () => mkdir(path, options))) as BlobFiles['mkdir'],
    rename: (from, to) => step('rename', () => rename(from, to)),
    unlink,
    open: async (path, flags, mode) => {
      const handle = await step('open', () => open(path, flags, mode));
      return new Proxy(handle, {
        get(target, key) {
          const value: unknown = Reflect.get(target, key);
          if (typeof value !== 'function') return value;
          return async (...args: unknown[]) => {
            const call = () => Reflect.apply(value, target, args) as Promise<unknown>;
            if (key === 'close') {
              await call(); // Also a close that reports an error gives the descriptor back.
              return step('close', async () => {});
            }
            if (key === 'writeFile' && calls + 1 === failing) {
              await target.writeFile(bytes.subarray(0, 9));
            }
            return step(String(key), call);
          };
        },
      });
    },
  };
  return { files, log };
}

describe('a blob store', () => {
  it('keeps bytes under their hash, once', async () => {
    const store = createBlobStore(directory);
    expect(store.has(generation)).toBe(false);
    expect(await store.put(bytes)).toBe(generation);
    expect(await store.put(bytes)).toBe(generation);
    expect(store.has(generation)).toBe(true);
    expect(readdirSync(directory)).toHaveLength(1);
    expect(new Uint8Array(readFileSync(blobPath(directory, generation)))).toEqual(bytes);
    store.remove(generation);
    store.remove(generation);
    expect(store.has(generation)).toBe(false);
  });

  it('syncs the file before its name, and the directory after', async () => {
    const { files, log } = filesThatFail(0, '');
    await createBlobStore(directory, files).put(bytes);
    const calls = [
      'mkdir',
      'open',
      'writeFile',
      'sync',
      'close',
      'rename',
      'open',
      'sync',
      'close',
    ];
    expect(log).toEqual(calls);
  });

  it.each(['ENOSPC', 'EIO'])(
    'holds nothing or the whole blob, whichever call fails with %s',
    async (code) => {
      let failed = 0;
      for (let n = 1; ; n++) {
        rmSync(directory, { recursive: true, force: true });
        const { files } = filesThatFail(n, code);
        const error = await createBlobStore(directory, files)
          .put(bytes)
          .then(
            () => null,
            (reason: Error) => reason,
          );
        const left = createBlobStore(directory);
        if (left.has(generation)) {
          expect(new Uint8Array(readFileSync(blobPath(directory, generation)))).toEqual(bytes);
        }
        left.sweep(() => true);
        expect(await left.put(bytes)).toBe(generation);
        if (error === null) break;
        failed += 1;
        expect(error).toMatchObject({ code: code === 'ENOSPC' ? 'DISK_FULL' : 'INTERNAL' });
        expect(error.message).not.toContain(directory);
      }
      expect(failed).toBe(9);
    },
  );

  it('sweeps what crashes left, and nothing that is not its own', async () => {
    const store = createBlobStore(directory);
    await store.put(bytes);
    const other = await store.put(Uint8Array.of(1));
    writeFileSync(`${blobPath(directory, generation)}.part`, 'half');
    writeFileSync(join(directory, 'notes.txt'), 'kept');
    store.sweep((known) => known === generation);
    expect([store.has(generation), store.has(other)]).toEqual([true, false]);
    expect(readdirSync(directory).filter((name) => !name.endsWith('.safetensors'))).toEqual([
      'notes.txt',
    ]);
  });

  it('has what a blob keeps beside it before the blob, and removes both', async () => {
    const kept = Uint8Array.of(1, 2, 3);
    const path = keptPath(blobPath(directory, generation));
    for (let n = 1; ; n++) {
      rmSync(directory, { recursive: true, force: true });
      const { files } = filesThatFail(n, 'EIO');
      const whole = await createBlobStore(directory, files)
        .put(bytes, kept)
        .catch(() => null);
      const store = createBlobStore(directory);
      const isWhole = store.has(generation);
      if (isWhole) expect(new Uint8Array(readFileSync(path))).toEqual(kept);
      store.sweep(() => isWhole);
      const left = existsSync(directory) ? readdirSync(directory).length : 0;
      expect(left).toBe(isWhole ? 2 : 0);
      if (whole === null) continue;
      expect(n).toBe(19); // nine calls of each file before
      store.remove(generation);
      store.remove(generation);
      expect(readdirSync(directory)).toEqual([]);
      break;
    }
  });

  it('sweeps what no generation keeps', async () => {
    const store = createBlobStore(directory);
    await store.put(bytes, Uint8Array.of(1));
    const other = await store.put(Uint8Array.of(1), Uint8Array.of(2));
    const path = keptPath(blobPath(directory, generation));
    writeFileSync(`${path}.part`, 'half');
    store.sweep((known) => known === generation);
    expect([store.has(generation), store.has(other)]).toEqual([true, false]);
    expect(new Set(readdirSync(directory))).toEqual(
      new Set([basename(blobPath(directory, generation)), basename(path)]),
    );
  });

  it.each([
    `sha256:${'a'.repeat(63)}`,
    `sha256:${'a'.repeat(65)}`,
    `sha256:${'A'.repeat(64)}`,
    `sha256-${'a'.repeat(64)}`,
    `sha256:${'a'.repeat(61)}/..`,
    'sha256:../../etc/passwd',
    `sha256:${'a'.repeat(64)}\n`,
  ])('makes no path of %j', (id) => {
    expect(() => blobPath(directory, id as Generation)).toThrow('not a generation');
  });
});
