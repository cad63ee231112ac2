import { describe, expect, it } from 'vitest';
import { forward, type Site, type Tensors } from '../../../src/adapters/families/family.ts';
import { transposedTimes } from '../../../src/adapters/families/matrices.ts';
import { createRandom } from '../../../src/adapters/families/seeded-random.ts';
import { type Columns, multiplyTransposed, transpose } from '../../../src/adapters/orthogonal.ts';
import { GgmlKernels } from '../../../src/kernels/ggml/ggml-kernels.ts';
import type { Kernels } from '../../../src/kernels/kernels.ts';
import { ReferenceKernels } from '../../../src/kernels/reference-kernels.ts';
import { TfjsKernels } from '../../../src/kernels/tfjs/tfjs-kernels.ts';
import { tensorName } from '../../../src/model/trained-delta.ts';
import {
  type FamilyChoice,
  familyGraph,
  type TrainedModule,
} from '../../../src/trainer/family-graph.ts';
import { FamilyTraining } from '../../../src/trainer/family-training.ts';
import { normalColumns, testSite, trainedTensors } from '../../support/family-site.ts';
import { ModuleProgram } from '../../support/module-program.ts';
import { loadForTest, whyNoTensorflow } from '../../support/tensorflow.ts';

// What a family is in training, on every backend, against what it is in f64: its output, the gradient of every number that it
// trains, and of its input.

const rows = 9;
const site = testSite({ in: 32, out: 20 }); // 32: our own linear takes it
const diag = { maxRank: 8, ranks: [1, 2, 8], scaling: 'sqrt', mask: 'diag', order: 'svd' } as const;
const flyOptions = { rank: 8, topK: 3, alpha: 16, seed: 7n, score: 'abs_plus_bias' } as const;
const experts = [
  { name: 'law', rank: 3 },
  { name: 'code', rank: 5 },
];
const choices: readonly FamilyChoice[] = [
  { kind: 'lora', rank: 5, alpha: 10, rslora: false, order: 'svd' },
  { kind: 'gated-lora', rank: 5, alpha: 10, rslora: false, order: 'svd' },
  { kind: 'matryoshka', ...diag },
  { kind: 'hydra', rank: 4, alpha: 8 },
  { kind: 'triangular', rank: 5, alpha: 8 },
  { kind: 'svfit', rank: 6 },
  { kind: 'salt', rank: 4, tailRank: 3 },
  { kind: 'flexmore', experts },
  { kind: 'fly', ...flyOptions },
  { kind: 'mora', rank: 8, topK: 3, temperature: 0.3, frozen: 0 },
  { kind: 'mora', rank: 8, topK: 3, temperature: 0.3, frozen: 3 },
];

const backends: Record<string, () => Kernels> = {
  reference: () => new ReferenceKernels(),
  ggml: () => new GgmlKernels({ threads: 1 }),
  'ggml, f32 activations': () => new GgmlKernels({ threads: 1, f32Activations: true }),
};
const missing = whyNoTensorflow('@tensorflow/tfjs-node');
if (missing === null) {
  const tensorflow = await loadForTest('@tensorflow/tfjs-node');
  backends.tfjs = () => new TfjsKernels(tensorflow);
}

/** Largest distance as a share of the norm. */
const distanceMax = 1e-5;

function distance(got: ArrayLike<number>, wanted: ArrayLike<number>): number {
  expect(got.length).toBe(wanted.length);
  const difference = Array.from(wanted, (value, i) => value - got[i]!);
  return Math.hypot(...difference) / Math.max(Math.hypot(...Array.from(wanted)), 1e-3);
}

/** Numbers as f32 has them: the graph begins with the same. */
function rounded(tensors: Tensors): Tensors {
  return Object.fromEntries(
    Object.entries(tensors).map(([name, x]) => [name, { ...x, data: x.data.map(Math.fround) }]),
  );
}

function sum(x: Columns, y: Columns): Float64Array {
  return x.data.map((value, i) => value + y.data[i]!);
}

describe.each(Object.keys(backends))('families in training on %s', (backend) => {
  for (const choice of choices) {
    const name = `${choice.kind}${choice.kind === 'mora' ? `, ${choice.frozen} frozen` : ''}`;
    it(`${name} is what its family says in f64`, () => {
      using kernels = backends[backend]!();
      const { family } = familyGraph(choice);
      const tensors = rounded(trainedTensors(family, site, createRandom(3n)));
      const training = new FamilyTraining(choice, [{ site, tensors }]);
      using program = new ModuleProgram(kernels, site, training.delta, rows);
      program.write(training.constants);
      program.write(training.parameters.map(({ name: of, values }) => [of, values] as const));
      const x = normalColumns(createRandom(4n), rows, site.in);
      const dy = normalColumns(createRandom(5n), rows, site.out);
      // Its own gates are trained; the batch has the scale.
      const isGated = choice.kind === 'gated-lora';
      const gates = isGated ? Array(5).fill(2) : family.pair(site, tensors, null).gates;
      const y = program.run(x, dy, gates);

      const wanted = forward(family, site, tensors, { x, rank: null });
      const back = wanted.gradient(dy);
      const base = transposedTimes(site.weight(), x);
      expect(distance(y.data, sum(base, wanted.y))).toBeLessThan(distanceMax);
      const throughBase = multiplyTransposed(site.weight(), transpose(dy));
      expect(distance(program.dx(), sum(throughBase, back.dx))).toBeLessThan(distanceMax);
      expect(training.parameters.map((each) => each.name)).toEqual(
        family.trained.map((each) => tensorName(site, each)),
      );
      for (const parameter of training.parameters) program.read(parameter.name, parameter.gradient);
      training.beforeStep();
      family.trained.forEach((each, i) => {
        const gradient = back.tensors[each]!.data;
        expect(Math.hypot(...gradient), each).toBeGreaterThan(0.1);
        expect(distance(training.parameters[i]!.gradient, gradient), each).toBeLessThan(
          distanceMax,
        );
      });
    });
  }
});

if (missing !== null) it.skip(`tfjs (skipped: ${missing})`, () => undefined);

describe('a family in training', () => {
  const start = (choice: FamilyChoice, where: Site = site): FamilyTraining => {
    const { family } = familyGraph(choice);
    return new FamilyTraining(choice, [
      { site: where, tensors: family.init(where, createRandom(6n)) },
    ]);
  };

  it.each(choices.map((choice) => [choice.kind, choice] as const))(
    'begins as nothing: %s',
    (_, choice) => {
      using kernels = new GgmlKernels({ threads: 1 });
      const training = start(choice);
      using program = new ModuleProgram(kernels, site, training.delta, rows);
      program.write(training.constants);
      program.write(training.parameters.map(({ name, values }) => [name, values] as const));
      const x = normalColumns(createRandom(7n), rows, site.in);
      const gates = new Float64Array(16).fill(1);
      const y = program.run(x, normalColumns(createRandom(8n), rows, site.out), gates);
      const base = transposedTimes(site.weight(), x);
      expect(distance(y.data, base.data)).toBeLessThan(1e-6);
      // And moves: some number has a gradient (algorithms.md section 3 on triangular).
      const sizes = training.parameters.map(({ name, gradient }) => {
        program.read(name, gradient);
        return Math.hypot(...gradient);
      });
      expect(Math.max(...sizes)).toBeGreaterThan(0.1);
    },
  );

  it('hands the numbers back as the family packs them', () => {
    const training = start({ kind: 'triangular', rank: 5, alpha: 8 });
    for (const { values } of training.parameters) values.set(values.map((v) => v + 0.25));
    const [{ tensors }] = training.modules() as [TrainedModule];
    const { a, b, c } = tensors;
    const begun = training.family.init(site, createRandom(6n));
    const moved = (of: Columns): Float64Array =>
      of.data.map((value) => Math.fround(Math.fround(value) + 0.25));
    expect([a!.data, b!.data, c!.data]).toEqual([begun.a!, begun.b!, begun.c!].map(moved));
    // All of C the same number: one rank.
    expect(training.family.serve(site, tensors).rank).toBe(1);
  });

  it('keeps every byte of frozen ranks, whatever the optimiser does to them', () => {
    const training = start({ kind: 'mora', rank: 8, topK: 3, temperature: 0.3, frozen: 3 });
    const before = training.parameters.map(({ values }) => values.slice());
    training.parameters.forEach(({ gradient, values }) => {
      gradient.fill(1);
      values.set(values.map((v) => v * 0.9 + 0.1));
    });
    training.beforeStep();
    training.afterStep({
      ...{ rows, step: 1, steps: 1 },
      read: () => expect.fail('nothing to see'),
    });
    training.parameters.forEach(({ values, gradient, columns }, i) => {
      const frozen = 3 * columns;
      expect(values.slice(0, frozen)).toEqual(before[i]!.slice(0, frozen));
      expect(values.slice(frozen)).not.toEqual(before[i]!.slice(frozen));
      expect(gradient.slice(0, frozen).every((g) => g === 0)).toBe(true);
      expect(gradient.slice(frozen).every((g) => g === 1)).toBe(true);
    });
  });

  it('moves the balance of fly by how often ranks were kept, and nothing else', () => {
    using kernels = new GgmlKernels({ threads: 1 });
    const training = start({ kind: 'fly', ...flyOptions });
    using program = new ModuleProgram(kernels, site, training.delta, rows);
    program.write(training.constants);
    const x = normalColumns(createRandom(9n), rows, site.in);
    program.run(x);
    const kept = new Float32Array(rows * 8);
    program.read('blk.0.attn_q.kept', kept);
    const counts = Array.from({ length: 8 }, (_, r) =>
      kept.reduce((all, share, i) => all + (i % 8 === r && share > 0 ? 1 : 0), 0),
    );
    expect(counts.reduce((all, count) => all + count, 0)).toBe(3 * rows);
    training.afterStep({
      ...{ rows, step: 1, steps: 1 },
      read: (name, out) => program.read(name, out),
    });
    expect(training.moving).toEqual(['blk.0.attn_q.d']);
    const mean = (3 * rows) / 8;
    const d = counts.map((count) => Math.fround(1e-3 * Math.sign(mean - count)));
    expect(Array.from(training.constants.get('blk.0.attn_q.d')!)).toEqual(d);
  });
});
