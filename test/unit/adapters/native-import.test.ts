import { mkdtempSync, readdirSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import type { Generation } from '../../../src/adapters/adapter.ts';
import { blobPath, createBlobStore } from '../../../src/adapters/blobs.ts';
import { numbersOf, weightName } from '../../../src/adapters/extract.ts';
import {
  type Family,
  forward,
  type Site,
  type Tensors,
} from '../../../src/adapters/families/family.ts';
import { flexmore } from '../../../src/adapters/families/flexmore.ts';
import { fly } from '../../../src/adapters/families/fly.ts';
import { hydra } from '../../../src/adapters/families/hydra.ts';
import { transposedTimes } from '../../../src/adapters/families/matrices.ts';
import { matryoshka } from '../../../src/adapters/families/matryoshka.ts';
import { mora } from '../../../src/adapters/families/mora.ts';
import { salt } from '../../../src/adapters/families/salt.ts';
import { createRandom } from '../../../src/adapters/families/seeded-random.ts';
import { rankAtEnergy, singularBasis } from '../../../src/adapters/families/singular-basis.ts';
import { svfit } from '../../../src/adapters/families/svfit.ts';
import { triangular } from '../../../src/adapters/families/triangular.ts';
import { createImporter } from '../../../src/adapters/importer.ts';
import { type PackedAdapter, readPacked } from '../../../src/adapters/pack.ts';
import { prefixOf } from '../../../src/adapters/pack-pairs.ts';
import type { Importer, Registry } from '../../../src/adapters/registry.ts';
import { openSqlRegistry } from '../../../src/adapters/sql-registry.ts';
import { f16Values } from '../../../src/kernels/half.ts';
import { projectionShape } from '../../../src/model/decoder-config.ts';
import { type GgufFile, openGguf } from '../../../src/model/gguf.ts';
import { type SafetensorsTensor, writeSafetensors } from '../../../src/model/safetensors.ts';
import { normalColumns, trainedTensors } from '../../support/family-site.ts';
import { tinyBase } from '../../support/tiny-base.ts';

// Each kind's own numbers for two modules of the tiny base, through the real import thread: what is packed must be the
// function that the family defines in f64 (families/*.ts), up to the rounding of f16.

const modelPath = join(import.meta.dirname, '../../golden/tiny/tiny-f32.gguf');
let directory: string;
let registry: Registry;
let importer: Importer;
let file: GgufFile;

beforeEach(() => {
  directory = mkdtempSync(join(tmpdir(), 'rankgate-native-'));
  const blobDirectory = join(directory, 'blobs');
  const blobs = createBlobStore(blobDirectory);
  registry = openSqlRegistry({ path: join(directory, 'registry.db'), blobs, nowS: () => 1 });
  importer = createImporter({ base: tinyBase, registry, blobs, blobDirectory, modelPath });
  file = openGguf(modelPath);
});
afterEach(async () => {
  file.close();
  await importer.close();
  registry.close();
  rmSync(directory, { recursive: true });
});

function sites(): Site[] {
  const modules = [
    { block: 0, projection: 'attn_q' },
    { block: 1, projection: 'ffn_down' },
  ] as const;
  return modules.map((module) => {
    const sizes = projectionShape(tinyBase.config, module.projection);
    const data = Float64Array.from(numbersOf(file, weightName(module)));
    return { ...module, ...sizes, weight: () => ({ rows: sizes.in, columns: sizes.out, data }) };
  });
}

function tensorsOf(family: Family, seed: bigint): Tensors[] {
  return sites().map((site) => trainedTensors(family, site, createRandom(seed, [site.block, 0])));
}

const nameOf = ({ block, projection }: Site, name: string): string =>
  `blk.${block}.${projection}.${name}`;

function write(
  config: unknown,
  all: readonly Tensors[],
  change: (tensors: Map<string, SafetensorsTensor>) => void = () => {},
): string {
  const tensors = new Map<string, SafetensorsTensor>();
  sites().forEach((site, i) => {
    for (const [name, { rows, columns, data }] of Object.entries(all[i]!)) {
      const bytes = new Uint8Array(Float32Array.from(data).buffer);
      tensors.set(nameOf(site, name), { dtype: 'F32', shape: [columns, rows], data: bytes });
    }
  });
  change(tensors);
  const folder = mkdtempSync(join(directory, 'adapter-'));
  const text = typeof config === 'string' ? config : JSON.stringify(config);
  writeFileSync(join(folder, 'rankgate.json'), text);
  writeFileSync(join(folder, 'adapter_model.safetensors'), writeSafetensors(tensors));
  return folder;
}

const read = (generation: Generation): Promise<PackedAdapter> =>
  readPacked(blobPath(join(directory, 'blobs'), generation), generation);

/** ‖got − wanted‖ / ‖wanted‖. */
function distance(got: ArrayLike<number>, wanted: ArrayLike<number>): number {
  const size = Math.hypot(...Array.from(wanted));
  return Math.hypot(...Array.from(got, (value, i) => value - wanted[i]!)) / size;
}

const f32 = (tensors: readonly Tensors[]): Tensors[] =>
  tensors.map((one) =>
    Object.fromEntries(
      Object.entries(one).map(([name, x]) => [
        name,
        { ...x, data: x.data.map((value) => Math.fround(value)) },
      ]),
    ),
  );

const pairs: readonly (readonly [string, Family, object])[] = [
  [
    'matryoshka',
    matryoshka({ maxRank: 8, ranks: [2, 4, 8], scaling: 'sqrt', mask: 'diag', order: 'svd' }),
    { max_rank: 8, ranks: [2, 4, 8], scaling: 'sqrt', mask: 'diag' },
  ],
  [
    'flexmore',
    flexmore({
      experts: [
        { name: 'x', rank: 3 },
        { name: 'y', rank: 5 },
      ],
    }),
    {
      experts: [
        { name: 'x', rank: 3 },
        { name: 'y', rank: 5 },
      ],
    },
  ],
  ['triangular', triangular({ rank: 6, alpha: 3 }), { rank: 6, alpha: 3 }],
  ['hydra', hydra({ rank: 4, alpha: 2 }), { rank: 4, alpha: 2 }],
  ['salt', salt({ rank: 6, tailRank: 3 }), { rank: 6, tail_rank: 3 }],
];

describe('an adapter in its family’s own numbers', () => {
  it.each(pairs)(
    'of kind %s is the pair that the family defines',
    async (kind, family, options) => {
      const tensors = f32(tensorsOf(family, 5n));
      const added = await importer.importPeft(write({ kind, ...options }, tensors));
      expect(added.manifest).toMatchObject({
        kind,
        describe: family.describe,
        options: { needs: null },
      });
      expect(added.manifest.modules).toHaveLength(2);
      const packed = await read(added.generation);
      sites().forEach((site, i) => {
        const x = normalColumns(createRandom(7n), 4, site.in);
        const { y } = forward(family, site, tensors[i]!, { x, rank: null });
        const module = packed.manifest.modules[i]!;
        const pair = prefixOf(packed, module, module.rank);
        const h = transposedTimes({ rows: site.in, columns: pair.rank, data: pair.a }, x);
        const b = { rows: pair.rank, columns: site.out, data: pair.b };
        const got = transposedTimes(b, h); // [out, T]
        expect(distance(got.data, y.data)).toBeLessThan(2e-3);
        const half = prefixOf(packed, module, Math.ceil(module.rank / 2));
        expect(half.rank).toBeLessThan(module.rank);
      });
      expect(registry.create('made', added.generation).manifest.kind).toBe(kind);
    },
  );

  it('of kind matryoshka may keep the order of its training', async () => {
    const options = { maxRank: 8, ranks: [4, 8], scaling: 'none', mask: 'prefix' } as const;
    const family = matryoshka({ ...options, order: 'as-trained' });
    const tensors = f32(tensorsOf(family, 5n));
    const config = {
      kind: 'matryoshka',
      max_rank: 8,
      ranks: [4, 8],
      scaling: 'none',
      mask: 'prefix',
    };
    const added = await importer.importPeft(write({ ...config, order: 'as-trained' }, tensors));
    expect(added.manifest.levels).toBeNull();
    const packed = await read(added.generation);
    const { a } = prefixOf(packed, packed.manifest.modules[0]!, 4);
    expect(distance(a, tensors[0]!.a!.data.subarray(0, a.length))).toBeLessThan(1e-3);
  });

  it('of kind fly is B, d and a seed', async () => {
    const seed = 0x0123_4567_89ab_cdefn;
    const family = fly({ rank: 16, topK: 4, alpha: 8, seed, score: 'abs_plus_bias' });
    const tensors = f32(tensorsOf(family, 5n));
    const config = { kind: 'fly', rank: 16, top_k: 4, alpha: 8, seed: '0123456789abcdef' };
    const { generation, manifest } = await importer.importPeft(write(config, tensors));
    expect(manifest).toMatchObject({ kind: 'fly', options: { seed: '0123456789abcdef', topK: 4 } });
    const packed = await read(generation);
    sites().forEach((site, i) => {
      const served = family.serve(site, tensors[i]!);
      const pages = [0, 1].map((page) => packed.page(site, page)!);
      const b = pages.flatMap((page) => Array.from(page.b, (bits) => f16Values[bits]!));
      expect(distance(b, served.b!)).toBeLessThan(1e-3);
      const a = pages.flatMap((page) => Array.from(page.a, (bits) => f16Values[bits]!));
      const pair = family.pair(site, tensors[i]!, null);
      expect(distance(a, pair.a.data)).toBeLessThan(1e-3);
      const bias = packed.floats.get('bias')!.values.subarray(i * 16, (i + 1) * 16);
      expect(bias).toEqual(served.bias);
    });
  });

  it('of kind mora is A, B, k and τ', async () => {
    const family = mora({ rank: 8, topK: 2, temperature: 0.5, frozen: 0 });
    const tensors = f32(tensorsOf(family, 5n));
    const config = { kind: 'mora', rank: 8, top_k: 2, temperature: 0.5 };
    const { generation, manifest } = await importer.importPeft(write(config, tensors));
    expect(manifest).toMatchObject({ kind: 'mora', options: { topK: 2, temperature: 0.5 } });
    const packed = await read(generation);
    const a = Array.from(packed.page(sites()[0]!, 0)!.a, (bits) => f16Values[bits]!);
    expect(distance(a, tensors[0]!.a!.data)).toBeLessThan(1e-3);
    // As a LoRA it would give every rank the same weight.
    await expect(importer.exportPeft(generation, 8)).rejects.toMatchObject({
      code: 'UNSUPPORTED',
      message: expect.stringContaining('a mora adapter is more than low-rank pairs'),
    });
    // The curve is of the k largest ranks, so it bends down.
    const [first = 0, second = 0] = manifest.rankCurve;
    expect(first).toBeGreaterThan(second - first);
  });

  it('of kind svfit is r numbers a module over a basis that the next one shares', async () => {
    const family = svfit({ rank: 8 });
    const all = [tensorsOf(family, 5n), tensorsOf(family, 6n)].map(f32);
    const imports = [];
    for (const [i, tensors] of all.entries()) {
      const added = await importer.importPeft(write({ kind: 'svfit', rank: 8 }, tensors));
      registry.create(`tenant-${i}`, added.generation);
      imports.push(added);
    }
    const needs = imports.map(({ manifest }) => manifest.options.needs!);
    expect(needs[0]).toBe(needs[1]);
    expect(readdirSync(join(directory, 'blobs'))).toHaveLength(3);
    const { kind, describe: described, rankCurve } = registry.stored(needs[0]!)!.manifest;
    expect(kind).toBe('basis');
    // What it keeps of the base is told, and is of the base's own singular values.
    const sigmas = sites().map((site) => singularBasis(site).sigma);
    const energy = (count: number): number =>
      sigmas.flatMap((sigma) => [...sigma.slice(0, count)]).reduce((sum, s) => sum + s * s, 0);
    const most = sigmas.map((sigma) => rankAtEnergy(sigma, 0.99));
    expect(described).toBe(
      `the base's 8 largest singular directions of 2 modules: ${((100 * energy(8)) / energy(64)).toFixed(1)} % of their ` +
        `energy, of which 99 % takes ${Math.min(...most)} to ${Math.max(...most)} ranks`,
    );
    expect(rankCurve[3]).toBeCloseTo(energy(4) / energy(8), 9);
    const basis = await read(needs[0]!);
    const packed = await read(imports[1]!.generation);
    const gates = packed.floats.get('gates')!.values;
    sites().forEach((site, i) => {
      const x = normalColumns(createRandom(7n), 4, site.in);
      const { y } = forward(family, site, all[1]![i]!, { x, rank: null });
      const pair = prefixOf(basis, basis.manifest.modules[i]!, 8);
      const h = transposedTimes({ rows: site.in, columns: 8, data: pair.a }, x);
      const gated = h.data.map((value, at) => value * gates[i * 8 + (at % 8)]!);
      const b = { rows: 8, columns: site.out, data: pair.b };
      const got = transposedTimes(b, { ...h, data: gated });
      expect(distance(got.data, y.data)).toBeLessThan(2e-3);
    });
    // More ranks than the basis has: another basis.
    const wider = await importer.importPeft(
      write({ kind: 'svfit', rank: 12 }, f32(tensorsOf(svfit({ rank: 12 }), 5n))),
    );
    expect(wider.manifest.options.needs).not.toBe(needs[0]);
  });

  const config = { kind: 'mora', rank: 8, top_k: 2, temperature: 0.5 };
  const tensors = () => f32(tensorsOf(mora({ rank: 8, topK: 2, temperature: 0.5, frozen: 0 }), 5n));
  const first = 'blk.0.attn_q.a';
  it.each<[string, unknown, (t: Map<string, SafetensorsTensor>) => void, RegExp]>([
    ['no JSON', '{', () => {}, /rankgate.json is not JSON/],
    ['no kind', {}, () => {}, /rankgate.json kind/],
    ['a kind that is not there', { kind: 'dora' }, () => {}, /rankgate.json kind/],
    ['an option that it does not have', { ...config, alpha: 2 }, () => {}, /"alpha"/],
    ['an option out of range', { ...config, top_k: 0 }, () => {}, /rankgate.json top_k/],
    ['more ranks to choose than there are', { ...config, top_k: 9 }, () => {}, /topK 9/],
    ['no tensor', config, (t) => t.clear(), /0 of 0 tensors matched/],
    ['a stranger', config, (t) => t.set('lm_head', t.get(first)!), /4 of 5 .* not "lm_head"/],
    [
      'a block too far',
      config,
      (t) => t.set('blk.2.attn_q.a', t.get(first)!),
      /4 of 5 tensors matched; not "blk.2.attn_q.a"/,
    ],
    ['half a module', config, (t) => t.delete(first), /lacks the tensor a/],
    [
      'another shape',
      config,
      (t) => t.set(first, { ...t.get(first)!, shape: [64, 8] }),
      /a is \[64, 8\], want \[rank, in\]/,
    ],
    [
      'three axes',
      config,
      (t) => t.set(first, { ...t.get(first)!, shape: [8, 8, 8] }),
      /want one or two axes/,
    ],
    ['whole numbers', config, (t) => t.set(first, { ...t.get(first)!, dtype: 'I32' }), /I32/],
    [
      'NaN',
      config,
      (t) => {
        const values = new Float32Array(8 * 64).fill(Number.NaN);
        t.set(first, { ...t.get(first)!, data: new Uint8Array(values.buffer) });
      },
      /not finite/,
    ],
  ])('is refused with %s', async (_, text, change, message) => {
    const folder = write(text, tensors(), change);
    await expect(importer.importPeft(folder)).rejects.toMatchObject({
      code: 'INVALID_ADAPTER',
      message: expect.stringMatching(message),
    });
    expect(registry.list()).toEqual([]);
  });

  it('is refused beside a PEFT config, and without the base’s file', async () => {
    const folder = write(config, tensors());
    const blobDirectory = join(directory, 'blobs');
    const without = createImporter({
      base: tinyBase,
      registry,
      blobs: createBlobStore(blobDirectory),
      blobDirectory,
    });
    await expect(without.importPeft(folder)).rejects.toMatchObject({ code: 'UNSUPPORTED' });
    await without.close();
    writeFileSync(join(folder, 'adapter_config.json'), '{}');
    await expect(importer.importPeft(folder)).rejects.toMatchObject({ code: 'INVALID_ADAPTER' });
  });
});
