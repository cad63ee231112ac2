import { afterAll, afterEach, beforeAll, describe, expect, it } from 'vitest';
import { type AdapterManifest, type Generation, noOptions } from '../../src/adapters/adapter.ts';
import { blendContents } from '../../src/adapters/blend.ts';
import { blendKey, isBlendKey, parseBlendKey } from '../../src/adapters/blend-key.ts';
import {
  createPacker,
  generationOf,
  openPacked,
  type PackedContents,
  packedAdapter,
} from '../../src/adapters/pack.ts';
import {
  createResidency,
  type Residency,
  type ResidentKey,
  type ResidentUse,
} from '../../src/adapters/residency.ts';
import { composeRows } from '../../src/adapters/rows.ts';
import type { ServedModule } from '../../src/adapters/served.ts';
import { f16Values } from '../../src/kernels/half.ts';
import { projectionShape } from '../../src/model/decoder-config.ts';
import type { OpenedDecoder } from '../../src/model/open-decoder.ts';
import type { AdapterRows, ModuleRef } from '../../src/model/stepper.ts';
import {
  type MadeFile,
  type MadeOptions,
  makePacked,
  tinyModules,
} from '../support/make-packed.ts';
import { openTiny } from '../support/open-test-decoder.ts';
import { tinyBase } from '../support/tiny-base.ts';

// What is packed is what is served: each kind's file goes through residency into a decoder, and its logits are those of the
// plain low-rank pair that it stands for, written out by the test. Numbers are halves on both sides, so nothing is rounded
// but sums.

const backends = ['reference', 'ggml'] as const;
const equal = 2e-4;
const visible = 1e-2;
const tokens = Int32Array.of(5, 17, 200, 33, 9, 250, 1);

/** A module's numbers as a file has them. */
interface Pair {
  readonly module: ModuleRef;
  readonly rank: number;
  readonly a: Float64Array; // [rank, in]
  readonly b: Float64Array; // [rank, out]
}

function pairsOf(file: MadeFile): Pair[] {
  const packed = openPacked(file.bytes, file.generation);
  return packed.manifest.modules.map((module) => {
    const pages = Array.from({ length: packed.pages }, (_, i) => packed.page(module, i)!);
    const side = (name: 'a' | 'b', width: number): Float64Array =>
      Float64Array.from(
        pages.flatMap((page) => [...page[name]]).slice(0, module.rank * width),
        (bits) => f16Values[bits]!,
      );
    return { module, rank: module.rank, a: side('a', module.in), b: side('b', module.out) };
  });
}

type About = Partial<Pick<AdapterManifest, 'kind' | 'levels' | 'options'>>;

function packed(modules: readonly ServedModule[], about: About): MadeFile {
  const packer = createPacker();
  for (const module of modules) packer.add(module);
  const rankMax = Math.max(...modules.map(({ rank }) => rank));
  const { bytes, manifest } = packer.finish({
    format: 'rankgate-adapter/3',
    kind: 'lora',
    describe: 'written out by a test',
    baseHash: tinyBase.hash,
    rankMax,
    rankCurve: Array.from({ length: rankMax }, (_, k) => (k + 1) / rankMax),
    levels: null,
    options: noOptions,
    source: { format: 'rankgate', by: 'test', from: [] },
    ...about,
  });
  return { bytes, generation: generationOf(bytes), manifest };
}

function servedOf({ module: { block, projection }, rank, a, b }: Pair): ServedModule {
  const sizes = projectionShape(tinyBase.config, projection);
  return { block, projection, ...sizes, rank, a, b, gates: null, bias: null };
}

function fileOf(pairs: readonly Pair[], about: About = {}): MadeFile {
  return packed(pairs.map(servedOf), about);
}

/** B of every rank of every module, times a number. */
function changed(pairs: readonly Pair[], change: (module: number, rank: number) => number): Pair[] {
  return pairs.map((pair, module) => {
    const width = pair.b.length / pair.rank;
    return { ...pair, b: pair.b.map((value, i) => value * change(module, Math.floor(i / width))) };
  });
}

const beside = (x: Float64Array, y: Float64Array): Float64Array => Float64Array.of(...x, ...y);

describe.each(backends)('files of each kind in a decoder on %s', (backend) => {
  let opened: OpenedDecoder;
  let residency: Residency;
  const files = new Map<ResidentKey, MadeFile>();
  const held: ResidentUse[] = [];

  beforeAll(async () => {
    opened = await openTiny({ backend, pages: 40, native: true });
    residency = createResidency({
      stepper: opened.decoder,
      baseHash: tinyBase.hash,
      open: async (key) => {
        if (!isBlendKey(key)) return openPacked(files.get(key)!.bytes, key);
        const parts = parseBlendKey(key).parts.map(({ generation }) => contentsOf(generation));
        return packedAdapter(key, blendContents(key, parts));
      },
    });
  });
  afterEach(() => {
    for (const one of held.splice(0)) one.release();
  });
  afterAll(() => opened.decoder[Symbol.dispose]());

  function contentsOf(generation: Generation): PackedContents {
    const { manifest, pages, page } = openPacked(files.get(generation)!.bytes, generation);
    const modules = manifest.modules.map((module) => {
      const all = Array.from({ length: pages }, (_, i) => page(module, i)!);
      const side = (name: 'a' | 'b') => Uint16Array.from(all.flatMap((one) => [...one[name]]));
      return [
        `blk.${module.block}.${module.projection}.a`,
        { pages, a: side('a'), b: side('b') },
      ] as const;
    });
    return { manifest, modules: new Map(modules), floats: new Map() };
  }

  async function use(key: ResidentKey, rank?: number): Promise<ResidentUse> {
    let wake = (): void => {};
    const load = residency.beginLoad(key, () => wake(), rank);
    for (let progress = load.advance(1e9); progress !== 'done'; progress = load.advance(1e9)) {
      if (progress === 'no-room') throw new Error('no room');
      if (progress !== 'reading') continue;
      await new Promise<void>((resolve) => {
        wake = resolve;
      });
    }
    const got = residency.acquire(key, rank)!;
    held.push(got);
    return got;
  }

  function made(options: MadeOptions): MadeFile {
    const file = makePacked(options);
    files.set(file.generation, file);
    return file;
  }

  async function useFile(file: MadeFile, rank?: number): Promise<ResidentUse> {
    files.set(file.generation, file);
    return use(file.generation, rank);
  }

  function logitsOf(adapter: AdapterRows | null): Float32Array {
    const segment = { tokens, cellBase: 16, position: 0, adapter, wantsLogits: true };
    return opened.decoder.step([segment]).logits(0).slice();
  }

  function expectSame(rows: AdapterRows, other: AdapterRows): void {
    const [x, y, base] = [logitsOf(rows), logitsOf(other), logitsOf(null)];
    const far = (u: Float32Array, v: Float32Array): number =>
      u.reduce((worst, value, i) => Math.max(worst, Math.abs(value - v[i]!)), 0);
    expect(far(y, base)).toBeGreaterThan(visible);
    expect(far(x, y)).toBeLessThan(equal);
  }

  /** Small enough that the tiny model is not drowned. */
  const small = (seed: number, rank: number): Pair[] =>
    changed(pairsOf(makePacked({ kind: 'lora', rank, seed })), () => 2 ** -6);

  it('svfit is its basis with each rank times its number', async () => {
    const pairs = small(1, 12);
    const basis = fileOf(pairs, { kind: 'basis' });
    files.set(basis.generation, basis);
    // Powers of two: folded into B they round nothing.
    const delta = (module: number, r: number): number => (-1) ** r * 2 ** ((module + r) % 3);
    const deltas = pairs.map((pair, module): ServedModule => {
      const gates = Float32Array.from({ length: 12 }, (_, r) => delta(module, r));
      return { ...servedOf(pair), a: null, b: null, gates };
    });
    const options = { ...noOptions, needs: basis.generation };
    const tenant = await useFile(packed(deltas, { kind: 'svfit', options }));
    for (const rank of [5, 12]) {
      const want = changed(pairs, (module, r) => (r < rank ? delta(module, r) : 0));
      expectSame(tenant.rows(rank), (await useFile(fileOf(want))).rows(12));
    }
  });

  it('a level is the ranks that it has on', async () => {
    const levels = tinyModules.map((_, i) =>
      Array.from({ length: 10 }, (__, r) => Math.max(1, Math.min(10, r + 1 + (i % 3) - 1))),
    );
    const pairs = small(3, 10);
    const all = await useFile(fileOf(pairs, { levels }));
    for (const level of [1, 4, 9]) {
      const want = changed(pairs, (module, r) => (levels[module]![r]! <= level ? 1 : 0));
      expectSame(all.rows(level), (await useFile(fileOf(want))).rows(10));
    }
    expectSame(all.rows(10), (await useFile(fileOf(pairs))).rows(10));
  });

  it('fly with all ranks kept is the pair of its seed’s A and its B', async () => {
    const file = made({ kind: 'fly', rank: 12, seed: 4 });
    const fly = await use(file.generation);
    const whole = composeRows([{ use: fly, rank: 12, weight: 1 }], { flyTopK: 12, atomBias: null });
    expectSame(whole, (await useFile(fileOf(pairsOf(file)))).rows(12));
  });

  it('queryable with one atom that changes nothing is its pair', async () => {
    const packer = createPacker();
    const floats = new Map(
      Object.entries({ query: [4, 8], summary: [8, 8], context: [4, 8] }).map(([name, shape]) => {
        const values = new Float32Array(shape[0]! * shape[1]!).fill(0.1);
        return [name as 'query', { shape, values }] as const;
      }),
    );
    const unit = Float32Array.from({ length: 64 }, (_, i) => Number(i % 9 === 0));
    const { bytes } = packer.finish(
      {
        format: 'rankgate-adapter/3',
        kind: 'bank',
        describe: '',
        baseHash: tinyBase.hash,
        rankMax: 8,
        rankCurve: [],
        levels: null,
        options: { ...noOptions, blockLayers: 1 },
        source: { format: 'rankgate', by: 'test', from: [] },
      },
      new Map([...floats, ['atoms', { shape: [1, 8, 8], values: unit }] as const]),
    );
    const bank = generationOf(bytes);
    files.set(bank, {
      bytes,
      generation: bank,
      manifest: makePacked({ kind: 'bank', rank: 8, seed: 1 }).manifest,
    });
    const file = made({
      kind: 'queryable',
      rank: 8,
      seed: 5,
      atoms: 1,
      options: { needs: bank, topK: 1 },
    });
    const rows = (await use(file.generation)).rows(8);
    expectSame(rows, (await useFile(fileOf(pairsOf(file)))).rows(8));
  });

  it('a linear blend is the pair of all ranks side by side, B times the weight', async () => {
    const [x, y] = [small(6, 12), small(7, 8)];
    const parts = [
      { use: await useFile(fileOf(x)), rank: 12, weight: 0.5 },
      { use: await useFile(fileOf(y)), rank: 8, weight: -2 },
    ];
    const want = x.map((pair, i): Pair => {
      const other = y[i]!;
      const b = beside(
        pair.b.map((v) => 0.5 * v),
        other.b.map((v) => -2 * v),
      );
      return { module: pair.module, rank: 20, a: beside(pair.a, other.a), b };
    });
    expectSame(composeRows(parts), (await useFile(fileOf(want))).rows(20));
  });

  it('a blend by ties is loaded under its own name', async () => {
    const [x, y] = [fileOf(small(8, 8)), fileOf(small(9, 8))];
    for (const file of [x, y]) files.set(file.generation, file);
    const parts = [x, y].map(({ generation }) => ({ generation, rank: 8, weight: 1 }));
    const merged = await use(blendKey({ merge: 'ties', density: 1, parts }));
    expect(merged.rankMax).toBe(8);
    // Where signs agree the mean, else the one that is elected: by hand, of numbers that are halves.
    const elect = (u: number, v: number): number => {
      const sign = u + v >= 0 ? 1 : -1;
      const agree = [u, v].filter((value) => Math.sign(value) === sign);
      return agree.reduce((sum, value) => sum + value, 0) / Math.max(1, agree.length);
    };
    const [left, right] = [pairsOf(x), pairsOf(y)];
    const want = left.map(
      (pair, i): Pair => ({
        ...pair,
        a: pair.a.map((value, n) => elect(value, right[i]!.a[n]!)),
        b: pair.b.map((value, n) => elect(value, right[i]!.b[n]!)),
      }),
    );
    expectSame(merged.rows(8), (await useFile(fileOf(want))).rows(8));
  });

  it('a resident that grows changes nothing for who reads its first ranks', async () => {
    const file = fileOf(small(10, 20));
    const few = await useFile(file, 6);
    const before = logitsOf(few.rows(6));
    const all = await useFile(file);
    expect(logitsOf(few.rows(6))).toEqual(before);
    expect(logitsOf(all.rows(20))).not.toEqual(before);
  });
});
