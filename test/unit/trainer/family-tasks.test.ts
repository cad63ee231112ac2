import { describe, expect, it } from 'vitest';
import type { Site, Tensors } from '../../../src/adapters/families/family.ts';
import { times, transposedTimes } from '../../../src/adapters/families/matrices.ts';
import { grownMora, mora } from '../../../src/adapters/families/mora.ts';
import { createRandom, type Random } from '../../../src/adapters/families/seeded-random.ts';
import { grownTriangular } from '../../../src/adapters/families/triangular.ts';
import type { Columns } from '../../../src/adapters/orthogonal.ts';
import { GgmlKernels } from '../../../src/kernels/ggml/ggml-kernels.ts';
import type { Kernels } from '../../../src/kernels/kernels.ts';
import type { TrainedDelta } from '../../../src/model/trained-delta.ts';
import { gatedRows, throughGates } from '../../../src/trainer/codyra.ts';
import { ModuleSearch } from '../../../src/trainer/diffora.ts';
import { type FamilyChoice, familyGraph } from '../../../src/trainer/family-graph.ts';
import { FamilyTraining } from '../../../src/trainer/family-training.ts';
import {
  createOptimizer,
  type Optimizer,
  type Parameter,
} from '../../../src/trainer/optimizers/optimizer.ts';
import { queryableConstants, queryableDelta } from '../../../src/trainer/queryable-graph.ts';
import { RankGrowth } from '../../../src/trainer/rank-growth.ts';
import { normalColumns, relativeError, testSite } from '../../support/family-site.ts';
import { ModuleProgram } from '../../support/module-program.ts';
import { type Batch, threeRegimes } from '../../support/three-regimes.ts';

// Tasks with known answers, learnt by the graphs on ggml in f32 with the trainer's own optimiser: algorithms.md sections 2, 3, 6, 18
// and 28.

const adamw = { name: 'adamw', beta1: 0.9, beta2: 0.999, epsilon: 1e-8, weightDecay: 0 } as const;

/** A module that learns what to add. */
class Learner implements Disposable {
  readonly parameters: readonly Parameter[];
  readonly program: ModuleProgram;
  readonly #site: Site;
  readonly #optimizer: Optimizer;
  readonly #gates: readonly number[];

  constructor(
    kernels: Kernels,
    site: Site,
    { delta, parameters, constants, rows, gates = [] }: LearnerParts,
  ) {
    this.parameters = parameters;
    this.#site = site;
    this.#gates = gates;
    this.program = new ModuleProgram(kernels, site, delta, rows);
    this.program.write(constants);
    this.#optimizer = createOptimizer(adamw, parameters);
  }

  #write(): void {
    this.program.write(this.parameters.map(({ name, values }) => [name, values] as const));
  }

  /** What the module adds. */
  added(x: Columns): Columns {
    this.#write();
    const y = this.program.run(x, null, this.#gates);
    const base = transposedTimes(this.#site.weight(), x);
    return { ...y, data: y.data.map((value, i) => value - base.data[i]!) };
  }

  /** Gradients of half the squared error a token. */
  compute({ x, target }: Batch): void {
    const y = this.added(x);
    const d = { ...y, data: y.data.map((value, i) => (value - target.data[i]!) / x.columns) };
    this.program.run(x, d, this.#gates);
    for (const { name, gradient } of this.parameters) this.program.read(name, gradient);
  }

  step(rate: number): void {
    this.#optimizer.step(this.parameters, rate);
  }

  error({ x, target }: Batch): number {
    return relativeError(this.added(x), target);
  }

  [Symbol.dispose](): void {
    this.program[Symbol.dispose]();
  }
}

interface LearnerParts {
  readonly delta: TrainedDelta;
  readonly parameters: readonly Parameter[];
  readonly constants: Iterable<readonly [string, ArrayLike<number>]>;
  readonly rows: number;
  readonly gates?: readonly number[];
}

function parameterOf(name: string, shape: readonly number[], values: Float32Array): Parameter {
  const columns = shape.at(-1)!;
  const gradient = new Float32Array(values.length);
  return { name, rows: values.length / columns, columns, values, gradient };
}

function learnerOf(
  kernels: Kernels,
  training: FamilyTraining,
  site: Site,
  { rows, gates = [] }: Pick<LearnerParts, 'rows' | 'gates'>,
): Learner {
  const { delta, parameters, constants } = training;
  return new Learner(kernels, site, { delta, parameters, constants, rows, gates });
}

describe('queryable', () => {
  const site = testSite({ in: 16, out: 16 });

  function learn(learner: Learner, draw: ReturnType<typeof threeRegimes>, steps: number): number {
    const random = createRandom(4n);
    for (let step = 0; step < steps; step++) {
      learner.compute(draw(random, 64));
      learner.step(0.02 * Math.min(1, (2 * (steps - step)) / steps));
    }
    const errors = Array.from({ length: 20 }, (_, i) =>
      learner.error(draw(createRandom(BigInt(50 + i)), 64)),
    );
    return errors.reduce((sum, error) => sum + error, 0) / errors.length;
  }

  it('learns three regimes with 224 numbers, which no LoRA of rank 16 does with 512', () => {
    using kernels = new GgmlKernels({ threads: 1 });
    const draw = threeRegimes(createRandom(6n));
    const options = {
      rank: 4,
      alpha: 4,
      atoms: 4,
      queryWidth: 4,
      topK: 4,
      blockLayers: 1,
      ...{ part: 'bank' as const, kept: 0, balance: 0, bias: null },
    };
    const delta = queryableDelta([site], options);
    const random = createRandom(8n);
    const numbers = new Map(
      Object.entries(delta.trained).map(([name, shape]) => {
        const count = shape.reduce((product, size) => product * size, 1);
        const values = Float32Array.from({ length: count }, (_, i) => {
          if (name.endsWith('.b')) return 0;
          if (name.endsWith('.a')) return (2 * random.uniform() - 1) / 4;
          if (name === 'atoms') return ((i % 16) % 5 === 0 ? 1 : 0) + 0.3 * random.normal();
          return random.normal() / (name === 'query' ? 2 : 1);
        });
        return [name, parameterOf(name, shape, values)] as const;
      }),
    );
    const parameters = [...numbers.values()];
    expect(parameters.reduce((sum, { values }) => sum + values.length, 0)).toBe(224);
    const constants = Object.entries(queryableConstants(options, 1)).map(
      ([name, { values }]) => [name, values] as const,
    );
    using routed = new Learner(kernels, site, { delta, parameters, constants, rows: 64 });
    expect(learn(routed, draw, 1400)).toBeLessThanOrEqual(0.05);

    const choice = { kind: 'lora', rank: 16, alpha: 16, rslora: false, order: 'svd' } as const;
    const start = familyGraph(choice).family.init(site, random);
    const training = new FamilyTraining(choice, [{ site, tensors: start }]);
    using plain = learnerOf(kernels, training, site, { rows: 64, gates: Array(16).fill(1) });
    expect(learn(plain, draw, 500)).toBeGreaterThanOrEqual(0.5);
  });
});

describe('mora', () => {
  const site = testSite({ in: 24, out: 20 });
  const options = { topK: 4, temperature: 0.1 };

  // Inputs of the first task are in the first half of the coordinates, of the second in the other.
  const inputs = (random: Random, count: number, task: 0 | 1): Columns => {
    const x = normalColumns(random, count, 24);
    return { ...x, data: x.data.map((v, i) => (Math.floor((i % 24) / 12) === task ? v : 0)) };
  };
  const maps = [11n, 12n].map((seed) => {
    const random = createRandom(seed);
    return { u: normalColumns(random, 3, 20), v: normalColumns(random, 3, 24, 0.3) };
  });
  const draw = (random: Random, task: 0 | 1): Batch => {
    const x = inputs(random, 64, task);
    return { x, target: times(maps[task]!.u, transposedTimes(maps[task]!.v, x)) };
  };

  function train(
    kernels: Kernels,
    frozen: number,
    tensors: Tensors,
    task: 0 | 1,
  ): {
    readonly tensors: Tensors;
    readonly errors: readonly number[];
  } {
    const choice: FamilyChoice = { kind: 'mora', rank: tensors.a!.columns, frozen, ...options };
    const training = new FamilyTraining(choice, [{ site, tensors }]);
    using learner = learnerOf(kernels, training, site, { rows: 64 });
    const random = createRandom(BigInt(13 + task));
    for (let step = 0; step < 700; step++) {
      learner.compute(draw(random, task));
      training.beforeStep();
      learner.step(0.03 * (1 - step / 700));
      training.afterStep({
        ...{ rows: 64, step: 1, steps: 1 },
        read: learner.program.read.bind(learner.program),
      });
    }
    const errors = ([0, 1] as const).map((of) => learner.error(draw(createRandom(15n), of)));
    return { tensors: training.modules()[0]!.tensors, errors };
  }

  it('learns a second task while the first keeps every byte and its error', () => {
    using kernels = new GgmlKernels({ threads: 1 });
    const none = mora({ rank: 0, frozen: 0, ...options }).init(site, createRandom(16n));
    const begun = grownMora(none, inputs(createRandom(15n), 100, 0), 8, createRandom(16n));
    const first = train(kernels, 0, begun, 0);
    expect(first.errors[0]).toBeLessThan(0.05);
    const grown = grownMora(first.tensors, inputs(createRandom(17n), 100, 1), 8, createRandom(18n));
    const second = train(kernels, 8, grown, 1);
    for (const name of ['a', 'b'] as const) {
      const own = first.tensors[name]!.data;
      expect(second.tensors[name]!.data.slice(0, own.length)).toEqual(own);
    }
    expect(second.errors[1]).toBeLessThan(0.05);
    expect(second.errors[0]! / first.errors[0]!).toBeLessThanOrEqual(1.01);
  });
});

describe('fly', () => {
  it('evens out how often ranks are chosen: variation at most 0.1 after 2000 steps', () => {
    using kernels = new GgmlKernels({ threads: 1 });
    const site = testSite({ in: 64, out: 8 });
    const choice = {
      kind: 'fly',
      rank: 32,
      topK: 8,
      alpha: 64,
      seed: 5n,
      score: 'abs_plus_bias',
    } as const;
    const { family } = familyGraph(choice);
    const training = new FamilyTraining(choice, [
      { site, tensors: family.init(site, createRandom(1n)) },
    ]);
    using program = new ModuleProgram(kernels, site, training.delta, 16);
    const read = (name: string, out: Float32Array): void => program.read(name, out);
    const random = createRandom(9n);
    const variation = (): number => {
      const counts = new Float64Array(32);
      const kept = new Float32Array(16 * 32);
      const source = createRandom(77n);
      for (let n = 0; n < 400; n++) {
        program.run(normalColumns(source, 16, 64));
        program.read('blk.0.attn_q.kept', kept);
        kept.forEach((share, i) => {
          if (share > 0) counts[i % 32]! += 1;
        });
      }
      const mean = counts.reduce((sum, count) => sum + count, 0) / 32;
      const square = counts.reduce((sum, count) => sum + (count - mean) ** 2, 0) / 32;
      return Math.sqrt(square) / mean;
    };
    program.write(training.constants);
    expect(variation()).toBeGreaterThan(0.2);
    for (let step = 0; step < 2000; step++) {
      program.run(normalColumns(random, 16, 64));
      training.afterStep({ rows: 16, read, step: 1, steps: 1 });
      program.write(training.moving.map((name) => [name, training.constants.get(name)!] as const));
    }
    expect(variation()).toBeLessThanOrEqual(0.1);
    expect(Math.max(...training.constants.get('blk.0.attn_q.d')!.map(Math.abs))).toBeLessThan(0.2);
  });
});

describe('triangular', () => {
  it('grows where the target has its energy, to the target within a quantum', () => {
    using kernels = new GgmlKernels({ threads: 1 });
    const random = createRandom(10n);
    const informative = [2, 5];
    const sites = Array.from({ length: 8 }, (_, block) => testSite({ in: 16, out: 14, block }));
    const maps = sites.map((_, i) =>
      normalColumns(random, 14, 16, informative.includes(i) ? 1 : 0.02),
    );
    const choice = { kind: 'triangular', rank: 4, alpha: 4 } as const;
    const { family } = familyGraph(choice);
    const growth = { rank: 4, rankMax: 32, quantum: 4, target: 64, interval: 20, warmupShare: 0 };
    const modules = sites.map((site) => {
      const tensors = grownTriangular(family.init(site, random), 28, random);
      const training = new FamilyTraining(choice, [{ site, tensors }]);
      return { training, learner: learnerOf(kernels, training, site, { rows: 16 }) };
    });
    const cores = modules.map(
      ({ learner }) => learner.parameters.find(({ columns }) => columns === 32)!,
    );
    const growing = new RankGrowth({ ...growth, curve: 'linear' }, cores);
    for (let step = 1; step <= 400; step++) {
      const before = growing.ranks.slice();
      modules.forEach(({ learner }, i) => {
        const x = normalColumns(random, 16, 16);
        learner.compute({ x, target: transposedTimes(maps[i]!, x) });
      });
      growing.hold('gradient');
      for (const { learner } of modules) learner.step(0.01);
      growing.hold('values');
      growing.look(step, 400);
      if (step % 20 !== 0) expect(growing.ranks).toEqual(before);
    }
    cores.forEach(({ values }, i) => {
      const on = growing.ranks[i]!;
      const outside = values.filter((_, at) => at % 32 >= on || Math.floor(at / 32) >= on);
      expect(outside.every((value) => value === 0)).toBe(true);
    });
    const total = growing.ranks.reduce((sum, rank) => sum + rank, 0);
    expect(total).toBe(64);
    const there = informative.reduce((sum, i) => sum + growing.ranks[i]! - 4, 0);
    expect(there / (total - 32)).toBeGreaterThanOrEqual(0.75);
    for (const { learner } of modules) learner[Symbol.dispose]();
  });
});

describe('diffora', () => {
  const count = 12;
  const sites = Array.from({ length: count }, (_, block) => testSite({ in: 8, out: 8, block }));
  const choice = { kind: 'lora', rank: 2, alpha: 2, rslora: false, order: 'svd' } as const;

  /** Which of twelve modules are kept when four have something to learn. */
  function search(kernels: Kernels, seed: number): { kept: number[]; planted: number[] } {
    const random = createRandom(BigInt(seed));
    const order = Array.from({ length: count }, (_, i) => i);
    const planted = Array.from(
      { length: 4 },
      () => order.splice(random.below(order.length), 1)[0]!,
    );
    const maps = sites.map((_, i) => ({
      u: normalColumns(random, 2, 8, planted.includes(i) ? 0.5 : 0),
      v: normalColumns(random, 2, 8, 0.5),
    }));
    // Noise that cannot be learnt, in every module.
    const draw = (i: number): Batch => {
      const x = normalColumns(random, 16, 8);
      const clean = times(maps[i]!.u, transposedTimes(maps[i]!.v, x));
      return { x, target: { ...clean, data: clean.data.map((v) => v + 0.5 * random.normal()) } };
    };
    const { family } = familyGraph(choice);
    const modules = sites.map((site) => {
      const training = new FamilyTraining(choice, [{ site, tensors: family.init(site, random) }]);
      const [a, b] = training.parameters as [Parameter, Parameter];
      // The decoder reads g·B.
      const shown = parameterOf(b.name, [b.rows, b.columns], new Float32Array(b.values.length));
      const parts = {
        delta: training.delta,
        constants: training.constants,
        rows: 16,
        gates: [1, 1],
      };
      const learner = new Learner(kernels, site, { ...parts, parameters: [a, shown] });
      return { a, b, shown, learner, optimizer: createOptimizer(adamw, [a, b]) };
    });
    const chosen = new ModuleSearch(count, 1);
    const optimizer = createOptimizer(adamw, [chosen.logits]);
    const compute = (): Float32Array[] => {
      const gates = chosen.gates();
      return modules.map(({ b, shown, learner }, i) => {
        const own = { b: b.values, gates: new Float32Array(2).fill(gates[i]!) };
        gatedRows(own.b, own.gates, shown.values);
        learner.compute(draw(i));
        const d = { b: b.gradient, gates: new Float32Array(2) };
        throughGates(own, shown.gradient, d);
        return d.gates;
      });
    };
    for (let step = 0; step < 40; step++) {
      compute();
      for (const { a, b, optimizer: own } of modules) own.step([a, b], 0.02);
      chosen.setGradient(compute()); // of other examples
      optimizer.step([chosen.logits], 0.02);
    }
    for (const { learner } of modules) learner[Symbol.dispose]();
    return { kept: chosen.kept(1 / 3), planted: planted.sort((i, j) => i - j) };
  }

  it('keeps exactly the four of twelve modules that have something to learn, in 9 of 10 seeds', () => {
    using kernels = new GgmlKernels({ threads: 1 });
    const right = Array.from({ length: 10 }, (_, seed) => search(kernels, seed)).filter(
      ({ kept, planted }) => kept.join() === planted.join(),
    );
    expect(right.length).toBeGreaterThanOrEqual(9);
  });

  it('keeps so many: the share of all, rounded up', () => {
    for (const [modules, ratio, kept] of [
      [210, 0.5, 105],
      [210, 1 / 3, 70],
      [7, 0.5, 4],
      [3, 0.01, 1],
      [5, 1, 5],
    ] as const) {
      expect(new ModuleSearch(modules, 1).kept(ratio).length).toBe(kept);
    }
  });

  it("has φ's slope through the sigmoid", () => {
    const chosen = new ModuleSearch(2, 0.5);
    chosen.logits.values.set([0.3, -1]);
    // Loss = 3·g₀ − 2·g₁, as two ranks each.
    chosen.setGradient([Float32Array.of(1, 2), Float32Array.of(-0.5, -1.5)]);
    const loss = (phi: readonly number[]): number => {
      const [g, h] = phi.map((value) => 1 / (1 + Math.exp(-value / 0.5)));
      return 3 * g! - 2 * h!;
    };
    const slopes = [0, 1].map((i) => {
      const at = (step: number): number =>
        loss([0.3, -1].map((value, j) => (j === i ? value + step : value)));
      return (at(1e-4) - at(-1e-4)) / 2e-4;
    });
    expect(chosen.logits.gradient[0]).toBeCloseTo(slopes[0]!, 5);
    expect(chosen.logits.gradient[1]).toBeCloseTo(slopes[1]!, 5);
  });
});
