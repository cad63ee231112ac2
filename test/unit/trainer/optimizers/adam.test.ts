import { describe, expect, it } from 'vitest';
import { createAdamw } from '../../../../src/trainer/optimizers/adam.ts';
import { createSgd } from '../../../../src/trainer/optimizers/sgd.ts';
import {
  doubles,
  largestDifference,
  quadratic,
  trainerNumbers,
} from '../../../support/trainer-numbers.ts';

const adam = { beta1: 0.9, beta2: 0.999, epsilon: 1e-8 } as const;

describe('adamw and sgd', () => {
  it('50 steps of adamw are those of torch.optim.AdamW', () => {
    const { parameters, run, values } = quadratic();
    run(createAdamw({ name: 'adamw', ...adam, weightDecay: 0.05 }, parameters), 0, 50);
    expect(largestDifference(values(), doubles(trainerNumbers.adamw))).toBeLessThan(1e-6);
  });

  it('50 steps of sgd are those of torch.optim.SGD, with momentum and without', () => {
    const heavy = quadratic();
    heavy.run(
      createSgd({ name: 'sgd', momentum: 0.9, weightDecay: 0.05 }, heavy.parameters),
      0,
      50,
    );
    expect(largestDifference(heavy.values(), doubles(trainerNumbers.sgd))).toBeLessThan(1e-6);
    const plain = quadratic();
    plain.run(createSgd({ name: 'sgd', momentum: 0, weightDecay: 0 }, plain.parameters), 0, 50);
    expect(largestDifference(plain.values(), doubles(trainerNumbers.sgdPlain))).toBeLessThan(1e-6);
  });

  it('has 8 bytes of state a number; sgd 4 with momentum and none without', () => {
    const { parameters } = quadratic();
    const options = { name: 'adamw', ...adam, weightDecay: 0 } as const;
    expect(createAdamw(options, parameters).stateBytes).toBe(8 * 50);
    const bytes = (momentum: number): number =>
      createSgd({ name: 'sgd', momentum, weightDecay: 0 }, parameters).stateBytes;
    expect([bytes(0.9), bytes(0)]).toEqual([4 * 50, 0]);
  });

  it('the first step of adamw is the learning rate, whatever the gradient', () => {
    for (const size of [1e-4, 1, 1e4]) {
      const values = new Float32Array(1);
      const parameter = { name: 'x', rows: 1, columns: 1, values, gradient: Float32Array.of(size) };
      createAdamw({ name: 'adamw', ...adam, weightDecay: 0 }, [parameter]).step([parameter], 0.01);
      expect(values[0]).toBeCloseTo(-0.01, 5);
    }
  });
});
