import { describe, expect, it } from 'vitest';
import {
  createOptimizer,
  type OptimizerOptions,
} from '../../../../src/trainer/optimizers/optimizer.ts';
import { quadratic } from '../../../support/trainer-numbers.ts';

// What holds for every optimiser. Each one's numbers are in its own test.

const adam = { beta1: 0.9, beta2: 0.999, epsilon: 1e-8, weightDecay: 0.05 } as const;
const all: readonly OptimizerOptions[] = [
  { name: 'adamw', ...adam },
  { name: 'sgd', momentum: 0, weightDecay: 0.05 },
  { name: 'sgd', momentum: 0.9, weightDecay: 0.05 },
  { name: 'adabelief', ...adam, decay: 'decoupled', rectify: true },
  { name: 'adabelief', ...adam, decay: 'gradient', rectify: false },
  { name: 'frugal', ...adam, density: 0.3, gap: 4, inactiveLrScale: 0.5, order: 'cyclic', seed: 1 },
  { name: 'frugal', ...adam, density: 0.3, gap: 4, inactiveLrScale: 0.5, order: 'random', seed: 1 },
  { name: 'dct-adamw', ...adam, rank: 1, norm: 'l1', errorFeedback: false },
  { name: 'dct-adamw', ...adam, rank: 1, norm: 'l2', errorFeedback: true },
  { name: 'lora-pro', ...adam, scale: 1.5, damping: 1e-8 },
  { name: 'lora-pro-sgd', weightDecay: 0.05, scale: 1.5, damping: 1e-8 },
];

describe.each(all)('$name, %#', (options) => {
  it('goes on after a restore, bit for bit', () => {
    const whole = quadratic();
    whole.run(createOptimizer(options, whole.parameters), 0, 23);
    const parts = quadratic();
    const first = createOptimizer(options, parts.parameters);
    parts.run(first, 0, 9);
    const second = createOptimizer(options, parts.parameters);
    second.restore(first.save());
    parts.run(second, 9, 23);
    expect(parts.values()).toEqual(whole.values());
    expect(whole.values()).not.toEqual(quadratic().values());
  });

  it('changes values, and no gradient', () => {
    const { parameters, run } = quadratic();
    const optimizer = createOptimizer(options, parameters);
    run(optimizer, 0, 1);
    const gradients = parameters.map(({ gradient }) => gradient.slice());
    optimizer.step(parameters, 0.01);
    expect(parameters.map(({ gradient }) => gradient)).toEqual(gradients);
  });

  it('saves as many bytes of numbers as it says it has', () => {
    const { parameters } = quadratic();
    const optimizer = createOptimizer(options, parameters);
    const bytes = optimizer.save();
    const header = Number(new DataView(bytes.buffer, bytes.byteOffset).getBigUint64(0, true));
    expect(optimizer.stateBytes).toBe(bytes.length - 8 - header);
  });

  it('refuses other parameters than it was made for', () => {
    const { parameters } = quadratic();
    const optimizer = createOptimizer(options, parameters);
    const [a, b] = parameters;
    const wrong = [
      [b!, a!],
      [a!],
      [a!, { ...b!, name: 'y.b' }],
      [a!, b!, { ...b!, name: 'z.b' }],
      [a!, { ...b!, gradient: b!.gradient.subarray(1) }],
    ];
    for (const parameters of wrong) {
      expect(() => optimizer.step(parameters, 0.1)).toThrow(/wants the 2 parameters/);
    }
    expect(() => optimizer.step(parameters, 0.1)).not.toThrow();
  });

  it('refuses a state that is not its own, and keeps what it had', () => {
    const { parameters, run, values } = quadratic();
    const optimizer = createOptimizer(options, parameters);
    run(optimizer, 0, 3);
    const saved = optimizer.save();
    const stranger = all.find(({ name }) => name !== options.name)!;
    const bad = [
      createOptimizer(stranger, parameters).save(),
      saved.subarray(0, saved.length - 1),
      Buffer.from(
        Buffer.from(saved).toString('latin1').replace('"steps":"3"', '"steps":"x"'),
        'latin1',
      ),
    ];
    if (optimizer.stateBytes > 0) {
      const twice = parameters.map((parameter) => ({
        ...parameter,
        columns: 2 * parameter.columns,
      }));
      bad.push(createOptimizer(options, twice).save());
    }
    for (const bytes of bad) {
      expect(() => optimizer.restore(bytes)).toThrow(
        expect.objectContaining({ code: 'SHAPE_MISMATCH' }),
      );
    }
    expect(optimizer.save()).toEqual(saved);
    expect(values().every(Number.isFinite)).toBe(true);
  });
});
