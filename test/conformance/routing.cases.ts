// Cases of what rows choose themselves: which ranks stay, how atoms are mixed. States are inputs, so that every backend
// compares the same numbers; many of them are equal.

import { normals, type Rng } from '../support/random.ts';
import type { Fixture, KernelCase } from './kernels.suite.ts';

const sums = 1e-9; // f32 sums and exponentials in another order
const inner = 100; // of x, no multiple of a vector

/** [k, pages, temperature] of each group of a use; k = 0: pages that stay as they are. */
type Groups = ReadonlyArray<readonly [topK: number, pages: number, temperature: number]>;

const fly = 0;
/** Each fits 8 pages; smaller programs take the start. */
const useGroups: readonly Groups[] = [
  [],
  [[8, 4, fly]],
  [
    [1, 1, fly],
    [8, 1, fly],
    [4, 4, 0.1],
    [0, 1, fly],
    [3, 1, 1],
  ],
  [
    [1, 1, 0.1],
    [300, 1, fly],
    [32, 4, 0.5],
    [1, 2, fly],
  ],
  [
    [0, 2, fly],
    [5, 3, fly],
    [2, 3, 0.01],
  ],
  [[40, 8, 0.2]],
];
/** A continuation of nothing: those pages stay as they are. */
const strays = [-1, -1, 4, -1, 0, -1, 0, 2];

function rankTables(pages: number): { groups: Int32Array; temperatures: Float32Array } {
  const uses = useGroups.length + 1;
  const groups = new Int32Array(uses * pages);
  const temperatures = new Float32Array(uses * pages);
  groups.set(strays.slice(0, pages), (uses - 1) * pages);
  for (const [use, list] of useGroups.entries()) {
    let page = 0;
    for (const [topK, size, temperature] of list) {
      for (let i = 0; i < size && page < pages; i++, page++) {
        groups[use * pages + page] = topK > 0 && i > 0 ? -1 : topK;
        temperatures[use * pages + page] = temperature;
      }
    }
  }
  return { groups, temperatures };
}

/** Uses are mixed among the rows; row 0 has an input of zeros. */
function rankCase(pages: number, equals: boolean): KernelCase {
  const [rows, uses, ranks] = [33, useGroups.length + 1, pages * 8];
  const numbers = (rng: Rng, count: number): Float32Array =>
    equals ? Float32Array.from({ length: count }, () => rng.below(7) - 3) : normals(rng, count);
  return {
    name: `routeRanks, ${pages} pages of ${equals ? 'many equal' : 'different'} ranks`,
    nmse: sums,
    make: (rng): Fixture => {
      const tables = rankTables(pages);
      const bias = (): Float32Array =>
        numbers(rng, uses * ranks).map((value, i) =>
          tables.temperatures[Math.floor(i / 8)]! > 0 ? 0.5 + Math.abs(value) : value,
        );
      return {
        stored: {},
        inputs: {
          x: normals(rng, rows * inner).fill(0, 0, inner),
          h: numbers(rng, rows * ranks),
          g: numbers(rng, rows * ranks),
          uses: Int32Array.from({ length: rows }, (_, t) => (t === 0 ? 2 : rng.below(uses))),
          ...tables,
          bias: bias(),
          other: bias(),
        },
      };
    },
    build: (ops) => {
      const x = ops.input('x', 'f32', [rows, inner]);
      const hs = ['h', 'g'].map((name) => ops.input(name, 'f32', [rows, ranks]));
      const [h, g] = ops.routeRanks(x, hs, {
        uses: ops.input('uses', 'i32', [rows]),
        groups: ops.input('groups', 'i32', [uses, pages]),
        temperatures: ops.input('temperatures', 'f32', [uses, pages]),
        biases: ['bias', 'other'].map((name) => ops.input(name, 'f32', [uses, ranks])),
      });
      return { h: h!, g: g! };
    },
  };
}

interface AtomShape {
  readonly atoms: number; // K
  readonly mixed: number; // r
  readonly ranks: number; // R
  readonly queries: number; // dq
  readonly summaries: number;
}

/** Rows of uses with no atoms, one, two, all and more than there are; the first two atoms have the same key. */
function atomCase({ atoms, mixed, ranks, queries, summaries }: AtomShape): KernelCase {
  const topK = Int32Array.of(0, 1, 2, atoms, atoms + 3, 5);
  const [rows, uses] = [19, topK.length];
  return {
    name: `routeAtoms, ${atoms} atoms of ${mixed} among ${ranks} ranks, queries of ${queries}, ${summaries} summaries`,
    nmse: sums,
    make: (rng): Fixture => {
      const f32 = (...shape: number[]): Fixture['stored'][string] => {
        const values = normals(
          rng,
          shape.reduce((a, b) => a * b),
        );
        return { dtype: 'f32', shape, bytes: new Uint8Array(values.buffer) };
      };
      const keys = normals(rng, uses * atoms * queries);
      const bias = normals(rng, uses * atoms);
      for (let use = 0; use < uses; use++) {
        const first = use * atoms * queries;
        keys.copyWithin(first + queries, first, first + queries);
        bias[use * atoms + 1] = bias[use * atoms]!;
      }
      const past = Array.from({ length: summaries }, (_, i) => [
        `past${i}`,
        normals(rng, rows * ranks),
      ]);
      return {
        stored: {
          query: f32(queries, mixed),
          summary: f32(mixed, mixed),
          context: f32(queries, mixed),
          bank: f32(atoms, mixed, mixed),
        },
        inputs: {
          h: normals(rng, rows * ranks).fill(0, 0, ranks),
          uses: Int32Array.from({ length: rows }, () => rng.below(uses)),
          keys,
          bias,
          topK,
          ...Object.fromEntries(past),
        },
      };
    },
    build: (ops, { query, summary, context, bank }) => {
      const h = ops.input('h', 'f32', [rows, ranks]);
      const earlier = Array.from({ length: summaries }, (_, i) =>
        ops.input(`past${i}`, 'f32', [rows, ranks]),
      );
      const router = { query: query!, summary: summary!, context: context! };
      const weights = ops.routeAtoms(h, earlier, router, {
        uses: ops.input('uses', 'i32', [rows]),
        keys: ops.input('keys', 'f32', [uses, atoms, queries]),
        bias: ops.input('bias', 'f32', [uses, atoms]),
        topK: ops.input('topK', 'i32', [uses]),
      });
      return { weights, mixed: ops.mixRanks(h, bank!, weights) };
    },
  };
}

function mixCase(mixed: number, ranks: number): KernelCase {
  const [rows, atoms] = [5, 3];
  return {
    name: `mixRanks, ${mixed} of ${ranks} ranks`,
    nmse: 1e-5, // ggml's product of two f32 may round one to f16
    make: (rng): Fixture => ({
      stored: {
        bank: {
          dtype: 'f32',
          shape: [atoms, mixed, mixed],
          bytes: new Uint8Array(normals(rng, atoms * mixed * mixed).buffer),
        },
      },
      inputs: {
        h: normals(rng, rows * ranks),
        weights: Float32Array.from({ length: rows * (1 + atoms) }, () => rng.below(3) / 2),
      },
    }),
    build: (ops, { bank }) => ({
      y: ops.mixRanks(
        ops.input('h', 'f32', [rows, ranks]),
        bank!,
        ops.input('weights', 'f32', [rows, 1 + atoms]),
      ),
    }),
  };
}

export const routingCases: readonly KernelCase[] = [
  ...[1, 8, 32].flatMap((pages) => [rankCase(pages, false), rankCase(pages, true)]),
  ...Array.from({ length: 7 }, (_, summaries) =>
    atomCase({ atoms: 8, mixed: 8, ranks: 32, queries: 16, summaries }),
  ),
  atomCase({ atoms: 32, mixed: 16, ranks: 16, queries: 16, summaries: 5 }),
  atomCase({ atoms: 13, mixed: 5, ranks: 8, queries: 7, summaries: 1 }),
  atomCase({ atoms: 1, mixed: 8, ranks: 8, queries: 4, summaries: 0 }),
  mixCase(8, 8),
  mixCase(4, 32),
];
