import {
  existsSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  rmSync,
  writeFileSync,
} from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import type { AdapterManifest } from '../../../src/adapters/adapter.ts';
import { blobPath, createBlobStore, keptPath } from '../../../src/adapters/blobs.ts';
import { createImporter } from '../../../src/adapters/importer.ts';
import { generationOf } from '../../../src/adapters/pack.ts';
import { packPairs } from '../../../src/adapters/pack-pairs.ts';
import { packPeft } from '../../../src/adapters/pack-peft.ts';
import { importPacked, packedConfig } from '../../../src/adapters/packed-import.ts';
import type { Importer, Registry } from '../../../src/adapters/registry.ts';
import { openSqlRegistry } from '../../../src/adapters/sql-registry.ts';
import { squeezeMatrix } from '../../../src/adapters/squeeze.ts';
import { readSafetensors, writeSafetensors } from '../../../src/model/safetensors.ts';
import { goldenConfig, goldenDirectory, goldenWeights, tinyBase } from '../../support/tiny-base.ts';

const acceptBaseName = 'rankgate/tiny-random';
const source = { format: 'rankgate', by: 'test', from: [] } as const;

/** A compensation of one module: its order by outputs is one that an import would change. */
function compensation(changes: { baseHash?: string; out?: number } = {}): Uint8Array {
  const { baseHash = tinyBase.hash, out = 64 } = changes;
  const data = Float64Array.from({ length: out * 64 }, (_, i) => Math.sin(i * i));
  const covariance = { rows: 64, columns: 64, data: new Float64Array(64 * 64) };
  for (let i = 0; i < 64; i++) covariance.data[i * 65] = 1 + i;
  const squeeze = () => squeezeMatrix({ rows: out, columns: 64, data }, { rankMax: 4, covariance });
  const module = { block: 1, projection: 'attn_q' } as const;
  const about = { kind: 'eora', describe: 'test', baseHash, source, levels: 'uniform' } as const;
  return packPairs([{ module, squeeze }], about).bytes;
}

function withManifest(
  bytes: Uint8Array,
  change: (manifest: AdapterManifest) => object,
): Uint8Array {
  const { metadata, tensors } = readSafetensors(bytes);
  const manifest = JSON.parse(metadata.get('manifest')!) as AdapterManifest;
  return writeSafetensors(tensors, new Map([['manifest', JSON.stringify(change(manifest))]]));
}

describe('importPacked', () => {
  it('takes a file as it is', () => {
    const bytes = compensation();
    const { manifest, bytes: taken } = importPacked(packedConfig, bytes, tinyBase);
    expect(taken).toBe(bytes);
    expect(manifest.kind).toBe('eora');
  });

  it.each<[string, () => Uint8Array, string, string]>([
    [
      'another base',
      () => compensation({ baseHash: 'cd'.repeat(32) }),
      'BASE_MISMATCH',
      'made for the base cdcdcdcdcdcd',
    ],
    [
      'sizes of another base',
      () => compensation({ out: 32 }),
      'INVALID_ADAPTER',
      '32×64, which this base does not have',
    ],
    [
      'a block that the base does not have',
      () =>
        withManifest(renamed(compensation(), 'blk.1.', 'blk.2.'), (manifest) => ({
          ...manifest,
          modules: manifest.modules.map((module) => ({ ...module, block: 2 })),
        })),
      'INVALID_ADAPTER',
      'which this base does not have',
    ],
    [
      'a number that is infinite',
      () => poisoned(compensation(), 0x7c00),
      'INVALID_ADAPTER',
      'does not fit its manifest',
    ],
    [
      'a number that is none',
      () => poisoned(compensation(), 0xfe01),
      'INVALID_ADAPTER',
      'does not fit its manifest',
    ],
    [
      'a manifest that does not hold',
      () => withManifest(compensation(), (manifest) => ({ ...manifest, rankMax: 9 })),
      'INVALID_ADAPTER',
      'its manifest is not valid',
    ],
    [
      'a PEFT file',
      () => goldenWeights('plain-r4'),
      'INVALID_ADAPTER',
      'its manifest is not valid',
    ],
    ['a cut file', () => compensation().subarray(0, 1000), 'INVALID_ADAPTER', 'safetensors'],
    ['no file', () => new Uint8Array(), 'INVALID_ADAPTER', 'safetensors'],
  ])('refuses %s', (_, make, code, message) => {
    const run = (): unknown => importPacked(packedConfig, make(), tinyBase);
    expect(run).toThrow(message);
    expect(run).toThrow(expect.objectContaining({ code }));
  });

  it('refuses another rankgate.json', () => {
    const run = (): unknown => importPacked('{"kind":"fly"}', compensation(), tinyBase);
    expect(run).toThrow(expect.objectContaining({ code: 'UNSUPPORTED' }));
  });
});

function renamed(bytes: Uint8Array, from: string, to: string): Uint8Array {
  const { metadata, tensors } = readSafetensors(bytes);
  const moved = [...tensors].map(([name, tensor]) => [name.replace(from, to), tensor] as const);
  return writeSafetensors(new Map(moved), metadata);
}

/** With the bits of one f16 in the first A. */
function poisoned(bytes: Uint8Array, bits: number): Uint8Array {
  const { metadata, tensors } = readSafetensors(bytes);
  const changed = [...tensors].map(([name, tensor]) => {
    const data = tensor.data.slice();
    if (name.endsWith('.a')) new DataView(data.buffer).setUint16(10, bits, true);
    return [name, { ...tensor, data }] as const;
  });
  return writeSafetensors(new Map(changed), metadata);
}

describe('the importer', () => {
  let directory: string;
  let registry: Registry;
  let importer: Importer;
  beforeEach(() => {
    directory = mkdtempSync(join(tmpdir(), 'rankgate-packed-'));
    const blobDirectory = join(directory, 'blobs');
    const blobs = createBlobStore(blobDirectory);
    registry = openSqlRegistry({ path: join(directory, 'registry.db'), blobs, nowS: () => 1 });
    importer = createImporter({ base: tinyBase, registry, blobs, blobDirectory });
  });
  afterEach(async () => {
    await importer.close();
    registry.close();
    rmSync(directory, { recursive: true });
  });

  function folderWith(files: Readonly<Record<string, string | Uint8Array>>): string {
    const folder = join(directory, 'adapter');
    mkdirSync(folder);
    for (const [name, contents] of Object.entries(files)) {
      writeFileSync(join(folder, name), contents);
    }
    return folder;
  }

  it('lets a packed file in under its own hash', async () => {
    const bytes = compensation();
    const folder = folderWith({
      'rankgate.json': packedConfig,
      'adapter_model.safetensors': bytes,
    });
    const adapter = await importer.importPeft(folder);
    expect(adapter).toMatchObject({
      bytes: bytes.length,
      warnings: [],
      manifest: { kind: 'eora' },
    });
    expect(registry.create('repair', adapter.generation).generation).toBe(adapter.generation);
  });

  it('lets in what a packed file keeps beside it, and goes without it, but takes no other', async () => {
    const kept = Uint8Array.of(1, 2, 3);
    const bytes = withManifest(compensation(), (manifest) => ({
      ...manifest,
      source: { ...source, keeps: generationOf(kept) },
    }));
    const files = { 'rankgate.json': packedConfig, 'adapter_model.safetensors': bytes };
    const folder = folderWith({ ...files, 'adapter_model.coso.safetensors': Uint8Array.of(1) });
    await expect(importer.importPeft(folder)).rejects.toMatchObject({
      code: 'INVALID_ADAPTER',
      message: expect.stringContaining('.coso.safetensors beside it is not what'),
    });
    rmSync(join(folder, 'adapter_model.coso.safetensors'));
    const { generation, manifest } = await importer.importPeft(folder);
    const path = keptPath(blobPath(join(directory, 'blobs'), generation));
    expect(existsSync(path)).toBe(false);
    writeFileSync(join(folder, 'adapter_model.coso.safetensors'), kept);
    expect(await importer.importPeft(folder)).toMatchObject({ generation, manifest });
    expect(new Uint8Array(readFileSync(path))).toEqual(kept);
    expect(manifest.source).toEqual({ ...source, keeps: generationOf(kept) });
    // Named and let go, both are gone.
    registry.create('careful', generation);
    registry.remove('careful', null);
    await registry.durable();
    await expect.poll(() => readdirSync(join(directory, 'blobs'))).toEqual([]);
  });

  it('refuses a directory that is both', async () => {
    const folder = folderWith({
      ...{ 'rankgate.json': packedConfig, 'adapter_config.json': goldenConfig('plain-r4') },
      'adapter_model.safetensors': goldenWeights('plain-r4'),
    });
    await expect(importer.importPeft(folder)).rejects.toMatchObject({
      code: 'INVALID_ADAPTER',
      message: expect.stringContaining('one is wanted'),
    });
  });

  it('squeezes a stored adapter into a generation of its own', async () => {
    const { generation } = await importer.importPeft(goldenDirectory('plain-r4'), {
      acceptBaseName,
    });
    const squeezed = await importer.squeeze(generation, { rank: 2 });
    expect(squeezed.generation).not.toBe(generation);
    expect(squeezed.manifest).toMatchObject({
      rankMax: 2,
      source: { by: 'squeeze to rank 2', from: [generation] },
    });
    expect(squeezed.manifest.levels).not.toBeNull(); // imports have levels unless told otherwise
    expect(registry.create('small', squeezed.generation).manifest.rankMax).toBe(2);
    await expect(importer.squeeze(generation, { rank: 5 })).rejects.toMatchObject({
      code: 'INVALID_REQUEST',
      param: 'rank',
    });
    const unknown = `sha256:${'0'.repeat(64)}` as const;
    await expect(importer.squeeze(unknown, { rank: 2 })).rejects.toMatchObject({
      code: 'ADAPTER_NOT_FOUND',
    });
  });

  it('has levels as packPeft makes them, or uniform ones when asked', async () => {
    const files = { config: goldenConfig('plain-r4'), weights: goldenWeights('plain-r4') };
    const { manifest } = packPeft({ ...files, base: tinyBase, acceptBaseName }, 'energy');
    const folder = goldenDirectory('plain-r4');
    const levelled = await importer.importPeft(folder, { acceptBaseName });
    expect(levelled.manifest).toEqual(manifest);
    const uniform = await importer.importPeft(folder, { acceptBaseName, levels: 'uniform' });
    expect(uniform.manifest.levels).toBeNull();
  });
});
