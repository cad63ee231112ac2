import {
  cpSync,
  mkdirSync,
  mkdtempSync,
  rmSync,
  symlinkSync,
  truncateSync,
  writeFileSync,
} from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { blobPath, createBlobStore } from '../../../src/adapters/blobs.ts';
import { createImporter } from '../../../src/adapters/importer.ts';
import { type PackedAdapter, readPacked } from '../../../src/adapters/pack.ts';
import type { Importer, Registry } from '../../../src/adapters/registry.ts';
import { openSqlRegistry } from '../../../src/adapters/sql-registry.ts';
import { f16Values } from '../../../src/kernels/half.ts';
import { goldenConfig, goldenDirectory, tinyBase } from '../../support/tiny-base.ts';

const acceptBaseName = 'rankgate/tiny-random';
let directory: string;
let registry: Registry;
let importer: Importer;

function create(options: { waitingMax?: number; jobMsMax?: number } = {}): Importer {
  const blobDirectory = join(directory, 'blobs');
  const blobs = createBlobStore(blobDirectory);
  return createImporter({ base: tinyBase, registry, blobs, blobDirectory, ...options });
}

beforeEach(() => {
  directory = mkdtempSync(join(tmpdir(), 'rankgate-import-'));
  const blobs = createBlobStore(join(directory, 'blobs'));
  registry = openSqlRegistry({ path: join(directory, 'registry.db'), blobs, nowS: () => 1 });
  importer = create();
});
afterEach(async () => {
  await importer.close();
  registry.close();
  rmSync(directory, { recursive: true });
});

/** A copy of a golden adapter after `change`. */
function changed(change: (folder: string) => void): string {
  const folder = join(directory, 'adapter');
  cpSync(goldenDirectory('plain-r4'), folder, { recursive: true });
  change(folder);
  return folder;
}

/** B[:, :k]·A[:k, :] of blk.0.attn_q, 64 × 64, within the first page. */
function delta(packed: PackedAdapter, k: number): number[] {
  const { a, b } = packed.page({ block: 0, projection: 'attn_q' }, 0)!;
  return Array.from({ length: 64 * 64 }, (_, at) => {
    const [row, column] = [Math.floor(at / 64), at % 64];
    let sum = 0;
    for (let r = 0; r < k; r++)
      sum += f16Values[b[r * 64 + row]!]! * f16Values[a[r * 64 + column]!]!;
    return sum;
  });
}

function distance(x: readonly number[], y: readonly number[]): number {
  return Math.hypot(...x.map((value, i) => value - (y[i] ?? 0)));
}

describe('the importer', () => {
  it('stores and registers an adapter', async () => {
    const adapter = await importer.importPeft(goldenDirectory('plain-r4'), { acceptBaseName });
    expect(adapter).toMatchObject({ manifest: { rankMax: 4 }, warnings: [] });
    const path = blobPath(join(directory, 'blobs'), adapter.generation);
    expect((await readPacked(path, adapter.generation)).manifest).toEqual(adapter.manifest);
    const record = registry.create('plain', adapter.generation);
    expect(record).toMatchObject({ bytes: adapter.bytes, manifest: adapter.manifest });
  });

  it('shares ranks out among modules unless levels are to be uniform', async () => {
    const from = goldenDirectory('patterns-r16');
    const shared = await importer.importPeft(from, { acceptBaseName });
    const uniform = await importer.importPeft(from, { acceptBaseName, levels: 'uniform' });
    expect([shared.manifest.levels === null, uniform.manifest.levels]).toEqual([false, null]);
    // At the same bytes, more is kept, and at a low level visibly more.
    const [more, less] = [shared.manifest.rankCurve, uniform.manifest.rankCurve];
    less.forEach((share, i) => {
      expect(more[i]).toBeGreaterThanOrEqual(share - 1e-12);
    });
    expect(more[3]! - less[3]!).toBeGreaterThan(0.001);
  });

  it('gives the same generation for the same files', async () => {
    const imports = [1, 2].map(() =>
      importer.importPeft(goldenDirectory('qv-r8'), { acceptBaseName }),
    );
    const [first, second] = await Promise.all(imports);
    expect(second).toEqual(first);
  });

  it('exports a prefix that imports again, and serves the same ranks', async () => {
    const { generation } = await importer.importPeft(goldenDirectory('rslora-r8'), {
      acceptBaseName,
    });
    const files = await importer.exportPeft(generation, 3);
    const folder = join(directory, 'exported');
    mkdirSync(folder);
    writeFileSync(join(folder, 'adapter_config.json'), files.config);
    writeFileSync(join(folder, 'adapter_model.safetensors'), files.weights);
    const again = await importer.importPeft(folder, { acceptBaseName });
    expect(again.manifest.rankMax).toBe(3);
    const path = (of: typeof generation) => blobPath(join(directory, 'blobs'), of);
    const before = await readPacked(path(generation), generation);
    const after = await readPacked(path(again.generation), again.generation);
    // The factors are balanced and rounded once more: the deltas differ by f16's rounding, and by nothing else.
    const error = distance(delta(before, 3), delta(after, 3)) / distance(delta(before, 3), []);
    expect(error).toBeLessThan(0.001);
    expect(error).toBeLessThan(0.01 * distance(delta(before, 3), delta(before, 2)));
  });

  it('exports nothing that is not stored', async () => {
    const generation = `sha256:${'0'.repeat(64)}` as const;
    await expect(importer.exportPeft(generation, 1)).rejects.toMatchObject({
      code: 'ADAPTER_NOT_FOUND',
    });
  });

  it.each<[string, (folder: string) => void, string]>([
    ['no config', (f) => rmSync(join(f, 'adapter_config.json')), 'config.json is missing'],
    ['no weights', (f) => rmSync(join(f, 'adapter_model.safetensors')), 'is missing'],
    [
      'a pickle',
      (f) => {
        rmSync(join(f, 'adapter_model.safetensors'));
        writeFileSync(join(f, 'adapter_model.bin'), 'PK');
      },
      'safetensors only',
    ],
    [
      'a link for weights',
      (f) => {
        rmSync(join(f, 'adapter_model.safetensors'));
        symlinkSync('/etc/passwd', join(f, 'adapter_model.safetensors'));
      },
      'is a link',
    ],
    [
      'a directory for a config',
      (f) => {
        rmSync(join(f, 'adapter_config.json'));
        mkdirSync(join(f, 'adapter_config.json'));
      },
      'not a regular file',
    ],
    [
      'a config too large',
      (f) => writeFileSync(join(f, 'adapter_config.json'), ' '.repeat(1024 * 1024 + 1)),
      'at most 1048576',
    ],
    [
      'weights too large',
      (f) => truncateSync(join(f, 'adapter_model.safetensors'), 2 * 1024 ** 3 + 1),
      'at most 2147483648',
    ],
    [
      'a config that is not UTF-8',
      (f) => writeFileSync(join(f, 'adapter_config.json'), Buffer.from([0x22, 0xff, 0x22])),
      'not UTF-8',
    ],
    [
      'what is not served',
      (f) => {
        const fields = { ...JSON.parse(goldenConfig('plain-r4')), use_dora: true };
        writeFileSync(join(f, 'adapter_config.json'), JSON.stringify(fields));
      },
      'use_dora is true',
    ],
  ])('refuses %s', async (_, change, message) => {
    const error = await importer.importPeft(changed(change), { acceptBaseName }).then(
      () => null,
      (reason: Error) => reason,
    );
    expect(error).toMatchObject({ code: 'INVALID_ADAPTER' });
    expect(error?.message).toContain(message);
    expect(error?.message).not.toContain(directory);
  });

  it('refuses a link to a directory, and no directory', async () => {
    symlinkSync(goldenDirectory('plain-r4'), join(directory, 'link'));
    for (const path of ['link', 'missing'].map((name) => join(directory, name))) {
      await expect(importer.importPeft(path)).rejects.toMatchObject({ code: 'INVALID_ADAPTER' });
    }
  });

  it('refuses another base across the thread, with its code', async () => {
    const folder = changed((f) => {
      const fields = JSON.parse(goldenConfig('plain-r4'));
      fields.base_model_name_or_path = 'meta-llama/Llama-3.2-1B';
      writeFileSync(join(f, 'adapter_config.json'), JSON.stringify(fields));
    });
    await expect(importer.importPeft(folder)).rejects.toMatchObject({
      code: 'BASE_MISMATCH',
      param: 'base_model_name_or_path',
    });
  });

  it('lets the event loop run while it works', async () => {
    let turns = 0;
    let running = true;
    const turn = (): void => {
      turns += 1;
      if (running) setImmediate(turn);
    };
    turn();
    await importer.importPeft(goldenDirectory('regex-r64'), { acceptBaseName });
    running = false;
    expect(turns).toBeGreaterThan(100);
  });

  it('bounds what waits', async () => {
    importer = create({ waitingMax: 1 });
    const jobs = [1, 2, 3].map(() =>
      importer.importPeft(goldenDirectory('qv-r8'), { acceptBaseName }),
    );
    const results = await Promise.allSettled(jobs);
    expect(results.map((result) => result.status)).toEqual(['fulfilled', 'fulfilled', 'rejected']);
    await expect(jobs[2]).rejects.toMatchObject({ code: 'CONTENDED', retryAfterS: 5 });
  });

  it('ends a job that takes too long, and goes on with the next', async () => {
    const slow = create({ jobMsMax: 1 });
    const job = slow.importPeft(goldenDirectory('regex-r64'), { acceptBaseName });
    await expect(job).rejects.toThrow('longer than 1 ms');
    await slow.close();
    await importer.importPeft(goldenDirectory('qv-r8'), { acceptBaseName });
  });

  it('ends what runs and waits when it is closed', async () => {
    const jobs = [1, 2].map(() =>
      importer.importPeft(goldenDirectory('regex-r64'), { acceptBaseName }),
    );
    const settled = Promise.allSettled(jobs);
    await importer.close();
    for (const result of await settled) {
      expect(result).toMatchObject({ status: 'rejected', reason: { code: 'CANCELLED' } });
    }
  });

  it('imports again when the blob was removed under way', async () => {
    const blobDirectory = join(directory, 'blobs');
    const real = createBlobStore(blobDirectory);
    let asked = 0;
    const blobs = {
      ...real,
      has: (g: Parameters<typeof real.has>[0]) => ++asked > 1 && real.has(g),
    };
    const racing = createImporter({ base: tinyBase, registry, blobs, blobDirectory });
    const { generation } = await racing.importPeft(goldenDirectory('qv-r8'), { acceptBaseName });
    expect(asked).toBe(2);
    expect(registry.create('qv', generation).generation).toBe(generation);
    await racing.close();
  });
});
