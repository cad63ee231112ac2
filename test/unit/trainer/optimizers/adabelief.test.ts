import { describe, expect, it } from 'vitest';
import { createAdabelief } from '../../../../src/trainer/optimizers/adabelief.ts';
import {
  doubles,
  largestDifference,
  quadratic,
  trainerNumbers,
} from '../../../support/trainer-numbers.ts';

const options = { name: 'adabelief', beta1: 0.9, beta2: 0.999, epsilon: 1e-8 } as const;

describe('adabelief', () => {
  it('has all four runs of the reference', () => {
    const kinds = trainerNumbers.adabelief_runs.map(({ rectify, decay }) => `${rectify} ${decay}`);
    expect(new Set(kinds).size).toBe(4);
  });

  it.each(trainerNumbers.adabelief_runs)(
    '100 steps are those of adabelief-pytorch: rectify $rectify, decay $decay',
    ({ rectify, decay, values: wanted }) => {
      const { parameters, run, values } = quadratic();
      run(createAdabelief({ ...options, weightDecay: 0.05, rectify, decay }, parameters), 0, 100);
      expect(largestDifference(values(), doubles(wanted))).toBeLessThan(1e-6);
    },
  );

  it('steps grow while the gradient stays what was expected', () => {
    const values = new Float32Array(1);
    const parameter = { name: 'x', rows: 1, columns: 1, values, gradient: Float32Array.of(0.5) };
    const plain = { ...options, weightDecay: 0, rectify: false, decay: 'decoupled' } as const;
    const optimizer = createAdabelief(plain, [parameter]);
    const steps = Array.from({ length: 60 }, () => {
      const before = values[0]!;
      optimizer.step([parameter], 1e-3);
      return before - values[0]!;
    });
    for (let t = 1; t < steps.length; t++) expect(steps[t]!).toBeGreaterThan(steps[t - 1]!);
    // Adam's step would be the learning rate all along.
    expect(steps.at(-1)!).toBeGreaterThan(2e-3);
  });
});
