import { mkdtempSync, readdirSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import type { Generation } from '../../../src/adapters/adapter.ts';
import { blobPath, createBlobStore } from '../../../src/adapters/blobs.ts';
import { createImporter } from '../../../src/adapters/importer.ts';
import { generationOf, type PackedAdapter, readPacked } from '../../../src/adapters/pack.ts';
import { prefixOf } from '../../../src/adapters/pack-pairs.ts';
import { packQueryable } from '../../../src/adapters/queryable-directory.ts';
import type { Importer, Registry } from '../../../src/adapters/registry.ts';
import { openSqlRegistry } from '../../../src/adapters/sql-registry.ts';
import { openGguf } from '../../../src/model/gguf.ts';
import {
  type SafetensorsTensor,
  toFloat32,
  writeSafetensors,
} from '../../../src/model/safetensors.ts';
import { createTokenizer, readTokenizerSource } from '../../../src/model/tokenizer.ts';
import { openTiny, tinyPath } from '../../support/open-test-decoder.ts';
import {
  type DirectoryOptions,
  queryableConfig,
  queryableModules,
  queryableRank,
  queryableTensors,
  queryWidth,
  writeQueryable,
} from '../../support/queryable-directory.ts';
import { tinyBase } from '../../support/tiny-base.ts';

// Queryable adapters as directories, through the real import thread: what is packed is what the files say, banks are shared
// and grow at their end, and an export is the way back.

let directory: string;
let registry: Registry;
let importer: Importer;

function open(): void {
  directory = mkdtempSync(join(tmpdir(), 'rankgate-queryable-'));
  const blobDirectory = join(directory, 'blobs');
  const blobs = createBlobStore(blobDirectory);
  registry = openSqlRegistry({ path: join(directory, 'registry.db'), blobs, nowS: () => 1 });
  importer = createImporter({
    ...{ base: tinyBase, registry, blobs, blobDirectory },
    modelPath: tinyPath,
  });
}

async function close(): Promise<void> {
  await importer.close();
  registry.close();
  rmSync(directory, { recursive: true });
}

beforeEach(open);
afterEach(close);

const labels = ['legal, formal tone', 'casual', 'code'];
const first: DirectoryOptions = { seed: 1, labels, bank: { atoms: 3, seed: 50 } };

const read = (generation: Generation): Promise<PackedAdapter> =>
  readPacked(blobPath(join(directory, 'blobs'), generation), generation);

let folders = 0;
function folderOf(options: DirectoryOptions): string {
  folders += 1;
  const tensors = queryableTensors(options);
  return writeQueryable(join(directory, `from-${folders}`), queryableConfig(options), tensors);
}

async function add(name: string, options: DirectoryOptions): Promise<PackedAdapter> {
  const { generation } = await importer.importPeft(folderOf(options));
  registry.create(name, generation);
  return read(generation);
}

const numbers = (tensor: SafetensorsTensor | undefined): number[] => [...toFloat32(tensor!)];

function near(got: ArrayLike<number>, wanted: readonly number[], relative: number): void {
  const size = Math.hypot(...wanted);
  const off = Math.hypot(...wanted.map((value, i) => value - got[i]!));
  expect(got).toHaveLength(wanted.length);
  expect(off / size).toBeLessThan(relative);
}

describe('a queryable directory', () => {
  it('is A, B, keys and labels over a bank', async () => {
    const adapter = await add('one', first);
    const files = queryableTensors(first);
    expect(adapter.manifest).toMatchObject({
      ...{ kind: 'queryable', rankMax: queryableRank, rankCurve: [1, 1, 1, 1] },
      options: { topK: 2, labels },
    });
    for (const [i, { block, projection }] of queryableModules.entries()) {
      const module = adapter.manifest.modules[i]!;
      expect(module).toMatchObject({ block, projection, rank: queryableRank });
      const { a, b } = prefixOf(adapter, module, queryableRank);
      near(a, numbers(files.get(`blk.${block}.${projection}.a`)), 1e-3);
      // Rank-major in the file, [out, r] here; α/r = 2 is folded in.
      const theirs = numbers(files.get(`blk.${block}.${projection}.b`));
      const want = Array.from(b, (_, at) => {
        return 2 * theirs[(at % queryableRank) * module.out + Math.floor(at / queryableRank)]!;
      });
      near(b, want, 1e-3);
    }
    expect([...adapter.floats.get('keys')!.values]).toEqual(numbers(files.get('keys')));
    const bank = await read(adapter.manifest.options.needs!);
    expect(bank.manifest).toMatchObject({ kind: 'bank', options: { blockLayers: 1 } });
    for (const name of ['atoms', 'query', 'summary', 'context'] as const) {
      const { shape, values } = bank.floats.get(name)!;
      const theirs = files.get(`bank.${name}`);
      expect([shape, [...values]]).toEqual([theirs?.shape, numbers(theirs)]);
    }
  });

  it('has the mean of each label’s token embeddings, as the engine makes them', async () => {
    const adapter = await add('one', first);
    using file = openGguf(tinyPath);
    const tokenizer = createTokenizer(readTokenizerSource(file.metadata));
    const { decoder } = await openTiny();
    using owned = decoder;
    const { shape, values } = adapter.floats.get('labels')!;
    const { width } = tinyBase.config;
    expect(shape).toEqual([3, width]);
    for (const [k, label] of labels.entries()) {
      const tokens = tokenizer.encodeText(label, 100);
      expect(tokens.length).toBeGreaterThan(1);
      const words = owned.embeddings(tokens);
      const mean = Array.from({ length: width }, (_, i) => {
        const all = Array.from(tokens, (__, t) => words[t * width + i]!);
        return all.reduce((sum, value) => sum + value, 0) / tokens.length;
      });
      near(values.subarray(k * width, (k + 1) * width), mean, 1e-6);
    }
  });

  it('shares its bank with whoever brings the same one, or names it', async () => {
    const one = await add('one', first);
    const needs = one.manifest.options.needs!;
    const two = await add('two', { ...first, seed: 2, labels: ['a', 'b'] });
    const three = await add('three', { seed: 3, labels, bank: needs });
    expect([two, three].map(({ manifest }) => manifest.options.needs)).toEqual([needs, needs]);
    expect(readdirSync(join(directory, 'blobs'))).toHaveLength(4);
    // A tenant's file is its keys, factors and labels: the bank is not in it.
    expect(three.floats.get('atoms')).toBeUndefined();
    expect(() => registry.create('bank', needs)).toThrow(/a bank, and not one itself/);
    // The bank goes with the last adapter that needs it.
    for (const name of ['one', 'two', 'three']) {
      expect(registry.stored(needs)).not.toBeNull();
      registry.remove(name, null);
    }
    expect(registry.stored(needs)).toBeNull();
  });

  it('may add atoms to the end of a stored bank; who was there keeps its keys, byte for byte', async () => {
    const one = await add('one', first);
    const needs = one.manifest.options.needs!;
    const more: DirectoryOptions = { seed: 4, labels: [...labels, 'verse'], bank: needs, more: 1 };
    const later = await add('later', more);
    const [before, after] = [await read(needs), await read(later.manifest.options.needs!)];
    const { shape, values } = after.floats.get('atoms')!;
    expect(shape).toEqual([4, queryableRank, queryableRank]);
    const old = before.floats.get('atoms')!.values;
    expect(values.subarray(0, old.length)).toEqual(old);
    expect([...values.subarray(old.length)]).toEqual(
      numbers(queryableTensors(more).get('bank.atoms')),
    );
    for (const name of ['query', 'summary', 'context'] as const) {
      expect(after.floats.get(name)).toEqual(before.floats.get(name));
    }
    expect(registry.find('one')).toMatchObject({ generation: one.generation, previous: [] });
    expect((await read(one.generation)).floats.get('keys')).toEqual(one.floats.get('keys'));
  });

  it('comes back from its export as the same generation, and its export byte for byte', async () => {
    const { generation } = await add('one', first);
    const out = await importer.exportPeft(generation, queryableRank);
    expect(out.configName).toBe('rankgate.json');
    await close(); // on another machine: nothing is known of the bank
    open();
    const folder = writeQueryable(join(directory, 'again'), out.config, out.weights);
    const again = await importer.importPeft(folder);
    expect(again.generation).toBe(generation);
    const second = await importer.exportPeft(again.generation, queryableRank);
    expect(second.config).toBe(out.config);
    expect(Buffer.compare(second.weights, out.weights)).toBe(0);
  });

  it('whose bank grew comes back from its export with all atoms', async () => {
    const { manifest } = await add('one', first);
    const bank = manifest.options.needs!;
    const later = await add('later', { seed: 4, labels: ['x', 'y'], bank, more: 2 });
    const out = await importer.exportPeft(later.generation, queryableRank);
    await close();
    open();
    const folder = writeQueryable(join(directory, 'again'), out.config, out.weights);
    const again = await importer.importPeft(folder);
    expect(again.generation).toBe(later.generation);
    expect((await read(again.manifest.options.needs!)).floats.get('atoms')!.shape[0]).toBe(5);
  });

  it('is exported whole or not at all', async () => {
    const { generation } = await add('one', first);
    await expect(importer.exportPeft(generation, 2)).rejects.toMatchObject({
      code: 'INVALID_REQUEST',
      message: 'rank is 2; a queryable adapter mixes all of its 4',
    });
  });

  const absent = `sha256:${'0'.repeat(64)}`;
  const config = queryableConfig(first);
  const named = queryableConfig({ ...first, bank: absent });
  type Change = (tensors: Map<string, SafetensorsTensor>) => void;
  const dropBank: Change = (t) => {
    for (const name of [...t.keys()]) if (name.startsWith('bank.')) t.delete(name);
  };
  it.each<[string, unknown, Change, RegExp]>([
    ['no format', { ...config, format: undefined }, () => {}, /rankgate.json format/],
    ['another version', { ...config, format: 'queryable/2' }, () => {}, /rankgate.json format/],
    ['an unknown option', { ...config, lambda: 1 }, () => {}, /"lambda"/],
    ['no labels', { ...config, labels: [] }, () => {}, /rankgate.json labels/],
    ['a label without words', { ...config, labels: ['a', 'b', ''] }, () => {}, /labels.2/],
    ['more to mix than there are', { ...config, top_k: 4 }, () => {}, /top_k is 4, .* 3 labels/],
    ['a bank without sizes', { ...config, bank: {} }, () => {}, /rankgate.json bank/],
    ['a bank by name', { ...config, bank: 'ours' }, () => {}, /rankgate.json bank/],
    ['no bank', config, dropBank, /lacks the tensor bank.atoms/],
    ['part of a bank', config, (t) => t.delete('bank.context'), /lacks the tensor bank.context/],
    ['a bank that is not stored', named, dropBank, /no atom bank of this base has the gen/],
    ['no keys', config, (t) => t.delete('keys'), /lacks the tensor keys/],
    ['a label too many', { ...config, labels: [...labels, 'x'] }, () => {}, /4 labels for 3 atoms/],
    [
      'a key too few',
      config,
      (t) => t.set('keys', { ...t.get('keys')!, shape: [2, 9] }),
      /keys is \[2, 9\], want \[3, 6\]/,
    ],
    [
      'atoms of another rank',
      { ...config, rank: 2 },
      () => {},
      /bank.atoms is \[3, 4, 4\], want \[any, 2, 2\]/,
    ],
    [
      'numbers that are none',
      config,
      (t) => {
        const values = new Float32Array(3 * queryWidth).fill(Number.NaN);
        t.set('keys', { ...t.get('keys')!, data: new Uint8Array(values.buffer) });
      },
      /keys has a value that is not finite/,
    ],
    [
      'nobody to choose for the second block',
      config,
      (t) => {
        for (const side of ['a', 'b']) t.delete(`blk.1.attn_q.${side}`);
      },
      /blk.1.attn_q is not there/,
    ],
    [
      'more atoms than are served',
      config,
      (t) => {
        const data = new Uint8Array(257 * queryableRank ** 2 * 4);
        t.set('bank.atoms', { dtype: 'F32', shape: [257, queryableRank, queryableRank], data });
      },
      /a bank of 257 atoms and queries of 6 numbers, at most 256/,
    ],
    ['half a module', config, (t) => t.delete('blk.0.ffn_up.b'), /lacks the tensor b/],
    ['a stranger', config, (t) => t.set('bank.gate', t.get('keys')!), /not "bank.gate"/],
  ])('is refused with %s', async (_, text, change, message) => {
    const tensors = queryableTensors(first);
    change(tensors);
    using baseFile = openGguf(tinyPath);
    const packing = packQueryable({
      ...{ config: JSON.stringify(text), weights: writeSafetensors(tensors) },
      ...{ base: tinyBase, baseFile },
      readBank: () => Promise.resolve(null),
      storeShared: ({ bytes }) => Promise.resolve(generationOf(bytes)),
    });
    await expect(packing).rejects.toMatchObject({
      code: 'INVALID_ADAPTER',
      message: expect.stringMatching(message),
    });
  });

  it('is refused with the hash of another base', async () => {
    const other = { ...config, base_hash: 'cd'.repeat(32) };
    const folder = writeQueryable(join(directory, 'other'), other, queryableTensors(first));
    await expect(importer.importPeft(folder)).rejects.toMatchObject({ code: 'BASE_MISMATCH' });
  });

  it('cannot name what is stored and no bank: that is not told from what is not stored', async () => {
    const { generation } = await add('one', first);
    const folder = folderOf({ seed: 2, labels, bank: generation });
    await expect(importer.importPeft(folder)).rejects.toMatchObject({
      code: 'INVALID_ADAPTER',
      message: expect.stringContaining(
        `no atom bank of this base has the generation ${generation}`,
      ),
    });
  });
});
