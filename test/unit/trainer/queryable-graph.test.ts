import { expect, it } from 'vitest';
import { mixAtoms, routeAtoms } from '../../../src/adapters/families/atom-routing.ts';
import type { Tensors } from '../../../src/adapters/families/family.ts';
import { added, scaled, times, transposedTimes } from '../../../src/adapters/families/matrices.ts';
import { routerOf } from '../../../src/adapters/families/queryable.ts';
import { createRandom } from '../../../src/adapters/families/seeded-random.ts';
import { type Columns, multiplyTransposed } from '../../../src/adapters/orthogonal.ts';
import { Tape } from '../../../src/kernels/autodiff.ts';
import { elementCount } from '../../../src/kernels/check.ts';
import { GgmlKernels } from '../../../src/kernels/ggml/ggml-kernels.ts';
import { tensorName } from '../../../src/model/trained-delta.ts';
import { queryableConstants, queryableDelta } from '../../../src/trainer/queryable-graph.ts';
import { normalColumns, numericGradient, sumOfProducts } from '../../support/family-site.ts';
import { bytesOfNumbers } from '../../support/module-program.ts';

// Four groups of one block, each with an input of its own, against the f64 definition of routing (atom-routing.ts): what all
// groups share, and what goes back through the summaries of earlier ones.

const [rows, groups, width] = [7, 4, 16];
const options = {
  ...{ rank: 4, alpha: 8, atoms: 5, queryWidth: 3, topK: 2, blockLayers: 1 },
  ...{ part: 'bank' as const, kept: 0, balance: 0, bias: null },
} as const;
const scale = options.alpha / options.rank;
const random = createRandom(31n);
const rounded = (x: Columns): Columns => ({ ...x, data: x.data.map(Math.fround) });
const shared: Tensors = {
  keys: rounded(normalColumns(random, 5, 3)),
  atoms: rounded(normalColumns(random, 20, 4, 0.5)),
  query: rounded(normalColumns(random, 3, 4)),
  summary: rounded(normalColumns(random, 4, 4)),
  context: rounded(normalColumns(random, 3, 4)),
};
const places = Array.from({ length: groups }, (_, block) => ({
  ...{ block, projection: 'attn_q' as const, in: width, out: width },
}));
const blocks = Array.from({ length: groups }, () => ({
  x: rounded(normalColumns(random, rows, width)),
  dy: rounded(normalColumns(random, rows, width)),
  a: rounded(normalColumns(random, 4, width, 0.25)),
  b: rounded(normalColumns(random, 4, width)),
}));

type Bias = readonly number[] | null;
const biases: readonly Bias[] = [null, [0.4, -0.3, 0, 0.8, -1]];

/** What each group adds, and every gradient, in f64. */
function defined(bias: Bias): { readonly ys: Columns[]; readonly gradients: Map<string, Columns> } {
  const router = routerOf(shared, { ...options, earlierBlocks: true, bias });
  const summaries: Columns[] = [];
  const passes = blocks.map(({ x, a, b }) => {
    const h = transposedTimes(a, x);
    const routed = routeAtoms(h, [...summaries], router);
    const mix = mixAtoms(h, shared.atoms!, routed.weights);
    summaries.push(mix.g);
    return { routed, mix, y: scaled(times(b, mix.g), scale) };
  });
  const gradients = new Map<string, Columns>();
  const add = (name: string, d: Columns): void => {
    const sum = gradients.get(name);
    gradients.set(name, sum === undefined ? d : added(sum, d));
  };
  for (let block = groups - 1; block >= 0; block--) {
    const { x, dy, a, b } = blocks[block]!;
    const { routed, mix } = passes[block]!;
    const module = { block, projection: 'attn_q' } as const;
    add(`s${block}`, scaled(transposedTimes(b, dy), scale));
    add(tensorName(module, 'b'), scaled(multiplyTransposed(dy, mix.g), scale));
    const back = mix.gradient(gradients.get(`s${block}`)!);
    const through = routed.gradient(back.weights);
    add('atoms', back.atoms);
    for (const [name, d] of Object.entries(through.tensors)) add(name, d);
    through.earlier.forEach((d, j) => {
      add(`s${j}`, d);
    });
    const dh = added(back.dh, through.dh);
    add(tensorName(module, 'a'), multiplyTransposed(x, dh));
    add(`x${block}`, times(a, dh));
  }
  return { ys: passes.map(({ y }) => y), gradients };
}

it.each(biases)('the definition has the slopes of central differences: prior %j', (bias) => {
  const loss = (): number =>
    defined(bias).ys.reduce((sum, y, block) => sum + sumOfProducts(y, blocks[block]!.dy), 0);
  const { gradients } = defined(bias);
  const own = blocks.flatMap(({ x, a, b }, block): [string, Columns][] => {
    const module = { block, projection: 'attn_q' } as const;
    return [
      [tensorName(module, 'a'), a],
      [tensorName(module, 'b'), b],
      [`x${block}`, x],
    ];
  });
  for (const [name, { data }] of [...Object.entries(shared), ...own]) {
    const got = gradients.get(name)!.data;
    const size = Math.max(...got.map(Math.abs));
    expect(size, name).toBeGreaterThan(1e-2);
    for (let i = 0; i < data.length; i += name.includes('.') ? 5 : 1) {
      const wanted = numericGradient(loss, data, i);
      expect(Math.abs(got[i]! - wanted), `${name}[${i}]`).toBeLessThan(1e-5 * size);
    }
  }
});

it.each(biases)('routes, looks back and learns as it is defined: prior %j', (bias) => {
  const own = { ...options, bias };
  using kernels = new GgmlKernels({ threads: 1 });
  const delta = queryableDelta(places, own);
  const stored = new Map(
    Object.entries({ ...delta.trained, ...delta.constants }).map(([name, shape]) => [
      name,
      kernels.store('f32', shape),
    ]),
  );
  const write = (name: string, values: ArrayLike<number>): void => {
    kernels.write(stored.get(name)!, bytesOfNumbers(values), 0);
  };
  for (const [name, { data }] of Object.entries(shared)) write(name, data);
  for (const [name, { values }] of Object.entries(queryableConstants(own, groups))) {
    write(name, values);
  }
  blocks.forEach(({ a, b }, block) => {
    write(tensorName({ block, projection: 'attn_q' }, 'a'), a.data);
    write(tensorName({ block, projection: 'attn_q' }, 'b'), b.data);
  });
  const names = Object.keys(delta.trained);
  using program = kernels.compile(
    (ops) => {
      const xs = blocks.map((_, i) => ops.input(`x of ${i}`, 'f32', [rows, width]));
      const trainable = [...names.map((name) => stored.get(name)!), ...xs];
      const tape = new Tape(ops, { trainable, transposed: new Map() });
      const ys = xs.map((x, block) =>
        delta.add(tape, (name) => stored.get(name)!, {
          ...{ block, projection: 'attn_q', x, y: tape.training.fill([rows, width], 0) },
          gate: () => expect.fail('queryable has no gate'),
          observe: () => undefined,
        }),
      );
      const seeds = ys.map((of, i) => ({ of, gradient: ops.input(`dy${i}`, 'f32', of.shape) }));
      const gradients = tape.gradients(seeds, trainable);
      const named = [...names, ...xs.map((_, i) => `x${i}`)].map((name, i) => [
        name,
        gradients[i]!,
      ]);
      return Object.fromEntries([...named, ...ys.map((y, i) => [`y${i}`, y])]);
    },
    { segments: 0 },
  );
  blocks.forEach(({ x, dy }, i) => {
    program.write(`x of ${i}`, Float32Array.from(x.data));
    program.write(`dy${i}`, Float32Array.from(dy.data));
  });
  program.run([]);
  const { ys, gradients } = defined(bias);
  const compare = (name: string, wanted: Columns): void => {
    const got = new Float32Array(wanted.data.length);
    program.read(name, 0, got);
    const size = Math.hypot(...wanted.data);
    expect(size, name).toBeGreaterThan(1e-2);
    const away = Math.hypot(...wanted.data.map((value, i) => value - got[i]!));
    expect(away / size, name).toBeLessThan(1e-5);
  };
  ys.forEach((y, i) => {
    compare(`y${i}`, y);
  });
  expect(names.every((name) => gradients.has(name))).toBe(true);
  for (const name of [...names, 'x0', 'x1', 'x2', 'x3']) compare(name, gradients.get(name)!);
  expect(elementCount(delta.trained.atoms!)).toBe(shared.atoms!.data.length);
});
