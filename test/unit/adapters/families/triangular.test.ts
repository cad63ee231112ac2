import { describe, expect, it } from 'vitest';
import type { Tensors } from '../../../../src/adapters/families/family.ts';
import { times, transposedTimes } from '../../../../src/adapters/families/matrices.ts';
import { createRandom, type Random } from '../../../../src/adapters/families/seeded-random.ts';
import {
  chooseGrowth,
  coreSize,
  type GrowthSchedule,
  grownTriangular,
  modulesToGrow,
  triangular,
} from '../../../../src/adapters/families/triangular.ts';
import type { Columns } from '../../../../src/adapters/orthogonal.ts';
import {
  createAdam,
  largestDifference,
  normalColumns,
  pass,
  testSite,
  trainedTensors,
} from '../../../support/family-site.ts';

// algorithms.md section 3.

const site = testSite({ in: 16, out: 14 });
const family = triangular({ rank: 4, alpha: 8 });
const x = normalColumns(createRandom(1n), 6, 16);

describe('triangular', () => {
  it('counts the diagonal of its two triangles once', () => {
    const tensors = trainedTensors(family, site, createRandom(2n));
    const triangle = (keep: (row: number, column: number) => boolean): Columns => ({
      ...tensors.c!,
      data: tensors.c!.data.map((value, i) => (keep(Math.floor(i / 4), i % 4) ? value : 0)),
    });
    const part = (c: Columns): Float64Array => pass(family, site, { ...tensors, c }, x).y.data;
    const upper = part(triangle((row, column) => column > row));
    const lower = part(triangle((row, column) => column <= row));
    const whole = pass(family, site, tensors, x).y.data;
    expect(
      largestDifference(
        upper.map((value, i) => value + lower[i]!),
        whole,
      ),
    ).toBeLessThan(1e-10);
  });

  it('is α/(r + 1e-5)·B·C·A, row i of C in column i', () => {
    const tensors = trainedTensors(family, site, createRandom(3n));
    const h = transposedTimes(tensors.a!, x);
    const core = transposedTimes(tensors.c!, h);
    const wanted = times(tensors.b!, core).data.map((value) => (value * 8) / (4 + 1e-5));
    expect(largestDifference(pass(family, site, tensors, x).y.data, wanted)).toBeLessThan(1e-12);
  });

  it('starts as nothing, and moves: the first gradient of C is not 0', () => {
    const tensors = family.init(site, createRandom(4n));
    const { y, gradient } = pass(family, site, tensors, x);
    expect(y.data.every((value) => value === 0)).toBe(true);
    const first = gradient(normalColumns(createRandom(5n), 6, 14)).tensors;
    expect(Math.hypot(...first.c!.data)).toBeGreaterThan(0.1);
    // A step on C, and A and B move as well.
    createAdam(tensors, ['c'], 0.1)(first);
    const second = pass(family, site, tensors, x).gradient(y).tensors;
    expect(Math.hypot(...second.a!.data)).toBe(0); // y was 0: no error, no gradient.
    const pushed = pass(family, site, tensors, x).gradient(normalColumns(createRandom(6n), 6, 14));
    expect(Math.hypot(...pushed.tensors.a!.data)).toBeGreaterThan(0.1);
    expect(Math.hypot(...pushed.tensors.b!.data)).toBeGreaterThan(0.1);
  });

  it('grows without changing what it computes, and the new ranks can move', () => {
    const tensors = trainedTensors(family, site, createRandom(7n));
    const grown = grownTriangular(tensors, 2, createRandom(8n));
    expect([grown.a!.columns, grown.c!.columns, grown.c!.rows, grown.b!.columns]).toEqual([
      6, 6, 6, 6,
    ]);
    const [before, after] = [pass(family, site, tensors, x), pass(family, site, grown, x)];
    expect(after.y.data).toEqual(before.y.data);
    const { c } = after.gradient(normalColumns(createRandom(9n), 6, 14)).tensors;
    for (const i of [4, 5]) {
      expect(Math.hypot(...c!.data.subarray(i * 6, i * 6 + 6))).toBeGreaterThan(0.1);
    }
  });
});

describe("triangular's growth", () => {
  const schedule: GrowthSchedule = {
    curve: 'linear',
    target: 64,
    quantum: 4,
    warmUpSteps: 100,
    steps: 1100,
  };

  it('follows the closed form of its curve', () => {
    const at = (curve: 'linear' | 'exp', step: number, total: number): number =>
      modulesToGrow({ ...schedule, curve, quantum: 1 }, { step, total, modules: 1000 });
    for (const [step, total] of [
      [100, 32],
      [350, 32],
      [600, 40],
      [1100, 50],
      [5000, 50],
      [0, 32],
    ] as const) {
      const u = Math.min(1, Math.max(0, (step - 100) / 1000));
      expect(at('linear', step, total)).toBe(Math.trunc((64 - total) * u));
      expect(at('exp', step, total)).toBe(
        Math.trunc(((64 - total) * (Math.exp(u) - 1)) / (Math.E - 1) + 1e-12),
      );
    }
    expect(at('linear', 600, 32)).toBe(16);
    expect(at('exp', 600, 32)).toBe(12); // 32 · (√e − 1)/(e − 1) = 12.08
  });

  it.each(['linear', 'exp'] as const)('ends within one quantum of its target (%s)', (curve) => {
    for (const [modules, quantum, interval] of [
      [8, 4, 20],
      [8, 4, 100],
      [5, 3, 10],
      [210, 4, 50],
    ] as const) {
      const plan = { curve, target: modules * 8, quantum, warmUpSteps: 100, steps: 1100 };
      let total = modules * 4;
      for (let step = 0; step <= 1100; step += interval) {
        total += quantum * modulesToGrow(plan, { step, total, modules });
        expect(total).toBeLessThanOrEqual(plan.target);
      }
      expect(plan.target - total).toBeLessThan(quantum);
    }
  });

  it('takes the largest scores, of equal ones the first', () => {
    expect(chooseGrowth([0.1, 0.5, 0.5, 0.9, 0], 2)).toEqual([1, 3]);
    expect(chooseGrowth([0, 0, 0], 2)).toEqual([0, 1]);
    expect(chooseGrowth([0, 0, 0], 0)).toEqual([]);
  });

  it('puts at least 75 % of the new ranks where the target has its energy: 2 of 8 modules', () => {
    const random = createRandom(10n);
    const informative = [2, 5];
    const sites = Array.from({ length: 8 }, (_, block) => testSite({ in: 16, out: 14, block }));
    // Everywhere noise, in two modules a map of full rank.
    const maps = sites.map((_, block) =>
      normalColumns(random, 14, 16, informative.includes(block) ? 1 : 0.02),
    );
    const { added, total } = growAll({ sites, maps, random });
    const there = informative.reduce((sum, block) => sum + added[block]!, 0);
    expect(total).toBe(64);
    expect(there / (total - 32)).toBeGreaterThanOrEqual(0.75);
  });

  interface Growing {
    readonly sites: readonly ReturnType<typeof testSite>[];
    readonly maps: readonly Columns[];
    readonly random: Random;
  }

  function growAll({ sites, maps, random }: Growing): { added: number[]; total: number } {
    const kind = triangular({ rank: 4, alpha: 4 });
    const modules = sites.map((where) => startModule(kind.init(where, random)));
    const added = sites.map(() => 0);
    let total = 32;
    for (let step = 1; step <= 640; step++) {
      for (const [i, module] of modules.entries()) {
        const inputs = normalColumns(random, 16, 16);
        const target = transposedTimes(maps[i]!, inputs);
        const { y, gradient } = pass(kind, sites[i]!, module.tensors, inputs);
        const d = { ...y, data: y.data.map((value, n) => (value - target.data[n]!) / 16) };
        module.adam(gradient(d).tensors);
      }
      if (step % 20 !== 0) continue;
      const scores = modules.map(({ tensors, before }) => coreSize(tensors) - before);
      const plan = { curve: 'linear', target: 64, quantum: 4, warmUpSteps: 0, steps: 640 } as const;
      const grows = chooseGrowth(scores, modulesToGrow(plan, { step, total, modules: 8 }));
      for (const i of grows) {
        modules[i] = startModule(grownTriangular(modules[i]!.tensors, 4, random));
        added[i]! += 4;
        total += 4;
      }
      for (const module of modules) module.before = coreSize(module.tensors);
    }
    return { added, total };
  }

  function startModule(tensors: Tensors) {
    return { tensors, before: coreSize(tensors), adam: createAdam(tensors, ['a', 'c', 'b'], 0.01) };
  }
});
