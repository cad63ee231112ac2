// What algorithms.md promises of routed ranks (28, 18) and of mixed atoms (6), on the reference and on our own kernels.

import { describe, expect, it } from 'vitest';
import { Tape } from '../../../src/kernels/autodiff.ts';
import { elementCount } from '../../../src/kernels/check.ts';
import { GgmlKernels } from '../../../src/kernels/ggml/ggml-kernels.ts';
import type { Kernels, Ops, StoredTensor, Tensor } from '../../../src/kernels/kernels.ts';
import { ReferenceKernels } from '../../../src/kernels/reference-kernels.ts';
import { createRng, normals, type Rng } from '../../support/random.ts';

type Data = Float32Array | Int32Array;
type Inputs = Readonly<Record<string, readonly [shape: readonly number[], data: Data]>>;

/** Runs once; every output whole. */
function run(
  kernels: Kernels,
  inputs: Inputs,
  build: (ops: Ops, at: Readonly<Record<string, Tensor>>) => Readonly<Record<string, Tensor>>,
): Record<string, Float32Array> {
  const counts: Record<string, number> = {};
  using program = kernels.compile(
    (ops) => {
      const at: Record<string, Tensor> = {};
      for (const [name, [shape, data]] of Object.entries(inputs)) {
        at[name] = ops.input(name, data instanceof Int32Array ? 'i32' : 'f32', shape);
      }
      const outputs = build(ops, at);
      for (const [name, { shape }] of Object.entries(outputs)) counts[name] = elementCount(shape);
      return outputs;
    },
    { segments: 0 },
  );
  for (const [name, [, data]] of Object.entries(inputs)) program.write(name, data);
  program.run([]);
  return Object.fromEntries(
    Object.entries(counts).map(([name, count]) => {
      const out = new Float32Array(count);
      program.read(name, 0, out);
      return [name, out];
    }),
  );
}

function storeF32(kernels: Kernels, shape: readonly number[], values: Float32Array): StoredTensor {
  const tensor = kernels.store('f32', shape);
  kernels.write(tensor, new Uint8Array(values.buffer, values.byteOffset, values.byteLength), 0);
  return tensor;
}

interface Routed {
  readonly x: Float32Array; // [T, K]
  readonly h: Float32Array; // [T, 8P]
  readonly uses: readonly number[]; // [T]
  readonly groups: readonly number[]; // [G, P]
  readonly temperatures: readonly number[]; // [G, P]
  readonly bias: Float32Array; // [G, 8P]
}

function route(kernels: Kernels, pages: number, routed: Routed): Float32Array {
  const { x, h, uses, groups, temperatures, bias } = routed;
  const [rows, count] = [uses.length, groups.length / pages];
  const inputs: Inputs = {
    x: [[rows, x.length / rows], x],
    h: [[rows, 8 * pages], h],
    uses: [[rows], Int32Array.from(uses)],
    groups: [[count, pages], Int32Array.from(groups)],
    temperatures: [[count, pages], Float32Array.from(temperatures)],
    bias: [[count, 8 * pages], bias],
  };
  return run(kernels, inputs, (ops, at) => {
    const [y] = ops.routeRanks(at.x!, [at.h!], {
      uses: at.uses!,
      groups: at.groups!,
      temperatures: at.temperatures!,
      biases: [at.bias!],
    });
    return { y: y! };
  }).y!;
}

/** One use of one group over all pages. */
function oneGroup(rng: Rng, rows: number, pages: number): Omit<Routed, 'groups' | 'temperatures'> {
  return {
    x: normals(rng, rows * 48),
    h: normals(rng, rows * 8 * pages),
    uses: Array<number>(rows).fill(0),
    bias: normals(rng, 8 * pages, 0.3).map(Math.abs),
  };
}
const groupOf = (topK: number, pages: number): number[] => [topK, ...Array(pages - 1).fill(-1)];
const rowOf = (values: Float32Array, row: number, rows: number): Float32Array =>
  values.subarray((row * values.length) / rows, ((row + 1) * values.length) / rows);

/** Largest singular value of m [r,r], by the power method: from below. */
function spectralNorm(m: Float32Array, r: number): number {
  let v = Array.from({ length: r }, (_, i) => 1 + i / r);
  let norm = 0;
  for (let round = 0; round < 300; round++) {
    const u = v.map((_, i) => v.reduce((sum, value, j) => sum + m[i * r + j]! * value, 0));
    const w = v.map((_, j) => u.reduce((sum, value, i) => sum + m[i * r + j]! * value, 0));
    const length = Math.hypot(...w);
    norm = Math.sqrt(length);
    v = w.map((value) => value / length);
  }
  return norm;
}

const [atoms, r, queries] = [6, 8, 16];

interface Bank {
  readonly maps: Float32Array; // [K, r, r]
  readonly keys: Float32Array; // [K, dq]
  readonly bias: Float32Array; // [K]
  readonly topK: number;
}

function randomBank(rng: Rng, topK: number): Bank {
  return {
    maps: normals(rng, atoms * r * r),
    keys: normals(rng, atoms * queries),
    bias: normals(rng, atoms),
    topK,
  };
}

/** h [T,r] and earlier states, two unless told, through a router that is always the same. */
function mix(
  kernels: Kernels,
  { maps, keys, bias, topK }: Bank,
  h: Float32Array,
  earlier: readonly Float32Array[] = [20, 21].map((seed) => normals(createRng(seed), h.length)),
): Record<'weights' | 'y', Float32Array> {
  const rng = createRng(5);
  const stored = (...shape: number[]): StoredTensor =>
    storeF32(kernels, shape, normals(rng, elementCount(shape), 0.5));
  const router = {
    query: stored(queries, r),
    summary: stored(r, r),
    context: stored(queries, r),
  };
  const [rows, count] = [h.length / r, bias.length];
  const bank = storeF32(kernels, [count, r, r], maps);
  const inputs: Inputs = {
    h: [[rows, r], h],
    ...Object.fromEntries(earlier.map((past, i) => [`past${i}`, [[rows, r], past] as const])),
    uses: [[rows], new Int32Array(rows)],
    keys: [[1, count, queries], keys],
    bias: [[1, count], bias],
    topK: [[1], Int32Array.of(topK)],
  };
  return run(kernels, inputs, (ops, at) => {
    const past = earlier.map((_, i) => at[`past${i}`]!);
    const weights = ops.routeAtoms(at.h!, past, router, {
      uses: at.uses!,
      keys: at.keys!,
      bias: at.bias!,
      topK: at.topK!,
    });
    return { weights, y: ops.mixRanks(at.h!, bank, weights) };
  }) as Record<'weights' | 'y', Float32Array>;
}

const backends: ReadonlyArray<readonly [name: string, create: () => Kernels]> = [
  ['reference', () => new ReferenceKernels()],
  ['own kernels', () => new GgmlKernels({ threads: 1, f32Activations: true })],
];

describe.each(backends)('ranks that rows choose: %s', (_name, create) => {
  it('exactly k of them stay, with their values', () => {
    using kernels = create();
    const [rows, pages] = [20, 4];
    for (let topK = 1; topK <= 32; topK++) {
      const given = oneGroup(createRng(topK), rows, pages);
      const y = route(kernels, pages, {
        ...given,
        groups: groupOf(topK, pages),
        temperatures: Array(pages).fill(0),
      });
      for (let row = 0; row < rows; row++) {
        const [own, h] = [rowOf(y, row, rows), rowOf(given.h, row, rows)];
        const scores = Array.from(h, (value, i) => Math.fround(Math.abs(value) + given.bias[i]!));
        const least = [...scores].sort((a, b) => b - a)[topK - 1]!;
        expect(own.filter((value) => value !== 0)).toHaveLength(topK);
        own.forEach((value, i) => {
          expect(value).toBe(scores[i]! >= least ? h[i] : 0);
        });
      }
    }
  });

  it('all of them is the dense adapter, bit for bit', () => {
    using kernels = create();
    const rng = createRng(3);
    const [rows, pages, width] = [5, 4, 64];
    const [a, b] = kernels.storePages(1 + pages, [
      { use: 'shrink', dtype: 'f32', width },
      { use: 'expand', dtype: 'f32', width },
    ]) as [StoredTensor, StoredTensor];
    const pageBytes = 8 * width * 4;
    for (const pool of [a, b]) {
      kernels.write(pool, new Uint8Array(normals(rng, pages * 8 * width).buffer), pageBytes);
    }
    const inputs: Inputs = {
      x: [[rows, width], normals(rng, rows * width)],
      pages: [[rows, pages], Int32Array.from({ length: rows * pages }, (_, i) => 1 + (i % pages))],
      uses: [[rows], new Int32Array(rows)],
      gate: [[1, 8 * pages], new Float32Array(8 * pages).fill(2)],
      groups: [[1, pages], Int32Array.from(groupOf(32, pages))],
      temperatures: [[1, pages], new Float32Array(pages)],
      bias: [[1, 8 * pages], normals(rng, 8 * pages)],
    };
    const { routed, dense } = run(kernels, inputs, (ops, at) => {
      const [h] = ops.shrink(at.x!, at.pages!, [{ a, gate: at.gate! }], at.uses!);
      const [kept] = ops.routeRanks(at.x!, [h!], {
        uses: at.uses!,
        groups: at.groups!,
        temperatures: at.temperatures!,
        biases: [at.bias!],
      });
      const onto = (): Tensor => ops.add(at.x!, at.x!);
      return {
        routed: ops.expand(at.pages!, [{ y: onto(), h: kept!, b }])[0]!,
        dense: ops.expand(at.pages!, [{ y: onto(), h: h!, b }])[0]!,
      };
    });
    expect(routed).toEqual(dense);
  });

  it('mora’s k shares add up to one and follow the scores; alike, all ranks get the same', () => {
    using kernels = create();
    const [rows, pages, topK, temperature] = [20, 2, 4, 0.1];
    const given = oneGroup(createRng(8), rows, pages);
    const y = route(kernels, pages, {
      ...given,
      groups: groupOf(topK, pages),
      temperatures: Array(pages).fill(temperature),
    });
    for (let row = 0; row < rows; row++) {
      const [own, h] = [rowOf(y, row, rows), rowOf(given.h, row, rows)];
      const norm = Math.hypot(...rowOf(given.x, row, rows));
      const scores = Array.from(h, (value, i) => (Math.abs(value) * given.bias[i]!) / norm);
      const chosen = [...scores.keys()].sort((i, j) => scores[j]! - scores[i]!).slice(0, topK);
      const total = chosen.reduce((sum, i) => sum + Math.exp(scores[i]! / temperature), 0);
      own.forEach((value, i) => {
        const share = chosen.includes(i) ? Math.exp(scores[i]! / temperature) / total : 0;
        expect(value / h[i]!).toBeCloseTo(share, 5);
      });
    }
    const alike = route(kernels, 1, {
      ...given,
      uses: [0],
      x: given.x.subarray(0, 48),
      h: new Float32Array(8).fill(-3),
      bias: new Float32Array(8).fill(0.5),
      groups: [8],
      temperatures: [temperature],
    });
    for (const value of alike) expect(value).toBeCloseTo(-3 / 8, 6);
  });

  it('a group and a row choose for themselves: alone or among others, the same bits', () => {
    using kernels = create();
    const rng = createRng(11);
    const [rows, pages] = [8, 4];
    const groups = [
      [0, 0, 0, 0],
      [3, -1, 5, -1],
      [1, 2, -1, -1],
      [12, -1, -1, 0],
    ];
    const temperatures = groups.map((_, use) => [use % 2, use % 2, use === 1 ? 0.2 : 0, 0]);
    const x = normals(rng, rows * 48);
    const h = normals(rng, rows * 32);
    const bias = normals(rng, 4 * 32).map(Math.abs);
    const uses = [3, 1, 0, 2, 1, 1, 3, 2];
    const mixed = route(kernels, pages, {
      x,
      h,
      uses,
      groups: groups.flat(),
      temperatures: temperatures.flat(),
      bias,
    });
    uses.forEach((use, row) => {
      const rules = { groups: groups[use]!, temperatures: temperatures[use]! };
      const alone = (keep: (page: number) => boolean): Float32Array =>
        route(kernels, pages, {
          x: rowOf(x, row, rows),
          h: rowOf(h, row, rows),
          uses: [0],
          groups: rules.groups.map((topK, page) => (keep(page) ? topK : 0)),
          temperatures: rules.temperatures,
          bias: rowOf(bias, use, 4),
        });
      const own = rowOf(mixed, row, rows);
      expect(own).toEqual(alone(() => true));
      if (use !== 1) return;
      expect(own.subarray(0, 16)).toEqual(alone((page) => page < 2).subarray(0, 16));
      expect(own.subarray(16)).toEqual(alone((page) => page >= 2).subarray(16));
    });
  });

  it('zeros stay zeros, and a row that is not finite is the only one that is not', () => {
    using kernels = create();
    const rng = createRng(2);
    const [rows, pages] = [3, 2];
    const [x, h] = [normals(rng, rows * 48), normals(rng, rows * 16)];
    x.fill(0, 0, 48);
    h.fill(0, 0, 16).fill(Number.NaN, 16, 24);
    const rules = { uses: [0, 0, 0], bias: new Float32Array(16).fill(1) };
    for (const temperature of [0, 0.1]) {
      const y = route(kernels, pages, {
        x,
        h,
        ...rules,
        groups: groupOf(4, pages),
        temperatures: [temperature, temperature],
      });
      expect([...rowOf(y, 0, rows)]).toEqual(Array(16).fill(0));
      expect(rowOf(y, 1, rows).some(Number.isNaN)).toBe(true);
      expect(rowOf(y, 2, rows).filter((value) => value !== 0)).toHaveLength(4);
      expect(rowOf(y, 2, rows).every(Number.isFinite)).toBe(true);
    }
  });
});

describe.each(backends)('atoms that rows mix: %s', (_name, create) => {
  it('one atom that is the identity changes no bit', () => {
    using kernels = create();
    const h = normals(createRng(1), 7 * r);
    const identity = Float32Array.from({ length: r * r }, (_, i) => (i % (r + 1) === 0 ? 1 : 0));
    const bank = {
      maps: identity,
      keys: normals(createRng(2), queries),
      bias: Float32Array.of(-3),
    };
    const { weights, y } = mix(kernels, { ...bank, topK: 1 }, h);
    expect([...weights]).toEqual(Array.from({ length: 14 }, (_, i) => i % 2));
    expect(y).toEqual(h);
  });

  it('no row grows by more than the largest atom’s norm, in 1000 rows', () => {
    using kernels = create();
    const rng = createRng(4);
    const bank = randomBank(rng, 3);
    const norms = Array.from({ length: atoms }, (_, k) =>
      spectralNorm(bank.maps.subarray(k * r * r, (k + 1) * r * r), r),
    );
    const h = normals(rng, 1000 * r);
    const { weights, y } = mix(kernels, bank, h);
    for (let t = 0; t < 1000; t++) {
      const own = rowOf(weights, t, 1000);
      expect(own.filter((weight) => weight > 0)).toHaveLength(3);
      expect(own.reduce((sum, weight) => sum + weight, 0)).toBeCloseTo(1, 5);
      const growth = Math.hypot(...rowOf(y, t, 1000)) / Math.hypot(...rowOf(h, t, 1000));
      const chosen = norms.filter((_, k) => own[1 + k]! > 0);
      expect(growth).toBeLessThanOrEqual(Math.max(...chosen) * (1 + 1e-5));
    }
  });

  it('atoms in another order, with their keys, mix to the same', () => {
    using kernels = create();
    const bank = randomBank(createRng(6), 2);
    const h = normals(createRng(7), 30 * r);
    const order = [3, 0, 5, 1, 4, 2];
    const ordered = (table: Float32Array): Float32Array =>
      Float32Array.from(order.flatMap((k) => [...rowOf(table, k, atoms)]));
    const moved = {
      ...bank,
      maps: ordered(bank.maps),
      keys: ordered(bank.keys),
      bias: ordered(bank.bias),
    };
    const [one, other] = [mix(kernels, bank, h).y, mix(kernels, moved, h).y];
    one.forEach((value, i) => {
      expect(other[i]).toBeCloseTo(value, 5);
    });
  });

  it('a state of zeros takes the prior’s topK, renormalised; a stronger prior, more of its atom', () => {
    using kernels = create();
    const prior = [0.05, 0.3, 0.1, 0.25, 0.2, 0.1];
    const bank = (strength: number): Bank => ({
      ...randomBank(createRng(9), 3),
      bias: Float32Array.from(prior, (p) => strength * Math.log(p)),
    });
    const flat = { ...bank(1), keys: new Float32Array(atoms * queries) };
    const { weights } = mix(kernels, flat, new Float32Array(r));
    [0, 0, 0.3 / 0.75, 0, 0.25 / 0.75, 0.2 / 0.75, 0].forEach((share, i) => {
      expect(weights[i]).toBeCloseTo(share, 6);
    });
    const h = normals(createRng(10), 200 * r);
    const means = [0, 0.25, 0.5, 1, 2, 1e6].map((strength) => {
      const all = mix(kernels, bank(strength), h).weights;
      return all.reduce((sum, weight, i) => (i % 7 === 2 ? sum + weight / 200 : sum), 0);
    });
    for (let i = 1; i < means.length; i++) expect(means[i]).toBeGreaterThan(means[i - 1]!);
    expect(means.at(-1)).toBeCloseTo(1, 6);
  });

  it('a token’s choice is its own: one by one, the same bits as together', () => {
    using kernels = create();
    const bank = randomBank(createRng(12), 2);
    const states = [13, 14, 15, 16].map((seed) => normals(createRng(seed), 9 * r));
    const [h, ...earlier] = states as [Float32Array, ...Float32Array[]];
    const { weights, y } = mix(kernels, bank, h, earlier);
    for (let t = 0; t < 9; t++) {
      const [own, ...past] = states.map((state) => rowOf(state, t, 9));
      const alone = mix(kernels, bank, own!, past);
      expect(alone.weights).toEqual(rowOf(weights, t, 9));
      expect(alone.y).toEqual(rowOf(y, t, 9));
    }
    // Earlier blocks count, and their order does not.
    expect(mix(kernels, bank, h, earlier.slice(1)).weights).not.toEqual(weights);
    mix(kernels, bank, h, earlier.toReversed()).weights.forEach((weight, i) => {
      expect(weight).toBeCloseTo(weights[i]!, 5);
    });
  });

  it('no atoms leave the row as it is; more than there are means all', () => {
    using kernels = create();
    const [bank, h] = [randomBank(createRng(12), 0), normals(createRng(13), 9 * r)];
    expect(mix(kernels, bank, h).y).toEqual(h);
    const { weights } = mix(kernels, { ...bank, topK: atoms + 9 }, h);
    expect(weights.filter((weight) => weight > 0)).toHaveLength(9 * atoms);
    expect(weights).toEqual(mix(kernels, { ...bank, topK: atoms }, h).weights);
  });
});

describe('refusals', () => {
  const f32 = (ops: Ops, name: string, ...shape: number[]): Tensor => ops.input(name, 'f32', shape);
  const i32 = (ops: Ops, name: string, ...shape: number[]): Tensor => ops.input(name, 'i32', shape);
  const refused = (build: (ops: Ops, kernels: Kernels) => Tensor): void => {
    using kernels = new GgmlKernels({ threads: 1, f32Activations: true });
    expect(() => kernels.compile((ops) => ({ y: build(ops, kernels) }), { segments: 0 })).toThrow(
      expect.objectContaining({ code: 'SHAPE_MISMATCH' }),
    );
  };

  it('ranks of other rows, pages or uses, before native code sees them', () => {
    const given = (pages: number, changed: (ops: Ops) => Record<string, Tensor>): void =>
      refused((ops) => {
        const at: Record<string, Tensor> = {
          x: f32(ops, 'x', 3, 64),
          h: f32(ops, 'h', 3, 8 * pages),
          uses: i32(ops, 'uses', 3),
          groups: i32(ops, 'groups', 2, pages),
          temperatures: f32(ops, 'temperatures', 2, pages),
          bias: f32(ops, 'bias', 2, 8 * pages),
          ...changed(ops),
        };
        const { uses, groups, temperatures, bias } = at as Record<string, Tensor> & {
          readonly [name: string]: Tensor;
        };
        const router = {
          uses: uses!,
          groups: groups!,
          temperatures: temperatures!,
          biases: [bias!],
        };
        return ops.routeRanks(at.x!, [at.h!], router)[0]!;
      });
    given(2, (ops) => ({ x: f32(ops, 'other', 4, 64) }));
    given(2, (ops) => ({ h: f32(ops, 'other', 3, 24) }));
    given(2, (ops) => ({ uses: i32(ops, 'other', 4) }));
    given(2, (ops) => ({ uses: f32(ops, 'other', 3) }));
    given(2, (ops) => ({ groups: f32(ops, 'other', 2, 2) }));
    given(2, (ops) => ({ temperatures: f32(ops, 'other', 1, 2) }));
    given(2, (ops) => ({ bias: f32(ops, 'other', 1, 16) }));
    given(33, () => ({}));
  });

  it('atoms of other sizes, too many summaries, and uses that are not there', () => {
    const query = (ops: Ops, kernels: Kernels, sizes: Partial<Record<string, number>>): Tensor => {
      const size = { r: 8, summary: 8, dq: 16, K: 4, G: 2, ranks: 8, past: 0, ...sizes };
      const router = {
        query: kernels.store('f32', [size.dq, size.r]),
        summary: kernels.store('f32', [size.summary, size.summary]),
        context: kernels.store('f32', [size.dq, size.r]),
      };
      const past = Array.from({ length: size.past }, (_, i) => f32(ops, `past${i}`, 3, size.ranks));
      return ops.routeAtoms(f32(ops, 'h', 3, size.ranks), past, router, {
        uses: i32(ops, 'uses', 3),
        keys: f32(ops, 'keys', size.G, size.K, sizes.keyed ?? size.dq),
        bias: f32(ops, 'bias', size.G, size.K),
        topK: i32(ops, 'topK', sizes.asked ?? size.G),
      });
    };
    refused((ops, kernels) => query(ops, kernels, { r: 16, summary: 16 })); // of 8 ranks
    refused((ops, kernels) => query(ops, kernels, { summary: 4 }));
    refused((ops, kernels) => query(ops, kernels, { keyed: 8 }));
    refused((ops, kernels) => query(ops, kernels, { asked: 3 }));
    refused((ops, kernels) => query(ops, kernels, { K: 257 }));
    refused((ops, kernels) => query(ops, kernels, { dq: 257 }));
    refused((ops, kernels) => query(ops, kernels, { past: 7 }));
    using kernels = new GgmlKernels({ threads: 1, f32Activations: true });
    using program = kernels.compile((ops) => ({ y: query(ops, kernels, { past: 6 }) }), {
      segments: 0,
    });
    for (const use of [2, -1]) {
      expect(() => program.write('uses', Int32Array.of(0, use, 0))).toThrow(
        expect.objectContaining({ code: 'SHAPE_MISMATCH' }),
      );
    }
  });

  it('a slice outside, or of what is stored', () => {
    refused((ops) => ops.slice(f32(ops, 'x', 3, 4), 3));
    refused((ops) => ops.slice(f32(ops, 'x', 3, 4), -1));
    refused((ops) => ops.slice(f32(ops, 'x', 3), 0));
    refused((ops, kernels) => ops.slice(kernels.store('f32', [3, 4]), 0));
  });

  it('gradients that the tape has no rule for: through a choice, a slice, a mix of some ranks', () => {
    using kernels = new ReferenceKernels();
    const bank = storeF32(kernels, [1, 4, 4], new Float32Array(16));
    const compile = (build: (tape: Tape, ops: Ops, h: Tensor) => Tensor): void => {
      kernels.compile(
        (ops) => {
          const h = f32(ops, 'h', 2, 8);
          const tape = new Tape(ops, { trainable: [h], transposed: new Map() });
          const of = build(tape, ops, h);
          return { y: tape.gradients([{ of, gradient: f32(ops, 'dy', ...of.shape) }], [h])[0]! };
        },
        { segments: 0 },
      );
    };
    const refusedAs = (code: string, build: Parameters<typeof compile>[0]): void => {
      expect(() => compile(build)).toThrow(expect.objectContaining({ code }));
    };
    refusedAs('UNSUPPORTED', (tape, ops, h) => {
      const [y] = tape.routeRanks(f32(ops, 'x', 2, 4), [h], {
        uses: i32(ops, 'uses', 2),
        groups: i32(ops, 'groups', 1, 1),
        temperatures: f32(ops, 'temperatures', 1, 1),
        biases: [f32(ops, 'bias', 1, 8)],
      });
      return y!;
    });
    refusedAs('UNSUPPORTED', (tape, ops, h) => {
      const router = { query: bank, summary: bank, context: bank };
      const uses = i32(ops, 'uses', 2);
      const keys = f32(ops, 'keys', 1, 3, 5);
      const asked = { uses, keys, bias: f32(ops, 'bias', 1, 3), topK: i32(ops, 'topK', 1) };
      return tape.routeAtoms(h, [], router, asked);
    });
    refusedAs('UNSUPPORTED', (tape, _ops, h) => tape.slice(h, 0));
    const mixed = (tape: Tape, ops: Ops, h: Tensor): Tensor =>
      tape.mixRanks(h, bank, f32(ops, 'weights', 2, 2));
    refusedAs('SHAPE_MISMATCH', mixed);
  });
});
