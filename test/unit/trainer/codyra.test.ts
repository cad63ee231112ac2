import { afterAll, describe, expect, it } from 'vitest';
import { transposedTimes } from '../../../src/adapters/families/matrices.ts';
import { createRandom } from '../../../src/adapters/families/seeded-random.ts';
import { svd, transpose } from '../../../src/adapters/orthogonal.ts';
import { generationOf, openPacked } from '../../../src/adapters/pack.ts';
import { GgmlKernels } from '../../../src/kernels/ggml/ggml-kernels.ts';
import type { Kernels } from '../../../src/kernels/kernels.ts';
import {
  gatedRows,
  keptRanks,
  openModules,
  shrinkGates,
  shrinkRanks,
  thresholdAt,
  throughGates,
} from '../../../src/trainer/codyra.ts';
import { familyGraph } from '../../../src/trainer/family-graph.ts';
import { FamilyTraining } from '../../../src/trainer/family-training.ts';
import { createAdamw } from '../../../src/trainer/optimizers/adam.ts';
import { type SessionOptions, TrainingSession } from '../../../src/trainer/session.ts';
import { normalColumns, testSite } from '../../support/family-site.ts';
import { ModuleProgram } from '../../support/module-program.ts';
import {
  backward,
  columnsOf,
  parameterOf,
  planted,
  productOf,
  squaredDistance,
} from '../../support/product-problem.ts';
import { createRng, normals } from '../../support/random.ts';
import { openTinyBase, tinyExamples, tinyRecipe } from '../../support/training-base.ts';

describe('shrinkGates', () => {
  it('is the minimum of ½(x − g)² + threshold·|x|', () => {
    const gates = Float64Array.of(-2, -0.3, -0.1, 0, 0.1, 0.3, 0.100001, 5);
    const before = gates.slice();
    shrinkGates(gates, 0.1);
    const wanted = [-1.9, -0.2, 0, 0, 0, 0.2, 0.000001, 4.9];
    gates.forEach((value, i) => {
      expect(Math.abs(value - wanted[i]!)).toBeLessThan(1e-12);
      const cost = (x: number): number => (x - before[i]!) ** 2 / 2 + 0.1 * Math.abs(x);
      for (const other of [value - 1e-4, value + 1e-4, 0, before[i]!]) {
        expect(cost(other)).toBeGreaterThanOrEqual(cost(value) - 1e-15);
      }
    });
  });

  it('a gate above the threshold lives on: it is not taken off twice', () => {
    const gates = Float64Array.of(0.15);
    shrinkGates(gates, 0.1);
    expect(gates[0]).toBeCloseTo(0.05, 12);
  });
});

describe('thresholdAt', () => {
  it('is zero in the dense phase, then rises in a line to the largest', () => {
    const options = { denseShare: 0.5, thresholdMax: 0.005 };
    const all = Array.from({ length: 500 }, (_, step) => thresholdAt(step, 500, options));
    expect(all.slice(0, 251).every((value) => value === 0)).toBe(true);
    expect(all.at(-1)).toBe(0.005);
    for (let step = 251; step < 500; step++) {
      expect(all[step]! - all[step - 1]!).toBeCloseTo(0.005 / 249, 12);
    }
    expect(thresholdAt(0, 1, options)).toBe(0);
  });
});

describe('gates', () => {
  it('gradients through them are those of differences', () => {
    const rng = createRng(1);
    const [b, gates, weights] = [normals(rng, 12), normals(rng, 3), normals(rng, 12)];
    // L = Σ w·(g ⊙ b)³
    const loss = (): number => {
      const gated = new Float32Array(12);
      gatedRows(b, gates, gated);
      return gated.reduce((sum, x, i) => sum + weights[i]! * x ** 3, 0);
    };
    const gated = new Float32Array(12);
    gatedRows(b, gates, gated);
    const out = { b: new Float32Array(12), gates: new Float32Array(3) };
    throughGates(
      { b, gates },
      gated.map((x, i) => 3 * weights[i]! * x * x),
      out,
    );
    for (const [values, got] of [
      [b, out.b],
      [gates, out.gates],
    ] as const) {
      values.forEach((value, i) => {
        values[i] = value + 1e-3;
        const above = loss();
        values[i] = value - 1e-3;
        const below = loss();
        values[i] = value;
        expect(got[i]!).toBeCloseTo((above - below) / 2e-3, 1);
      });
    }
  });

  it('what is left without the pruned ranks is the same, bit for bit', () => {
    const rng = createRng(2);
    const [a, b] = [normals(rng, 8 * 10), normals(rng, 8 * 6)];
    const gates = normals(rng, 8);
    shrinkGates(gates, 0.6);
    const kept = keptRanks(gates);
    expect(kept.length).toBeGreaterThan(1);
    expect(kept.length).toBeLessThan(8);
    for (let i = 1; i < kept.length; i++) {
      expect(Math.abs(gates[kept[i]!]!)).toBeLessThanOrEqual(Math.abs(gates[kept[i - 1]!]!));
    }
    const gated = new Float32Array(b.length);
    gatedRows(b, gates, gated);
    const rows = (x: Float32Array, order: readonly number[], width: number): Float32Array =>
      Float32Array.from(order.flatMap((r) => Array.from(x.subarray(r * width, (r + 1) * width))));
    const pair = (order: readonly number[]): Float64Array =>
      productOf({
        a: parameterOf('m.a', order.length, rows(a, order, 10)),
        b: parameterOf('m.b', order.length, rows(gated, order, 6)),
      });
    const pruned = [0, 1, 2, 3, 4, 5, 6, 7].filter((r) => !kept.includes(r));
    expect(pair(kept)).toEqual(pair([...kept, ...pruned]));
  });
});

describe('training with gates', () => {
  const [width, height, ranks] = [24, 20, 16];
  const adam = { name: 'adamw', beta1: 0.9, beta2: 0.9999, epsilon: 1e-8 } as const;

  /** 1,500 steps dense, then with a rising threshold; then the ranks that are left by themselves. Weight decay is what makes
   *  gates compete: without it B grows as its gate shrinks, and 4 to 8 are left of a planted 3. */
  function trained(noisy: Float64Array, seed: number): { left: number; error: number } {
    const rng = createRng(seed);
    const a = parameterOf('m.a', ranks, normals(rng, ranks * width, width ** -0.5));
    const b = parameterOf('m.b', ranks, new Float32Array(ranks * height));
    const g = parameterOf('m.g', 1, normals(rng, ranks));
    const gated = parameterOf('m.b', ranks, new Float32Array(ranks * height));
    const optimizer = createAdamw({ ...adam, weightDecay: 0.1 }, [a, b, g]);
    for (let step = 0; step < 1500; step++) {
      gatedRows(b.values, g.values, gated.values);
      backward(
        { a, b: gated },
        productOf({ a, b: gated }).map((x, i) => x - noisy[i]!),
      );
      const out = { b: b.gradient, gates: g.gradient };
      throughGates({ b: b.values, gates: g.values }, gated.gradient, out);
      optimizer.step([a, b, g], 0.01);
      shrinkGates(g.values, thresholdAt(step, 1500, { denseShare: 0.5, thresholdMax: 0.02 }));
    }
    gatedRows(b.values, g.values, gated.values);
    const kept = keptRanks(g.values);
    const rows = (x: Float32Array, size: number): Float32Array =>
      Float32Array.from(kept.flatMap((r) => Array.from(x.subarray(r * size, (r + 1) * size))));
    const pair = {
      a: parameterOf('m.a', kept.length, rows(a.values, width)),
      b: parameterOf('m.b', kept.length, rows(gated.values, height)),
    };
    const last = createAdamw({ ...adam, weightDecay: 0 }, [pair.a, pair.b]);
    for (let step = 0; step < 300; step++) {
      backward(
        pair,
        productOf(pair).map((x, i) => x - noisy[i]!),
      );
      last.step([pair.a, pair.b], 0.002);
    }
    return { left: kept.length, error: squaredDistance(productOf(pair), noisy) };
  }

  it('a planted rank of 3 leaves 3 gates of 16 in at least 9 of 10 seeds', () => {
    const results = Array.from({ length: 10 }, (_, seed) => {
      const { noisy } = planted(height, width, { rank: 3, noise: 0.02, seed: 100 + seed });
      const { sigma } = svd(columnsOf(noisy, height));
      const best = sigma.slice(3).reduce((sum, size) => sum + size * size, 0);
      const { left, error } = trained(noisy, seed);
      return { left, ratio: error / best };
    });
    expect(results.filter(({ left }) => left === 3).length).toBeGreaterThanOrEqual(9);
    for (const { left, ratio } of results) {
      if (left === 3) expect(ratio).toBeGreaterThan(1 - 1e-6); // No three ranks are nearer.
      expect(ratio).toBeLessThanOrEqual(1.05);
    }
  });
});

describe('a module with gates, as it is trained', () => {
  const [rank, rows] = [16, 64];
  const site = testSite({ in: 24, out: 20 });

  /** Ranks that are left of 16 when three have something to learn, by the graph, the optimiser and the steps of a session. */
  function left(kernels: Kernels, seed: number): number {
    const { noisy } = planted(site.out, site.in, { rank: 3, noise: 0.02, seed: 200 + seed });
    const goal = transpose(columnsOf(noisy, site.out)); // [in, out]
    const choice = { kind: 'gated-lora', rank, alpha: rank, rslora: false, order: 'svd' } as const;
    const random = createRandom(BigInt(seed));
    const tensors = familyGraph(choice).family.init(site, random);
    const training = new FamilyTraining(choice, [{ site, tensors }]);
    const { parameters } = training;
    using program = new ModuleProgram(kernels, site, training.delta, rows);
    const adam = { name: 'adamw', beta1: 0.9, beta2: 0.9999, epsilon: 1e-8 } as const;
    const optimizer = createAdamw({ ...adam, weightDecay: 0.1 }, parameters);
    const weight = site.weight();
    const wanted = { ...goal, data: goal.data.map((x, i) => x + weight.data[i]!) };
    const scales = new Array<number>(rank).fill(1);
    const steps = 1500;
    for (let step = 0; step < steps; step++) {
      const x = normalColumns(random, rows, site.in);
      program.write(parameters.map(({ name, values }) => [name, values] as const));
      const y = program.run(x, null, scales);
      const target = transposedTimes(wanted, x);
      const dy = y.data.map((value, i) => (value - target.data[i]!) / rows);
      program.run(x, { ...y, data: dy }, scales);
      for (const { name, gradient } of parameters) program.read(name, gradient);
      optimizer.step(parameters, 0.01);
      shrinkRanks(parameters, thresholdAt(step, steps, { denseShare: 0.5, thresholdMax: 0.02 }));
    }
    const [open] = openModules(training.modules());
    return open!.tensors.a!.columns;
  }

  it('finds a planted rank of 3', () => {
    using kernels = new GgmlKernels({ threads: 1 });
    expect([0, 1].map((seed) => left(kernels, seed))).toEqual([3, 3]);
  });
});

describe('a session with gates', async () => {
  const base = await openTinyBase();
  afterAll(() => base.kernels[Symbol.dispose]());
  const training = tinyExamples(16, 48);
  const breathe = async (): Promise<void> => {};
  const sessionOf = (more: object, over: Partial<SessionOptions> = {}): TrainingSession => {
    const step = { accumulation: 8, learningRate: 1e-2, schedule: 'constant', weightDecay: 0.1 };
    const recipe = tinyRecipe({ kind: 'lora', rank: 8, stepsMax: 60, ...step, ...more });
    return new TrainingSession({ base, recipe, training, heldOut: training, start: null, ...over });
  };
  const codyra = { kind: 'codyra', denseShare: 0.5, thresholdMax: 0.06 };

  it('publishes the ranks whose gates stayed open, unevenly, in the order of the gates', async () => {
    using session = sessionOf({ rankSelection: codyra });
    const losses: number[] = [];
    while (session.step < session.steps) losses.push((await session.takeStep(breathe)).loss);
    const gates = session.parameters.filter(({ name }) => name.endsWith('.g'));
    const counts = gates.map(({ values }) => keptRanks(values).length);
    expect(new Set(counts).size).toBeGreaterThan(2);
    const packed = session.publish();
    const { modules } = packed.manifest;
    expect(modules.map(({ rank }) => rank)).toEqual(counts.filter((count) => count > 0));
    const total = counts.reduce((sum, count) => sum + count, 0);
    expect(total).toBeLessThan(0.7 * 8 * 14);
    const byRank = await session.evaluate(packed, breathe);
    expect(losses.at(-1)).toBeLessThan(losses[0]! - 0.15);
    // Another step says what all the ranks, those that are gone as well, come to; every example is in it.
    const { loss } = await session.takeStep(breathe);
    expect(Math.abs(byRank.at(-1)!.loss - loss)).toBeLessThan(1e-3);
  });

  it('fails by name when every gate is closed', async () => {
    using session = sessionOf({ stepsMax: 4, rankSelection: { ...codyra, thresholdMax: 10 } });
    while (session.step < session.steps) await session.takeStep(breathe);
    expect(() => session.publish()).toThrow('closed every gate');
  });

  it('goes on from an adapter as it is served, its ranks with gates of 1', async () => {
    using first = sessionOf({ rank: 2, stepsMax: 20, weightDecay: 0 });
    while (first.step < first.steps) await first.takeStep(breathe);
    const { bytes } = first.publish();
    const start = openPacked(bytes, generationOf(bytes));
    using second = sessionOf({ rank: 4, rankSelection: codyra }, { start });
    const [before, after] = [
      (await first.evaluate(first.publish(), breathe)).at(-1)!.loss,
      (await second.evaluate(second.publish(), breathe)).at(-1)!.loss,
    ];
    expect(after).toBeCloseTo(before, 4);
    const gates = second.parameters.filter(({ name }) => name.endsWith('.g'));
    for (const { values } of gates) {
      expect(Array.from(values.subarray(0, 2))).toEqual([1, 1]);
      expect(values[2]).not.toBe(1);
    }
  });
});
