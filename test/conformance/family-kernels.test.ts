// Tokens of every family in one batch through the kernels, against the families' own definition in f64: as served, over factors
// that are rounded to f16 in both.

import { describe, expect, it } from 'vitest';
import { mixAtoms, routeAtoms } from '../../src/adapters/families/atom-routing.ts';
import type { Family, Site, Tensors } from '../../src/adapters/families/family.ts';
import { flexmore } from '../../src/adapters/families/flexmore.ts';
import { fly, keepTop, sparseA } from '../../src/adapters/families/fly.ts';
import { hydra } from '../../src/adapters/families/hydra.ts';
import { lora } from '../../src/adapters/families/lora.ts';
import { columnsOf, times, transposedTimes } from '../../src/adapters/families/matrices.ts';
import { matryoshka } from '../../src/adapters/families/matryoshka.ts';
import { mora, moraWeights } from '../../src/adapters/families/mora.ts';
import { queryable, routerOf } from '../../src/adapters/families/queryable.ts';
import { salt } from '../../src/adapters/families/salt.ts';
import { createRandom } from '../../src/adapters/families/seeded-random.ts';
import { svfit, svfitBasis } from '../../src/adapters/families/svfit.ts';
import { triangular } from '../../src/adapters/families/triangular.ts';
import type { Columns } from '../../src/adapters/orthogonal.ts';
import type { ServedModule } from '../../src/adapters/served.ts';
import { createKernels } from '../../src/kernels/create-kernels.ts';
import { f16Values, f32ToF16Bits } from '../../src/kernels/half.ts';
import type { Kernels, StoredTensor } from '../../src/kernels/kernels.ts';
import { normalColumns, testSite, trainedTensors } from '../support/family-site.ts';

const site = testSite({ in: 64, out: 32 });
const pagesMax = 2;
const ranksMax = 8 * pagesMax;

/** A token of one adapter: what the tables of the kernels say of it, and what it must give. */
interface Row {
  readonly name: string;
  readonly a: Columns; // [in, R], f16 values
  readonly b: Columns; // [out, R]
  readonly gates: Float32Array; // [R]
  readonly topK: number; // 0: no group
  readonly temperature: number;
  readonly bias: Float32Array; // [R]
  readonly atoms: boolean;
  expected(h: Columns, x: Columns): Columns;
}

function halved(data: Float64Array): Float64Array {
  const bits = new Uint16Array(data.length);
  f32ToF16Bits(Float32Array.from(data), bits);
  return Float64Array.from(bits, (half) => f16Values[half]!);
}

function rowOf(name: string, served: ServedModule, changes: Partial<Row> = {}): Row {
  const { rank, in: width, out } = served;
  return {
    name,
    a: changes.a ?? { rows: width, columns: rank, data: halved(served.a!) },
    b: changes.b ?? { rows: out, columns: rank, data: halved(served.b!) },
    gates: new Float32Array(rank).fill(1),
    topK: 0,
    temperature: 0,
    bias: new Float32Array(rank),
    atoms: false,
    expected: (h) => h,
    ...changes,
  };
}

function trained(family: Family, seed: bigint, where: Site = site): Tensors {
  return trainedTensors(family, where, createRandom(seed));
}

const queryOptions = {
  rank: 8,
  alpha: 8,
  atoms: 6,
  queryWidth: 5,
  topK: 3,
  earlierBlocks: true,
  bias: [0.5, 0, -0.5, 0, 1, 0],
};
const bank = f32Tensors(trained(queryable(queryOptions), 40n));

function f32Tensors(tensors: Tensors): Tensors {
  return Object.fromEntries(
    Object.entries(tensors).map(([name, x]) => [name, { ...x, data: x.data.map(Math.fround) }]),
  );
}

function pairRows(): Row[] {
  const families: [string, Family][] = [
    ['lora', lora({ rank: 12, alpha: 12, rslora: false, order: 'svd' })],
    [
      'matryoshka',
      matryoshka({ maxRank: 16, ranks: [1, 4, 16], scaling: 'sqrt', mask: 'diag', order: 'svd' }),
    ],
    ['triangular', triangular({ rank: 8, alpha: 8 })],
    ['hydra', hydra({ rank: 5, alpha: 5 })],
    [
      'flexmore',
      flexmore({
        experts: [
          { name: 'a', rank: 1 },
          { name: 'b', rank: 11 },
        ],
      }),
    ],
    ['salt', salt({ rank: 6, tailRank: 3 })],
  ];
  return families.flatMap(([name, family], i) => {
    const served = family.serve(site, trained(family, BigInt(50 + i)));
    return [1, 2, 4, 8].map((rank) => {
      const gates = Float32Array.from({ length: served.rank }, (_, r) => (r < rank ? 1 : 0));
      return rowOf(`${name} at rank ${rank}`, served, { gates });
    });
  });
}

/** 32 adapters over one basis. */
function svfitRows(): Row[] {
  const family = svfit({ rank: 16 });
  const basis = svfitBasis(site, 16);
  return Array.from({ length: 32 }, (_, i) => {
    const { gates } = family.serve(site, trained(family, BigInt(100 + i)));
    return rowOf(`svfit ${i}`, basis, { gates: gates! });
  });
}

function routedRows(): Row[] {
  const chosen = fly({ rank: 16, topK: 4, alpha: 32, seed: 0xffn, score: 'abs_plus_bias' });
  const { d, ...own } = trained(chosen, 60n);
  const bias = Float32Array.from(normalColumns(createRandom(61n), 16, 1, 0.02).data);
  const served = chosen.serve(site, { ...own, d: d! });
  const factor = halved(sparseA({ seed: 0xffn, module: 0, rank: 16, in: 64, topK: 4 }));
  const flyRows = [1, 4, 16].map((topK) =>
    rowOf(`fly, ${topK} ranks`, served, {
      a: { rows: 64, columns: 16, data: factor },
      topK,
      bias,
      expected: (h) =>
        keepTop(h, Float64Array.from(bias), 'abs_plus_bias', [{ first: 0, count: 16, topK }]).g,
    }),
  );
  const scored = mora({ rank: 16, topK: 4, temperature: 0.25, frozen: 0 });
  const plain = rowOf('mora', scored.serve(site, trained(scored, 62n)));
  const norms = Float32Array.from(
    { length: 16 },
    (_, i) => 1 / Math.hypot(...columnsOf(plain.a, i, 1).data),
  );
  const moraRow: Row = {
    ...plain,
    topK: 4,
    temperature: 0.25,
    bias: norms,
    expected(h, x) {
      const { weights } = moraWeights({ h, x, a: plain.a }, { topK: 4, temperature: 0.25 });
      return { ...h, data: h.data.map((value, i) => value * weights.data[i]!) };
    },
  };
  const atomRow = rowOf('queryable', queryable(queryOptions).serve(site, bank), {
    atoms: true,
    expected(h) {
      const { weights } = routeAtoms(h, [], routerOf(bank, queryOptions));
      return mixAtoms(h, bank.atoms!, weights).g;
    },
  });
  return [...flyRows, moraRow, atomRow];
}

/** The rows as one program's inputs; each has pages of its own. */
function run(kernels: Kernels, rows: readonly Row[], x: Columns): Float32Array {
  const T = rows.length;
  const [a, b] = kernels.storePages(1 + T * pagesMax, [
    { use: 'shrink', dtype: 'f16', width: 64 },
    { use: 'expand', dtype: 'f16', width: 32 },
  ]) as [StoredTensor, StoredTensor];
  const stored = (name: string, shape: number[]): StoredTensor => {
    const tensor = kernels.store('f32', shape);
    kernels.write(tensor, new Uint8Array(Float32Array.from(bank[name]!.data).buffer), 0);
    return tensor;
  };
  const router = {
    query: stored('query', [5, 8]),
    summary: stored('summary', [8, 8]),
    context: stored('context', [5, 8]),
  };
  const atoms = stored('atoms', [6, 8, 8]);
  const inputs = tablesOf(kernels, rows, { a, b });
  using program = kernels.compile(
    (ops) => {
      const uses = ops.input('uses', 'i32', [T]);
      const pages = ops.input('pages', 'i32', [T, pagesMax]);
      const input = ops.input('x', 'f32', [T, 64]);
      const gate = ops.input('gates', 'f32', [T, ranksMax]);
      const [h] = ops.shrink(input, pages, [{ a, gate }], uses);
      const [kept] = ops.routeRanks(input, [h!], {
        uses,
        groups: ops.input('groups', 'i32', [T, pagesMax]),
        temperatures: ops.input('temperatures', 'f32', [T, pagesMax]),
        biases: [ops.input('bias', 'f32', [T, ranksMax])],
      });
      const weights = ops.routeAtoms(kept!, [], router, {
        uses,
        keys: ops.input('keys', 'f32', [T, 6, 5]),
        bias: ops.input('atomBias', 'f32', [T, 6]),
        topK: ops.input('atomTopK', 'i32', [T]),
      });
      const mixed = ops.mixRanks(kept!, atoms, weights);
      const zero = ops.mul(ops.input('y', 'f32', [T, 32]), ops.input('one', 'f32', [T, 32]));
      return { y: ops.expand(pages, [{ y: zero, h: mixed, b }])[0]! };
    },
    { segments: 0 },
  );
  const all = {
    ...inputs,
    x: Float32Array.from(x.data),
    y: new Float32Array(T * 32),
    one: new Float32Array(T * 32).fill(1),
  };
  for (const [name, data] of Object.entries(all)) program.write(name, data);
  program.run([]);
  const out = new Float32Array(T * 32);
  program.read('y', 0, out);
  return out;
}

function tablesOf(
  kernels: Kernels,
  rows: readonly Row[],
  pools: { a: StoredTensor; b: StoredTensor },
) {
  const T = rows.length;
  const tables = {
    uses: Int32Array.from({ length: T }, (_, t) => t),
    pages: new Int32Array(T * pagesMax),
    gates: new Float32Array(T * ranksMax),
    groups: new Int32Array(T * pagesMax),
    temperatures: new Float32Array(T * pagesMax),
    bias: new Float32Array(T * ranksMax),
    keys: new Float32Array(T * 30),
    atomBias: new Float32Array(T * 6),
    atomTopK: new Int32Array(T),
  };
  for (const [t, row] of rows.entries()) {
    const count = Math.ceil(row.a.columns / 8);
    for (let p = 0; p < count; p++) {
      const page = 1 + t * pagesMax + p;
      tables.pages[t * pagesMax + p] = page;
      for (const [pool, side] of [
        [pools.a, row.a],
        [pools.b, row.b],
      ] as const) {
        const halves = new Uint16Array(8 * side.rows);
        f32ToF16Bits(
          Float32Array.from(side.data.subarray(8 * p * side.rows, 8 * (p + 1) * side.rows)),
          halves,
        );
        kernels.writePage(pool, page, halves);
      }
      if (row.topK > 0) tables.groups[t * pagesMax + p] = p === 0 ? row.topK : -1;
    }
    tables.gates.set(row.gates, t * ranksMax);
    tables.bias.set(row.bias, t * ranksMax);
    tables.temperatures[t * pagesMax] = row.temperature;
    if (!row.atoms) continue;
    tables.keys.set(Float32Array.from(bank.keys!.data), t * 30);
    tables.atomBias.set(queryOptions.bias, t * 6);
    tables.atomTopK[t] = queryOptions.topK;
  }
  return tables;
}

describe.each(['reference', 'ggml'] as const)('families in one batch on %s', (name) => {
  it('every token gets its own adapter, as its family defines it, to 1e-5', async () => {
    using kernels = await createKernels(name, { threads: 1 });
    const rows = [...pairRows(), ...svfitRows(), ...routedRows()];
    const x = normalColumns(createRandom(70n), rows.length, 64);
    const inputs = { ...x, data: x.data.map(Math.fround) };
    const got = run(kernels, rows, inputs);
    for (const [t, row] of rows.entries()) {
      const token = columnsOf(inputs, t, 1);
      const plain = transposedTimes(row.a, token);
      const h = { ...plain, data: plain.data.map((value, i) => value * row.gates[i]!) };
      const wanted = times(row.b, row.expected(h, token)).data;
      const size = Math.max(...wanted.map(Math.abs));
      expect(size, row.name).toBeGreaterThan(1e-2);
      wanted.forEach((value, o) => {
        expect(Math.abs(got[t * 32 + o]! - value) / size, row.name).toBeLessThan(1e-5);
      });
    }
  });
});
