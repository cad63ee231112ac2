// What every Kernels must compute. A case = op, parameters, how to build and feed it, and its own tolerance; the result
// is compared with the reference backend. Every stored tensor is followed by a guard that must stay untouched.

import { describe, expect, it } from 'vitest';
import { GatewayError } from '../../src/errors.ts';
import { elementCount } from '../../src/kernels/check.ts';
import { f32ToF16Bits } from '../../src/kernels/half.ts';
import {
  type AttentionSegment,
  dtypeLayout,
  type Kernels,
  type Ops,
  type StoredTensor,
  type Tensor,
  type WeightType,
} from '../../src/kernels/kernels.ts';
import { ReferenceKernels } from '../../src/kernels/reference-kernels.ts';
import { createRng, normals, type Rng } from '../support/random.ts';
import { routingCases } from './routing.cases.ts';

type InputData = Float32Array | Int32Array | BigInt64Array;

export interface Fixture {
  readonly stored: Readonly<
    Record<string, { dtype: WeightType; shape: number[]; bytes: Uint8Array }>
  >;
  /** Which of the stored tensors are pools of adapter pages, and for which op. */
  readonly pools?: Readonly<Record<string, 'shrink' | 'expand'>>;
  readonly inputs: Readonly<Record<string, InputData>>;
  readonly segments?: readonly AttentionSegment[];
  readonly segmentsMax?: number;
}

export interface KernelCase {
  readonly name: string;
  /** Largest normalised mean squared error against the reference, with its reason. */
  readonly nmse: number;
  readonly make: (rng: Rng) => Fixture;
  readonly build: (
    ops: Ops,
    stored: Readonly<Record<string, StoredTensor>>,
  ) => Record<string, Tensor>;
}

export interface Skip {
  readonly case: string;
  readonly reason: string;
}

/** Cases that only our own kernels compute: over q8_0 pools, and what rows choose themselves. */
export const ownSkips = (q8Reason: string): Skip[] =>
  kernelCases.flatMap(({ name }) => {
    if (name.startsWith('shrink') && name.includes('q8_0'))
      return [{ case: name, reason: q8Reason }];
    return name.startsWith('route') ? [{ case: name, reason: 'ggml has no such op' }] : [];
  });

const exact = 1e-12; // the same f32 operations in the same order, up to libm
const sums = 1e-9; // f32 sums in another order
const halves = 1e-5; // activations or products rounded to f16 (11 bits: 2^-22 squared, summed)
const bf16s = 2e-5; // activations rounded to bf16 (8 bits: 2^-16 squared)
const int8s = 5e-4; // activations quantised to int8 by ggml's quantised kernels; ggml's own bar for mul_mat

function encode(dtype: WeightType, values: Float32Array): Uint8Array {
  if (dtype === 'f32') return new Uint8Array(values.slice().buffer);
  const bits = new Uint16Array(values.length);
  if (dtype === 'f16') f32ToF16Bits(values, bits);
  else bits.set(new Uint32Array(values.slice().buffer).map((word) => word >>> 16));
  return new Uint8Array(bits.buffer);
}

/** Offsets of the f16 scales inside a block: random bytes everywhere else are valid weights. */
const scaleOffsets: Partial<Record<WeightType, readonly number[]>> = {
  q4_0: [0],
  q4_1: [0, 2],
  q5_0: [0],
  q5_1: [0, 2],
  q8_0: [0],
  q4_k: [0, 2],
  q5_k: [0, 2],
  q6_k: [208],
};

function randomWeight(rng: Rng, dtype: WeightType, shape: number[]): Fixture['stored'][string] {
  const offsets = scaleOffsets[dtype];
  if (offsets === undefined) {
    return { dtype, shape, bytes: encode(dtype, normals(rng, elementCount(shape), 0.2)) };
  }
  const { block, bytes: blockBytes } = dtypeLayout[dtype];
  const bytes = new Uint8Array((elementCount(shape) / block) * blockBytes).map(() =>
    rng.below(256),
  );
  const view = new DataView(bytes.buffer);
  for (let at = 0; at < bytes.length; at += blockBytes) {
    for (const offset of offsets) view.setUint16(at + offset, 0x2000 + rng.below(0x800), true);
  }
  return { dtype, shape, bytes };
}

const f32 = (rng: Rng, shape: number[]): Fixture['stored'][string] =>
  randomWeight(rng, 'f32', shape);
const f16 = (rng: Rng, shape: number[]): Fixture['stored'][string] =>
  randomWeight(rng, 'f16', shape);
const ints = (rng: Rng, count: number, limit: number): Int32Array =>
  Int32Array.from({ length: count }, () => rng.below(limit));

function linearCase(dtype: WeightType, rows: number, nmse: number): KernelCase {
  const [inner, outer] = [512, 96];
  return {
    name: `linear ${dtype}, ${rows} rows`,
    nmse,
    make: (rng) => ({
      stored: { w: randomWeight(rng, dtype, [outer, inner]) },
      inputs: { x: normals(rng, rows * inner) },
    }),
    build: (ops, { w }) => ({ y: ops.linear(ops.input('x', 'f32', [rows, inner]), w!) }),
  };
}

function ropeCase(style: 'norm' | 'neox', size: number): KernelCase {
  return {
    name: `rope ${style}, ${size} of 64 channels`,
    nmse: 1e-9, // angles by a recurrence instead of a power
    make: (rng) => ({
      stored: {},
      inputs: { x: normals(rng, 5 * 3 * 64), at: Int32Array.of(0, 1, 17, 511, 4000) },
    }),
    build: (ops) => ({
      y: ops.rope(ops.input('x', 'f32', [5, 3, 64]), ops.input('at', 'i32', [5]), {
        size,
        base: 100_000,
        style,
      }),
    }),
  };
}

/** Three sequences in one batch: a decode row over many cells, a prefill in the middle, a fresh prompt; one unused segment. */
function attendCase(cellType: 'f16' | 'f32', nmse: number): KernelCase {
  const [rows, heads, kvHeads, size, cells] = [9, 6, 2, 64, 800];
  return {
    name: `attend over ${cellType} cells, three segments of ${rows} rows`,
    nmse,
    make: (rng) => ({
      stored: {
        k: randomWeight(rng, cellType, [cells, kvHeads * size]),
        v: randomWeight(rng, cellType, [cells, kvHeads * size]),
      },
      inputs: { q: normals(rng, rows * heads * size) },
      segments: [
        { rowStart: 0, rowCount: 1, cellBase: 16, cells: 600 },
        { rowStart: 1, rowCount: 5, cellBase: 640, cells: 40 },
        { rowStart: 6, rowCount: 3, cellBase: 700, cells: 3 },
      ],
      segmentsMax: 4,
    }),
    build: (ops, { k, v }) => ({
      y: ops.attend(ops.input('q', 'f32', [rows, heads, size]), k!, v!),
    }),
  };
}

type Weight = Fixture['stored'][string];

interface LowRankShape {
  readonly dtype: 'f32' | 'f16' | 'bf16' | 'q8_0';
  readonly outer: number;
  /** Whether neighbours with as many pages have the same ones: rows of one prompt. */
  readonly groups: boolean;
}

/** `used[t]` pages of row t are not 0: ordered, unordered, base rows between and at the end. */
function lowRankCase(
  used: readonly number[],
  { dtype, outer, groups }: LowRankShape = { dtype: 'f16', outer: 80, groups: false },
): KernelCase {
  const [inner, pool, uses] = [64, 12, 3];
  const [rows, count] = [used.length, 2 ** Math.ceil(Math.log2(Math.max(1, ...used)))];
  return {
    name: `shrink, mixRanks and expand, ${dtype} to ${outer}, ${groups ? 'groups' : 'rows'} of ${used.join(', ')} pages`,
    nmse: halves,
    make: (rng) => {
      const pages = ints(rng, rows * count, pool - 1).map((page) => page + 1);
      for (const [row, kept] of used.entries()) {
        if (groups && row > 0 && kept === used[row - 1]) {
          pages.copyWithin(row * count, (row - 1) * count, row * count);
        }
        pages.fill(0, row * count + kept, (row + 1) * count);
      }
      const [a, b, other, wide] = [inner, outer, inner, inner].map((width) => {
        const weight = randomWeight(rng, dtype, [pool, 8, width]);
        weight.bytes.fill(0, 0, weight.bytes.length / pool);
        return weight;
      }) as [Weight, Weight, Weight, Weight];
      return {
        pools: { a: 'shrink', other: 'shrink', b: 'expand', wide: 'expand' },
        stored: { a, b, other, wide, atoms: randomWeight(rng, 'f32', [3, count * 8, count * 8]) },
        inputs: {
          x: normals(rng, rows * inner),
          y: normals(rng, rows * outer),
          one: new Float32Array(rows * outer).fill(1),
          pages,
          uses: ints(rng, rows, uses),
          gates: Float32Array.from({ length: 2 * uses * count * 8 }, () => rng.below(4) - 1),
          shares: Float32Array.from({ length: rows * 4 }, () => rng.below(3) / 2),
        },
      };
    },
    build: (ops, { a, b, other, wide, atoms }) => {
      const [x, y] = [ops.input('x', 'f32', [rows, inner]), ops.input('y', 'f32', [rows, outer])];
      const pages = ops.input('pages', 'i32', [rows, count]);
      const gates = ops.input('gates', 'f32', [2, uses, count * 8]);
      const shares = ops.input('shares', 'f32', [rows, 4]);
      // expand consumes its y, and an input must outlive the run.
      const own = ops.mul(y, ops.input('one', 'f32', [rows, outer]));
      const parts = [a!, other!].map((pages, i) => ({ a: pages, gate: ops.slice(gates, i) }));
      const uses_ = ops.input('uses', 'i32', [rows]);
      const [h, g] = ops.shrink(x, pages, parts, uses_) as [Tensor, Tensor];
      const mixed = ops.mixRanks(g, atoms!, shares);
      const [sum, wideSum, otherSum] = ops.expand(pages, [
        { y: own, h, b: b! },
        { y: ops.mul(x, x), h: mixed, b: wide! },
        { y: ops.add(x, x), h, b: wide! },
      ]) as [Tensor, Tensor, Tensor];
      const [again] = ops.expand(pages, [{ y: sum, h: mixed, b: b! }]) as [Tensor];
      return { y: again, wideSum, otherSum, h, mixed };
    },
  };
}

const kernelCases: readonly KernelCase[] = [
  linearCase('f32', 1, sums),
  linearCase('f32', 33, sums),
  linearCase('f16', 7, halves),
  linearCase('bf16', 1, bf16s),
  linearCase('bf16', 40, bf16s),
  ...(['q4_0', 'q4_1', 'q5_0', 'q5_1', 'q8_0', 'q4_k', 'q5_k', 'q6_k'] as const).flatMap((type) => [
    linearCase(type, 1, int8s),
    linearCase(type, 12, int8s),
  ]),
  {
    name: 'embed q8_0',
    nmse: exact,
    make: (rng) => ({
      stored: { table: randomWeight(rng, 'q8_0', [50, 64]) },
      inputs: { ids: Int32Array.of(0, 49, 7, 7) },
    }),
    build: (ops, { table }) => ({ y: ops.embed(table!, ops.input('ids', 'i32', [4])) }),
  },
  {
    name: 'rmsNorm',
    nmse: sums,
    make: (rng) => ({ stored: { w: f32(rng, [96]) }, inputs: { x: normals(rng, 5 * 96, 3) } }),
    build: (ops, { w }) => ({ y: ops.rmsNorm(ops.input('x', 'f32', [5, 96]), w!, 1e-5) }),
  },
  {
    name: 'add, mul, reshape',
    nmse: exact,
    make: (rng) => ({ stored: {}, inputs: { a: normals(rng, 60), b: normals(rng, 60) } }),
    build: (ops) => {
      const [a, b] = [ops.input('a', 'f32', [5, 12]), ops.input('b', 'f32', [5, 12])];
      return { y: ops.reshape(ops.mul(ops.add(a, b), b), [10, 6]) };
    },
  },
  {
    name: 'swiglu',
    nmse: 1e-7, // ggml's vector exp is a polynomial
    make: (rng) => ({ stored: {}, inputs: { g: normals(rng, 96, 4), u: normals(rng, 96) } }),
    build: (ops) => ({
      y: ops.swiglu(ops.input('g', 'f32', [3, 32]), ops.input('u', 'f32', [3, 32])),
    }),
  },
  ropeCase('norm', 64),
  ropeCase('neox', 64),
  ropeCase('neox', 32),
  {
    name: 'writeCells, then attend reads them in the same run',
    nmse: halves,
    make: (rng) => ({
      stored: { k: f16(rng, [40, 64]), v: f16(rng, [40, 64]) },
      inputs: {
        q: normals(rng, 3 * 64),
        new: normals(rng, 3 * 64),
        cells: BigInt64Array.of(20n, 21n, 22n),
      },
      segments: [{ rowStart: 0, rowCount: 3, cellBase: 16, cells: 7 }],
    }),
    build: (ops, { k, v }) => {
      const [added, cells] = [ops.input('new', 'f32', [3, 64]), ops.input('cells', 'i64', [3])];
      ops.writeCells(k!, added, cells);
      ops.writeCells(v!, added, cells);
      return { y: ops.attend(ops.input('q', 'f32', [3, 1, 64]), k!, v!) };
    },
  },
  attendCase('f16', 1e-4), // ggml accumulates V in f16 when the cells are f16
  attendCase('f32', 1e-7),
  lowRankCase([1]),
  lowRankCase([2, 2, 2, 2, 1, 1, 0, 0]),
  lowRankCase([8, 5, 4, 3, 1]),
  lowRankCase([1, 0, 3, 2, 0, 4]),
  ...(['f32', 'f16', 'bf16', 'q8_0'] as const).flatMap((dtype) =>
    [false, true].map((groups) =>
      lowRankCase([4, 4, 4, 2, 2, ...Array<number>(19).fill(1), 0, 3], {
        dtype,
        outer: 96,
        groups,
      }),
    ),
  ),
  lowRankCase([32, 1], { dtype: 'f16', outer: 32, groups: false }),
  ...routingCases,
  {
    name: 'gatherRows',
    nmse: exact,
    make: (rng) => ({ stored: {}, inputs: { x: normals(rng, 40), rows: Int32Array.of(3, 0, 3) } }),
    build: (ops) => ({
      y: ops.gatherRows(ops.input('x', 'f32', [4, 10]), ops.input('rows', 'i32', [3])),
    }),
  },
];

/** Rows of `attend` outside every segment are undefined; all others of every output are compared. */
function runCase(kernels: Kernels, test: KernelCase, seed: number): Record<string, Float32Array> {
  const fixture = test.make(createRng(seed));
  const guards: StoredTensor[] = [];
  const guard = new Uint8Array(64).fill(0xa5);
  const stored = store(kernels, fixture, () => {
    guards.push(kernels.store('f32', [16]));
    kernels.write(guards.at(-1)!, guard, 0);
  });
  const shapes = new Map<string, number>();
  using program = kernels.compile(
    (ops) => {
      const outputs = test.build(ops, stored);
      for (const [name, tensor] of Object.entries(outputs))
        shapes.set(name, elementCount(tensor.shape));
      return outputs;
    },
    { segments: fixture.segmentsMax ?? fixture.segments?.length ?? 0 },
  );
  for (const [name, data] of Object.entries(fixture.inputs)) program.write(name, data);
  program.run(fixture.segments ?? []);
  const results: Record<string, Float32Array> = {};
  for (const [name, count] of shapes) {
    results[name] = new Float32Array(count);
    program.read(name, 0, results[name]);
  }
  for (const tensor of guards) {
    const seen = new Uint8Array(64);
    kernels.read(tensor, seen, 0);
    expect(seen).toEqual(guard);
  }
  return results;
}

/** Stores what a fixture wants; `after` is called behind every tensor. */
function store(
  kernels: Kernels,
  fixture: Fixture,
  after: () => void = () => undefined,
): Record<string, StoredTensor> {
  const stored: Record<string, StoredTensor> = {};
  const pools = Object.entries(fixture.pools ?? {}).map(([name, use]) => {
    const { dtype, shape } = fixture.stored[name]!;
    return { name, pages: shape[0]!, pool: { use, dtype, width: shape[2]! } };
  });
  const together =
    pools[0] &&
    kernels.storePages(
      pools[0].pages,
      pools.map(({ pool }) => pool),
    );
  for (const [name, { dtype, shape, bytes }] of Object.entries(fixture.stored)) {
    const index = pools.findIndex((pool) => pool.name === name);
    const tensor = together?.[index] ?? kernels.store(dtype, shape);
    stored[name] = tensor;
    kernels.write(tensor, bytes, 0);
    after();
  }
  return stored;
}

/** Bytes of a pool of 4 pages: 1 has numbers of every size that f16 has, 2 had some before it was emptied, 3 is not touched. */
function writtenPages(
  kernels: Kernels,
  use: 'shrink' | 'expand',
  dtype: 'f32' | 'f16' | 'bf16' | 'q8_0',
): Uint8Array {
  const width = 96;
  // Between two others, for a backend that lets their pages lie together.
  const others = { use: 'shrink', dtype: 'f32', width: 32 } as const;
  const pools = kernels.storePages(4, [others, { use, dtype, width }, others]);
  const [before, pool, after] = pools as [StoredTensor, StoredTensor, StoredTensor];
  for (const other of [before, after]) kernels.write(other, new Uint8Array(other.bytes).fill(9), 0);
  const out = new Uint8Array(pool.bytes);
  kernels.write(pool, out.subarray(out.length / 4).fill(1), out.length / 4);
  const rng = createRng(5);
  const numbers = normals(rng, 8 * width).map((x, i) => x * 2 ** (12 - (Math.floor(i / 32) % 40)));
  const bits = new Uint16Array(8 * width);
  f32ToF16Bits(Float32Array.from(numbers), bits);
  kernels.writePage(pool, 1, bits);
  kernels.writePage(pool, 2, bits);
  kernels.writePage(pool, 2, null);
  for (const other of [before, after]) {
    const kept = new Uint8Array(other.bytes);
    kernels.read(other, kept, 0);
    expect(kept.every((byte) => byte === 9)).toBe(true);
  }
  kernels.read(pool, out, 0);
  return out;
}

function nmse(got: Float32Array, wanted: Float32Array): number {
  let [error, power] = [0, 0];
  for (let i = 0; i < wanted.length; i++) {
    error += (got[i]! - wanted[i]!) ** 2;
    power += wanted[i]! ** 2;
  }
  return error / (power || 1);
}

export function kernelSuite(
  name: string,
  create: () => Kernels,
  skips: readonly Skip[] = [],
): void {
  describe(`kernels: ${name}`, () => {
    for (const test of kernelCases) {
      const skip = skips.find((candidate) => candidate.case === test.name);
      if (skip !== undefined) {
        it.skip(`${test.name} (skipped: ${skip.reason})`, () => undefined);
        continue;
      }
      it(test.name, () => {
        using kernels = create();
        using reference = new ReferenceKernels();
        const [got, wanted] = [runCase(kernels, test, 7), runCase(reference, test, 7)];
        for (const [output, values] of Object.entries(wanted)) {
          expect(values.some((value) => value !== 0)).toBe(true);
          expect(nmse(got[output]!, values)).toBeLessThanOrEqual(test.nmse);
        }
      });
    }

    it('a stored tensor is zero unless its contents are left undefined', () => {
      using kernels = create();
      // Freed memory that is not zero, for the allocator to hand out again.
      {
        using dirty = create();
        dirty.write(dirty.store('f32', [5000]), new Uint8Array(20_000).fill(7), 0);
      }
      const bytes = new Uint8Array(20_000).fill(1);
      kernels.read(kernels.store('f32', [5000]), bytes, 0);
      expect(bytes.every((byte) => byte === 0)).toBe(true);
      const free = kernels.store('f32', [5000], 'undefined');
      kernels.write(free, bytes.fill(3), 0);
      kernels.read(free, bytes.fill(0), 0);
      expect(bytes.every((byte) => byte === 3)).toBe(true);
    });

    const ownQ8 = !skips.some(
      (skip) => skip.case.includes('q8_0') && skip.case.startsWith('shrink'),
    );
    for (const dtype of ['f32', 'f16', 'bf16', ...(ownQ8 ? (['q8_0'] as const) : [])] as const) {
      for (const use of ['shrink', 'expand'] as const) {
        it(`writePage rounds a page for ${use} to ${dtype} as the reference does, and no other`, () => {
          using kernels = create();
          using reference = new ReferenceKernels();
          const [got, wanted] = [kernels, reference].map((backend) =>
            writtenPages(backend, use, dtype),
          );
          expect(got).toEqual(wanted);
        });
      }
    }

    it('writePage refuses page 0, a page that is not there, and another width', () => {
      using kernels = create();
      const [pool] = kernels.storePages(3, [{ use: 'shrink', dtype: 'f16', width: 64 }]) as [
        StoredTensor,
      ];
      const page = new Uint16Array(8 * 64);
      for (const index of [0, 3, -1, 1.5]) {
        expect(() => kernels.writePage(pool, index, page)).toThrow(GatewayError);
      }
      expect(() => kernels.writePage(pool, 1, page.subarray(64))).toThrow(GatewayError);
    });

    it('a replay with new inputs and other segments gives what a fresh program gives', () => {
      const test = attendCase('f32', 0);
      using kernels = create();
      const fixture = test.make(createRng(3));
      const stored = store(kernels, fixture);
      using program = kernels.compile((ops) => test.build(ops, stored), { segments: 4 });
      const run = (segments: readonly AttentionSegment[]): Float32Array => {
        const out = new Float32Array(3 * 384);
        program.write('q', fixture.inputs.q!);
        program.run(segments);
        program.read('y', 0, out);
        return out;
      };
      const first = run([{ rowStart: 0, rowCount: 3, cellBase: 100, cells: 30 }]);
      const other = run([
        { rowStart: 0, rowCount: 1, cellBase: 16, cells: 700 },
        { rowStart: 1, rowCount: 2, cellBase: 30, cells: 2 },
      ]);
      expect(other).not.toEqual(first);
      expect(run([{ rowStart: 0, rowCount: 3, cellBase: 100, cells: 30 }])).toEqual(first);
    });

    it('a replay with fewer, more and no adapter pages gives what the reference gives', () => {
      const test = lowRankCase([4, 4, 2, 1]);
      const fixture = test.make(createRng(9));
      const open = (backend: Kernels): ((pages: Int32Array) => Float32Array) => {
        const stored = store(backend, fixture);
        const program = backend.compile((ops) => test.build(ops, stored), { segments: 0 });
        for (const [key, data] of Object.entries(fixture.inputs)) program.write(key, data);
        return (pages) => {
          const out = new Float32Array(4 * 80);
          program.write('pages', pages);
          program.run([]);
          program.read('y', 0, out);
          return out;
        };
      };
      using kernels = create();
      using reference = new ReferenceKernels();
      const [got, wanted] = [open(kernels), open(reference)];
      const row = new Int32Array(16);
      for (const pages of [
        [5, 0, 0, 0, 6],
        [1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2, 3, 4, 5, 6, 7],
        [],
        [0, 0, 0, 0, 3, 3],
      ]) {
        row.fill(0);
        row.set(pages);
        expect(nmse(got(row), wanted(row)), String(pages)).toBeLessThanOrEqual(halves);
      }
    });

    it('a program survives a larger one that moves the shared scratch', () => {
      using kernels = create();
      const w = kernels.store('f32', [64, 64]);
      kernels.write(w, new Uint8Array(normals(createRng(1), 4096).buffer), 0);
      const compile = (rows: number): ReturnType<Kernels['compile']> =>
        kernels.compile((ops) => ({ y: ops.linear(ops.input('x', 'f32', [rows, 64]), w) }), {
          segments: 0,
        });
      using small = compile(2);
      const [before, after] = [new Float32Array(128), new Float32Array(128)];
      small.write('x', normals(createRng(2), 128));
      small.run([]);
      small.read('y', 0, before);
      using large = compile(4096);
      large.write('x', normals(createRng(4), 4096 * 64));
      large.run([]);
      small.run([]);
      small.read('y', 0, after);
      expect(after).toEqual(before);
    });

    it('refuses what would read or write outside, before computing anything', () => {
      using kernels = create();
      const table = kernels.store('f32', [10, 32]);
      using program = kernels.compile(
        (ops) => ({ y: ops.embed(table, ops.input('ids', 'i32', [2])) }),
        {
          segments: 0,
        },
      );
      const refused = (act: () => unknown): void => {
        expect(act).toThrow(GatewayError);
      };
      refused(() => program.write('ids', Int32Array.of(1, 10)));
      refused(() => program.write('ids', Int32Array.of(-1, 0)));
      refused(() => program.write('ids', Int32Array.of(1)));
      refused(() => program.write('ids', Float32Array.of(1, 2)));
      refused(() => program.write('other', Int32Array.of(1, 2)));
      refused(() => program.run([]));
      refused(() => kernels.write(table, new Uint8Array(8), table.bytes - 4));
      refused(() => kernels.read(table, new Uint8Array(8), table.bytes - 4));
      refused(() => kernels.copyWithin(table, { from: 0, to: table.bytes - 4, bytes: 8 }));
      refused(() => kernels.store('q4_1', [4, 33]));
      refused(() => kernels.store('f32', [0, 4]));
      refused(() =>
        kernels.compile((ops) => ({ y: ops.linear(ops.input('x', 'f32', [2, 31]), table) }), {
          segments: 0,
        }),
      );
    });

    it('refuses segments that overlap, leave the caches or exceed the program', () => {
      using kernels = create();
      const [k, v] = [kernels.store('f16', [64, 32]), kernels.store('f16', [64, 32])];
      using program = kernels.compile(
        (ops) => ({ y: ops.attend(ops.input('q', 'f32', [4, 1, 32]), k, v) }),
        {
          segments: 2,
        },
      );
      program.write('q', new Float32Array(128).fill(1));
      const one = { rowStart: 0, rowCount: 2, cellBase: 0, cells: 4 };
      const bad: AttentionSegment[][] = [
        [{ ...one, cellBase: 61 }],
        [{ ...one, rowCount: 5, cells: 5 }],
        [{ ...one, cells: 1 }],
        [{ ...one, cellBase: -1 }],
        [one, { ...one, rowStart: 1 }],
        [one, { ...one, rowStart: 2, rowCount: 1 }, { ...one, rowStart: 3, rowCount: 1 }],
      ];
      for (const segments of bad) expect(() => program.run(segments)).toThrow(GatewayError);
      program.run([one]);
    });
  });
}
