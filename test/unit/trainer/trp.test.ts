import { describe, expect, it } from 'vitest';
import { svd } from '../../../src/adapters/orthogonal.ts';
import { orthonormal } from '../../../src/adapters/randomized-svd.ts';
import { outside } from '../../../src/trainer/coso.ts';
import { createAdamw } from '../../../src/trainer/optimizers/adam.ts';
import { addNuclearGradient, ranksOfEnergy, truncateProduct } from '../../../src/trainer/trp.ts';
import {
  backward,
  columnsOf,
  type Pair,
  parameterOf,
  planted,
  productOf,
  squaredDistance,
} from '../../support/product-problem.ts';
import { createRng, normals } from '../../support/random.ts';
import { doubles, largestDifference, trainerNumbers } from '../../support/trainer-numbers.ts';

const adam = { name: 'adamw', beta1: 0.9, beta2: 0.999, epsilon: 1e-8, weightDecay: 0 } as const;
const [width, height] = [40, 36];

function pairOf(rank: number, seed: number, bScale: number): Pair {
  const rng = createRng(seed);
  return {
    a: parameterOf('m.a', rank, normals(rng, rank * width, width ** -0.5)),
    b: parameterOf('m.b', rank, normals(rng, rank * height, bScale)),
  };
}
function spectrum(pair: Pair): Float64Array {
  return svd(columnsOf(productOf(pair), height)).sigma;
}

describe('ranksOfEnergy', () => {
  it.each(trainerNumbers.spectra)("is numpy's on random spectra", ({ sigma, ranks }) => {
    for (const [energy, rank] of Object.entries(ranks)) {
      expect(ranksOfEnergy(doubles(sigma), Number(energy))).toBe(rank);
    }
  });

  it('needs all for everything, and none for nothing', () => {
    expect(ranksOfEnergy(Float64Array.of(3, 1e-30, 0), 1)).toBe(3);
    expect(ranksOfEnergy(Float64Array.of(0, 0), 0.9)).toBe(1);
  });
});

describe('truncateProduct', () => {
  it('is the nearest product of that rank, and leaves A alone', () => {
    const pair = pairOf(8, 1, 0.3);
    const before = { a: pair.a.values.slice(), sigma: spectrum(pair), product: productOf(pair) };
    const rank = truncateProduct(pair, 0.8);
    expect(rank).toBeGreaterThan(1);
    expect(rank).toBeLessThan(8);
    const rest = before.sigma.slice(rank).reduce((sum, size) => sum + size * size, 0);
    expect(squaredDistance(productOf(pair), before.product) / rest).toBeCloseTo(1, 5);
    const after = spectrum(pair);
    expect(largestDifference(after.slice(0, rank), before.sigma.slice(0, rank))).toBeLessThan(1e-5);
    expect(after[rank]!).toBeLessThan(1e-6 * after[0]!);
    expect(pair.a.values).toEqual(before.a);
  });

  it('of all energy changes nothing, not even what f64 would round away', () => {
    const pair = pairOf(4, 2, 1);
    pair.b.values.fill(1e-30, 0, height);
    const before = pair.b.values.slice();
    expect(truncateProduct(pair, 1)).toBe(4);
    expect(pair.b.values).toEqual(before);
  });

  it('of a product of zeros changes nothing', () => {
    const pair = pairOf(4, 2, 0);
    truncateProduct(pair, 0.9);
    expect(pair.b.values.every((value) => value === 0)).toBe(true);
  });
});

describe('addNuclearGradient', () => {
  it("is the gradient of torch's nuclear norm", () => {
    const { scale, a, b, gradientA, gradientB } = trainerNumbers.nuclear;
    const pair = {
      a: parameterOf('m.a', 3, Float32Array.from(doubles(a))),
      b: parameterOf('m.b', 3, Float32Array.from(doubles(b))),
    };
    pair.a.gradient.fill(1);
    addNuclearGradient(pair, { weight: 2, scale });
    const wanted = [doubles(gradientA), doubles(gradientB)].map((x, p) =>
      x.map((value) => (p === 0 ? 1 : 0) + 2 * value),
    );
    expect(largestDifference(pair.a.gradient, wanted[0]!)).toBeLessThan(2e-6);
    expect(largestDifference(pair.b.gradient, wanted[1]!)).toBeLessThan(2e-6);
  });

  it('knows only the directions that the product has', () => {
    const pair = pairOf(4, 6, 0.3);
    pair.b.values.copyWithin(2 * height, 0, 2 * height); // B has two directions, A four.
    addNuclearGradient(pair, { weight: 1, scale: 1 });
    const two = {
      rows: height,
      columns: 2,
      data: Float64Array.from(pair.b.values.slice(0, 2 * height)),
    };
    const all = { rows: height, columns: 4, data: Float64Array.from(pair.b.gradient) };
    const outsideOfB = outside(orthonormal(two), all).data;
    expect(Math.max(...outsideOfB.map(Math.abs))).toBeLessThan(1e-6);
    expect(Math.max(...pair.b.gradient.map(Math.abs))).toBeGreaterThan(0.01);
  });

  it('of no weight does not touch a gradient', () => {
    const pair = pairOf(4, 6, 0.3);
    pair.a.gradient.fill(-0);
    addNuclearGradient(pair, { weight: 0, scale: 1 });
    expect(Object.is(pair.a.gradient[0], -0)).toBe(true);
  });

  it('of a product of zeros adds nothing', () => {
    const pair = pairOf(4, 3, 0);
    addNuclearGradient(pair, { weight: 1, scale: 1 });
    expect(pair.a.gradient.every((value) => value === 0)).toBe(true);
    expect(pair.b.gradient.every((value) => value === 0)).toBe(true);
  });
});

describe('training with it', () => {
  interface Regular {
    readonly weight: number;
    readonly energy: number;
  }

  const { clean, noisy } = planted(height, width, { rank: 4, noise: 0.05, seed: 4 });
  const floor = 0.05 ** 2 * noisy.length; // what the noise of new answers adds

  function trained({ weight, energy }: Regular): Pair {
    const pair = pairOf(32, 5, 0);
    const optimizer = createAdamw(adam, [pair.a, pair.b]);
    for (let t = 0; t < 400; t++) {
      backward(
        pair,
        productOf(pair).map((x, i) => x - noisy[i]!),
      );
      addNuclearGradient(pair, { weight, scale: 1 });
      optimizer.step([pair.a, pair.b], 0.01);
      if (t % 20 === 19) truncateProduct(pair, energy);
    }
    return pair;
  }
  function plain(): Pair {
    const pair = pairOf(32, 5, 0);
    const optimizer = createAdamw(adam, [pair.a, pair.b]);
    for (let t = 0; t < 400; t++) {
      backward(
        pair,
        productOf(pair).map((x, i) => x - noisy[i]!),
      );
      optimizer.step([pair.a, pair.b], 0.01);
    }
    return pair;
  }
  const validation = (pair: Pair): number => squaredDistance(productOf(pair), clean) + floor;

  it('weight 0 and energy 1 are the plain run, bit for bit', () => {
    const [one, other] = [trained({ weight: 0, energy: 1 }), plain()];
    expect(one.a.values).toEqual(other.a.values);
    expect(one.b.values).toEqual(other.b.values);
  });

  it('finds a planted rank of 4 in 32, and squeezing to it costs nothing', () => {
    const pair = trained({ weight: 0.05, energy: 0.98 });
    const before = validation(pair);
    const rank = truncateProduct(pair, 0.98);
    expect(rank).toBeGreaterThanOrEqual(4);
    expect(rank).toBeLessThanOrEqual(6);
    expect(Math.abs(validation(pair) / before - 1)).toBeLessThanOrEqual(0.005);
    expect(validation(pair)).toBeLessThan(1.2 * floor);
    // Without it the noise takes all ranks, and cutting to that rank is a change.
    const free = plain();
    expect(ranksOfEnergy(spectrum(free), 0.9999)).toBeGreaterThan(6);
  });
});
