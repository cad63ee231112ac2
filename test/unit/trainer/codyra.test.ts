import { describe, expect, it } from 'vitest';
import { svd } from '../../../src/adapters/orthogonal.ts';
import {
  gatedRows,
  keptRanks,
  shrinkGates,
  thresholdAt,
  throughGates,
} from '../../../src/trainer/codyra.ts';
import { createAdamw } from '../../../src/trainer/optimizers/adam.ts';
import {
  backward,
  columnsOf,
  parameterOf,
  planted,
  productOf,
  squaredDistance,
} from '../../support/product-problem.ts';
import { createRng, normals } from '../../support/random.ts';

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
