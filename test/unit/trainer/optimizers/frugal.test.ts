import { describe, expect, it } from 'vitest';
import { createAdamw } from '../../../../src/trainer/optimizers/adam.ts';
import {
  activeBlock,
  createFrugal,
  type FrugalOptions,
} from '../../../../src/trainer/optimizers/frugal.ts';
import { largestDifference, quadratic } from '../../../support/trainer-numbers.ts';

const adam = { beta1: 0.9, beta2: 0.999, epsilon: 1e-8, weightDecay: 0.05 } as const;
const options: FrugalOptions = {
  name: 'frugal',
  ...adam,
  density: 0.25,
  gap: 10,
  inactiveLrScale: 1,
  order: 'cyclic',
  seed: 3,
};

describe('frugal', () => {
  it('of density 1 is adamw, also when a turn ends', () => {
    const [one, other] = [quadratic(), quadratic()];
    one.run(createFrugal({ ...options, density: 1 }, one.parameters), 0, 50);
    other.run(createAdamw({ name: 'adamw', ...adam }, other.parameters), 0, 50);
    expect(largestDifference(one.values(), other.values())).toBeLessThanOrEqual(1e-7);
  });

  it('of density 0 is signed descent, and has no state', () => {
    const { parameters, run, values } = quadratic();
    const optimizer = createFrugal({ ...options, density: 0, inactiveLrScale: 0.5 }, parameters);
    expect(optimizer.stateBytes).toBe(0);
    const by = quadratic();
    const signs = {
      ...optimizer,
      step: (current: typeof by.parameters, learningRate: number) => {
        for (const { values: x, gradient } of current) {
          x.forEach((value, i) => {
            x[i] = value * (1 - learningRate * 0.05) - 0.5 * learningRate * Math.sign(gradient[i]!);
          });
        }
      },
    };
    run(optimizer, 0, 50);
    by.run(signs as typeof optimizer, 0, 50);
    expect(largestDifference(values(), by.values())).toBeLessThanOrEqual(1e-7);
  });

  it.each([0.1, 0.25, 0.5])('of density %d has that share of adamw’s state', (density) => {
    const shapes = [
      { name: 'x', rows: 100, columns: 301 },
      { name: 'y', rows: 7, columns: 11 },
    ];
    const bytes = createFrugal({ ...options, density }, shapes).stateBytes;
    expect(Math.abs(bytes / (density * 8 * (30_100 + 77)) - 1)).toBeLessThan(0.01);
  });

  /** Which numbers did not move by the sign of their gradient in a step. */
  function activeIn(optimizer: ReturnType<typeof createFrugal>): boolean[] {
    const parameters = quadratic().parameters;
    for (const { gradient } of parameters) gradient.fill(1e-20);
    optimizer.step(parameters, 0.01);
    const before = quadratic().values();
    // With so small a gradient Adam's step is nothing, and the sign's is the learning rate.
    return parameters
      .flatMap(({ values }) => Array.from(values))
      .map((value, i) => Math.abs(value - before[i]! * (1 - 0.01 * 0.05)) < 1e-4);
  }

  it.each([0.25, 0.3, 0.07])(
    'of density %d gives every number moments within a round',
    (density) => {
      const optimizer = createFrugal({ ...options, density, gap: 1 }, quadratic().parameters);
      const turns = Math.ceil(1 / density);
      const rounds = [0, 1, 2].map(() => Array.from({ length: turns }, () => activeIn(optimizer)));
      for (const round of rounds) {
        const visits = round[0]!.map((_, i) => round.filter((active) => active[i]).length);
        expect(visits.every((count) => count === 1 || count === 2)).toBe(true);
      }
    },
  );

  it('draws blocks by its seed', () => {
    const draws = (seed: number): number[] =>
      Array.from({ length: 40 }, (_, turn) => activeBlock({ order: 'random', seed }, 5, turn));
    expect(draws(1)).toEqual(draws(1));
    expect(draws(1)).not.toEqual(draws(2));
    expect(new Set(draws(1)).size).toBe(5);
  });

  it('starts a block anew when its turn comes', () => {
    // One block's moments must not be the next one's: with a gap of 1 each active step is a first step of Adam's, of the
    // size of the learning rate.
    const { parameters } = quadratic();
    const optimizer = createFrugal({ ...options, gap: 1, weightDecay: 0 }, parameters);
    for (let t = 0; t < 8; t++) {
      const before = parameters.flatMap(({ values }) => Array.from(values));
      for (const { gradient } of parameters) gradient.fill(10 ** (t - 4));
      optimizer.step(parameters, 0.01);
      const after = parameters.flatMap(({ values }) => Array.from(values));
      for (const [i, value] of after.entries()) {
        expect(Math.abs(before[i]! - value - 0.01)).toBeLessThan(2e-4);
      }
    }
  });
});
