// One case per rule of the tape, of random small sizes: what the property test checks against central differences, and
// the conformance suite against the reference backend.

import { elementCount } from '../../src/kernels/check.ts';
import { causalMask } from '../../src/kernels/training-ops.ts';
import type { Differentiable, Leaf } from './differentiate.ts';
import { normals, type Rng } from './random.ts';

const leaf = (rng: Rng, shape: readonly number[], kind: Leaf['kind'] = 'input'): Leaf => {
  const values = normals(rng, elementCount(shape));
  if (kind.endsWith('pool')) values.fill(0, 0, elementCount(shape.slice(1)));
  return { kind, shape, values, trainable: true };
};
const frozen = (made: Leaf): Leaf => ({ ...made, trainable: false });
const below = (rng: Rng, count: number, limit: number): Int32Array =>
  Int32Array.from({ length: count }, () => rng.below(limit));
const size = (rng: Rng, max: number): number => 1 + rng.below(max);

function elementwise(rng: Rng): Differentiable[] {
  const shape = [size(rng, 5), 2 * size(rng, 6)];
  const pair = { a: leaf(rng, shape), b: leaf(rng, shape) };
  return [
    { name: 'add', leaves: pair, indices: {}, build: (ops, { a, b }) => [ops.add(a!, b!)] },
    { name: 'mul', leaves: pair, indices: {}, build: (ops, { a, b }) => [ops.mul(a!, b!)] },
    {
      name: 'a tensor used three times',
      leaves: pair,
      indices: {},
      build: (ops, { a, b }) => [ops.mul(ops.add(a!, a!), ops.mul(a!, b!))],
    },
    { name: 'swiglu', leaves: pair, indices: {}, build: (ops, { a, b }) => [ops.swiglu(a!, b!)] },
    {
      name: 'reshape',
      leaves: pair,
      indices: {},
      build: (ops, { a, b }) => [
        ops.mul(
          ops.reshape(a!, [shape[0]! * 2, shape[1]! / 2]),
          ops.reshape(b!, [shape[0]! * 2, shape[1]! / 2]),
        ),
      ],
    },
  ];
}

function products(rng: Rng): Differentiable[] {
  const [rows, inner, outer] = [size(rng, 7), size(rng, 9), size(rng, 9)];
  const x = leaf(rng, [rows, inner]);
  const w = leaf(rng, [outer, inner], 'stored');
  const wT = { ...leaf(rng, [inner, outer], 'stored'), trainable: false };
  for (let n = 0; n < outer; n++)
    for (let k = 0; k < inner; k++) wT.values[k * outer + n] = w.values[n * inner + k]!;
  return [
    {
      name: 'linear, weight trained',
      leaves: { x, w },
      indices: {},
      build: (ops, at) => [ops.linear(at.x!, at.w!)],
    },
    {
      name: 'linear, weight frozen, by its transposed copy',
      leaves: { x, w: frozen(w), wT },
      indices: {},
      transposed: { w: 'wT' },
      build: (ops, at) => [ops.linear(at.x!, at.w!)],
    },
    {
      name: 'linearT',
      leaves: { x, w: leaf(rng, [inner, outer], 'stored') },
      indices: {},
      build: (ops, at) => [ops.training.linearT(at.x!, at.w!)],
    },
    {
      name: 'rmsNorm',
      leaves: { x, w: leaf(rng, [inner], 'stored') },
      indices: {},
      // Of the size of x: next to a zero of x the function bends within √eps, which the differences' steps must resolve.
      build: (ops, at) => [ops.rmsNorm(at.x!, at.w!, 1)],
    },
  ];
}

/** Numbers of a row that are a whole step apart, and from 0: differences do not change which are largest, nor signs. */
function apart(rng: Rng, rows: number, width: number): Leaf {
  const values = Float32Array.from({ length: rows * width }, () => 0);
  for (let row = 0; row < rows; row++) {
    const order = Array.from({ length: width }, (_, i) => i + 1);
    for (let i = 0; i < width; i++) {
      const [place] = order.splice(rng.below(order.length), 1);
      const sign = rng.next() < 0.5 ? -1 : 1;
      values[row * width + i] = 0.5 * sign * (place! + 0.2 * rng.next());
    }
  }
  return { kind: 'input', shape: [rows, width], values, trainable: true };
}

function choices(rng: Rng): Differentiable[] {
  const [rows, width] = [size(rng, 5), 2 + rng.below(20)];
  const k = size(rng, width - 1);
  const x = apart(rng, rows, width);
  const values = leaf(rng, [rows, width]);
  const outer = size(rng, 6);
  const w = leaf(rng, [outer, width], 'stored');
  return [
    {
      name: 'the softmax of the largest',
      leaves: { x },
      indices: {},
      build: (ops, at) => [ops.training.softmaxTop(at.x!, k, 0.3)],
    },
    {
      name: 'the softmax of all',
      leaves: { x },
      indices: {},
      build: (ops, at) => [ops.training.softmaxTop(at.x!, width, 0.3)],
    },
    {
      name: 'numbers that the sizes of others choose',
      leaves: { x: frozen(x), values },
      indices: {},
      build: (ops, at) => {
        const sizes = ops.mul(at.x!, ops.training.sign(at.x!));
        return [ops.mul(ops.training.softmaxTop(sizes, k, 0), at.values!)];
      },
    },
    {
      name: 'sizes',
      leaves: { x },
      indices: {},
      build: (ops, at) => [ops.mul(at.x!, ops.training.sign(at.x!))],
    },
    {
      name: 'linear by a computed weight',
      leaves: { x: values, w, w2: leaf(rng, [outer, width], 'stored') },
      indices: {},
      build: (ops, at) => [ops.linear(at.x!, ops.mul(at.w!, at.w2!))],
    },
  ];
}

function lookups(rng: Rng): Differentiable[] {
  const [rows, width, picked] = [size(rng, 6), size(rng, 9), size(rng, 9)];
  const x = leaf(rng, [rows, width]);
  return [
    {
      name: 'embed',
      leaves: { table: leaf(rng, [rows, width], 'stored') },
      indices: { ids: below(rng, picked, rows) },
      build: (ops, { table, ids }) => [ops.embed(table!, ids!)],
    },
    {
      name: 'gatherRows',
      leaves: { x },
      indices: { rows: below(rng, picked, rows) },
      build: (ops, at) => [ops.gatherRows(at.x!, at.rows!)],
    },
    {
      name: 'crossEntropy',
      leaves: { x, weights: frozen(leaf(rng, [rows])) },
      indices: { targets: below(rng, rows, width) },
      build: (ops, { x: logits, targets, weights }) => [
        ops.training.crossEntropy(logits!, targets!, weights!),
      ],
    },
  ];
}

function attention(rng: Rng): Differentiable[] {
  const [windows, rows, kvHeads, headSize] = [
    size(rng, 3),
    size(rng, 6),
    size(rng, 2),
    2 * size(rng, 3),
  ];
  const heads = kvHeads * size(rng, 3);
  const tokens = windows * rows;
  let sequence = 0;
  const sequences = Int32Array.from({ length: tokens }, () =>
    rng.next() < 0.3 ? ++sequence : sequence,
  );
  const mask: Leaf = {
    kind: 'input',
    shape: [windows, rows, rows],
    values: causalMask(sequences, rows),
    trainable: false,
  };
  return [
    {
      name: 'attendSelf, several sequences in several windows',
      leaves: {
        q: leaf(rng, [tokens, heads, headSize]),
        k: leaf(rng, [tokens, kvHeads, headSize]),
        v: leaf(rng, [tokens, kvHeads, headSize]),
        mask,
      },
      indices: {},
      build: (ops, at) => [ops.training.attendSelf(at.q!, at.k!, at.v!, at.mask!)],
    },
    ...(['norm', 'neox'] as const).map(
      (style): Differentiable => ({
        name: `rope ${style}`,
        leaves: { x: leaf(rng, [tokens, heads, headSize]) },
        indices: { at: below(rng, tokens, 500) },
        build: (ops, { x, at }) => [
          ops.rope(x!, at!, { size: headSize > 2 ? headSize - 2 : 2, base: 1000, style }),
        ],
      }),
    ),
  ];
}

/** Rows of different ranks: pages that differ, repeat and are 0, gates that are 0 beyond a use's rank, which rows share. */
function lowRank(rng: Rng): Differentiable[] {
  const [rows, slots, inner, outer] = [1 + size(rng, 5), size(rng, 3), size(rng, 6), size(rng, 6)];
  const pool = 2 + rng.below(4);
  const count = size(rng, rows); // of uses
  const gate = (): Leaf => {
    const made = leaf(rng, [count, slots * 8]);
    for (let use = 0; use < count; use++) {
      const rank = use === 0 ? slots * 8 : rng.below(slots * 8 + 1);
      made.values.fill(0, use * slots * 8 + rank, (use + 1) * slots * 8);
    }
    return made;
  };
  const uses = below(rng, rows, count);
  uses[0] = 0;
  const pages = below(rng, rows * slots, pool);
  pages[0] = pool - 1; // something to learn in every case
  const a = (): Leaf => leaf(rng, [pool, 8, inner], 'shrink pool');
  const b = leaf(rng, [pool, 8, outer], 'expand pool');
  const x = leaf(rng, [rows, inner]);
  return [
    {
      name: 'shrink, two parts',
      leaves: { x, a1: a(), a2: a(), gate: gate(), gate2: gate() },
      indices: { pages, uses },
      build: (ops, at) => {
        const parts = [
          { a: at.a1!, gate: at.gate! },
          { a: at.a2!, gate: at.gate2! },
        ];
        return ops.shrink(at.x!, at.pages!, parts, at.uses!);
      },
    },
    {
      name: 'expand, two parts',
      leaves: {
        y: leaf(rng, [rows, outer]),
        y2: leaf(rng, [rows, outer]),
        b2: leaf(rng, [pool, 8, outer], 'expand pool'),
        h: leaf(rng, [rows, slots * 8]),
        b,
        gate: frozen(gate()), // tells the slots of a row
      },
      indices: { pages },
      // y must be computed by the program.
      build: (ops, at) =>
        ops.expand(at.pages!, [
          { y: ops.mul(at.y!, at.y!), h: at.h!, b: at.b! },
          { y: ops.mul(at.y2!, at.y2!), h: at.h!, b: at.b2! },
        ]),
    },
    {
      name: 'a whole delta with a mix of ranks',
      leaves: {
        x,
        a: a(),
        b,
        gate: gate(),
        w: frozen(leaf(rng, [outer, inner], 'stored')),
        atoms: leaf(rng, [2, slots * 8, slots * 8], 'stored'),
        weights: leaf(rng, [rows, 3]),
      },
      indices: { pages, uses },
      build: (ops, at) => {
        const parts = [{ a: at.a!, gate: at.gate! }];
        const [h] = ops.shrink(at.x!, at.pages!, parts, at.uses!);
        const mixed = ops.mixRanks(h!, at.atoms!, at.weights!);
        return ops.expand(at.pages!, [{ y: ops.linear(at.x!, at.w!), h: mixed, b: at.b! }]);
      },
    },
  ];
}

export function ruleCases(rng: Rng): Differentiable[] {
  return [elementwise, products, lookups, attention, lowRank, choices].flatMap((make) => make(rng));
}
