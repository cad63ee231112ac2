// AdamW (Loshchilov and Hutter, "Decoupled weight decay regularization", 2019), as torch.optim.AdamW computes it, and the
// step of Adam's that frugal, dct-adamw, lora-pro and coso take in their own coordinates.

import type { Optimizer, ParameterShape } from './optimizer.ts';
import { createState, floats, type OptimizerState, withState } from './state.ts';

export interface AdamOptions {
  readonly beta1: number;
  readonly beta2: number;
  readonly epsilon: number;
  /** A step takes learningRate times this share of the values away. */
  readonly weightDecay: number;
}

export interface AdamwOptions extends AdamOptions {
  readonly name: 'adamw';
}

/** Each of as many numbers as the values. */
export interface Moments {
  readonly m: Float32Array;
  readonly v: Float32Array;
}

export interface AdamStep extends AdamOptions {
  readonly learningRate: number;
  /** Since the moments were zero, this one included: what their bias is. */
  readonly steps: number;
}

/** θ ← θ·(1 − η·decay) − η·m̂/(√v̂ + ε). Allocates nothing. */
export function adamStep(
  values: Float32Array,
  gradient: Float32Array,
  { m, v }: Moments,
  { beta1, beta2, epsilon, weightDecay, learningRate, steps }: AdamStep,
): void {
  // Both bias corrections are taken out of the loop: m̂/(√v̂ + ε) = m·(c/(1 − β₁ᵗ)) / (√v + ε·c) with c = √(1 − β₂ᵗ).
  const correction = Math.sqrt(1 - beta2 ** steps);
  const size = (learningRate * correction) / (1 - beta1 ** steps);
  const floor = epsilon * correction;
  const kept = 1 - learningRate * weightDecay;
  const [new1, new2] = [1 - beta1, 1 - beta2];
  for (let i = 0; i < values.length; i++) {
    const g = gradient[i]!;
    const first = beta1 * m[i]! + new1 * g;
    const second = beta2 * v[i]! + new2 * g * g;
    m[i] = first;
    v[i] = second;
    values[i] = values[i]! * kept - (size * first) / (Math.sqrt(second) + floor);
  }
}

/** m and v for a name, as createState wants them. */
export function momentLengths(name: string, length: number): Array<readonly [string, number]> {
  return [
    [`${name}.m`, length],
    [`${name}.v`, length],
  ];
}

export function momentsOf(state: OptimizerState, name: string): Moments {
  return { m: floats(state, `${name}.m`), v: floats(state, `${name}.v`) };
}

export function createAdamw(
  options: AdamwOptions,
  parameters: readonly ParameterShape[],
): Optimizer {
  const state = createState(
    parameters.flatMap(({ name, rows, columns }) => momentLengths(name, rows * columns)),
  );
  return withState({ name: options.name, state, parameters }, (current, learningRate) => {
    const step = { ...options, learningRate, steps: state.steps };
    for (const { name, values, gradient } of current) {
      adamStep(values, gradient, momentsOf(state, name), step);
    }
  });
}
