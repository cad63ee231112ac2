// AdaBelief (Zhuang et al., NeurIPS 2020), as adabelief-pytorch 0.2.1 computes it: ε is added to s at every step and stays
// there, and the rectified step (Liu et al., "On the variance of the adaptive learning rate", 2020) falls back to momentum
// while too few steps are behind it. ε is 1e-8 for f32 state: next to f32 values 1e-16 vanishes.

import { type AdamOptions, momentLengths, momentsOf } from './adam.ts';
import type { Optimizer, ParameterShape } from './optimizer.ts';
import { createState, withState } from './state.ts';

export interface AdabeliefOptions extends AdamOptions {
  readonly name: 'adabelief';
  /** Where weight decay goes: off the values, or into the gradient. */
  readonly decay: 'decoupled' | 'gradient';
  readonly rectify: boolean;
}

export function createAdabelief(
  options: AdabeliefOptions,
  parameters: readonly ParameterShape[],
): Optimizer {
  const { beta1, beta2, epsilon, weightDecay, decay } = options;
  const state = createState(
    parameters.flatMap(({ name, rows, columns }) => momentLengths(name, rows * columns)),
  );
  return withState({ name: options.name, state, parameters }, (current, learningRate) => {
    const { size, root } = stepOf(options, state.steps);
    const kept = decay === 'decoupled' ? 1 - learningRate * weightDecay : 1;
    const pull = decay === 'gradient' ? weightDecay : 0;
    for (const { name, values, gradient } of current) {
      const { m, v: s } = momentsOf(state, name);
      for (let i = 0; i < values.length; i++) {
        const value = values[i]!;
        const g = gradient[i]! + pull * value;
        const first = beta1 * m[i]! + (1 - beta1) * g;
        const surprise = g - first;
        const belief = beta2 * s[i]! + (1 - beta2) * surprise * surprise + epsilon;
        m[i] = first;
        s[i] = belief;
        const divisor = root === null ? 1 : Math.sqrt(belief) * root + epsilon;
        values[i] = value * kept - (learningRate * size * first) / divisor;
      }
    }
  });
}

/** The step is size·m/(√s·root + ε), or size·m where root is null. */
function stepOf(
  { beta1, beta2, rectify }: AdabeliefOptions,
  steps: number,
): { readonly size: number; readonly root: number | null } {
  const power = beta2 ** steps;
  const size = 1 / (1 - beta1 ** steps);
  if (!rectify) return { size, root: 1 / Math.sqrt(1 - power) };
  const longest = 2 / (1 - beta2) - 1; // ρ∞
  const length = longest - (2 * steps * power) / (1 - power); // ρₜ
  if (length < 5) return { size, root: null };
  const share = ((length - 4) / (longest - 4)) * ((length - 2) / (longest - 2));
  return { size: size * Math.sqrt((1 - power) * share * (longest / length)), root: 1 };
}
