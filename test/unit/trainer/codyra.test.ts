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
