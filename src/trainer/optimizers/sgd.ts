// Stochastic gradient descent with momentum, as torch.optim.SGD computes it: weight decay is a part of the gradient.

import type { Optimizer, ParameterShape } from './optimizer.ts';
import { createState, floats, withState } from './state.ts';

export interface SgdOptions {
  readonly name: 'sgd';
  /** 0: none, and no state. */
  readonly momentum: number;
  readonly weightDecay: number;
}

export function createSgd(options: SgdOptions, parameters: readonly ParameterShape[]): Optimizer {
  const { momentum, weightDecay } = options;
  const remembered = momentum === 0 ? [] : parameters;
  const state = createState(remembered.map(({ name, rows, columns }) => [name, rows * columns]));
  return withState({ name: options.name, state, parameters }, (current, learningRate) => {
    for (const { name, values, gradient } of current) {
      const velocity = momentum === 0 ? null : floats(state, name);
      for (let i = 0; i < values.length; i++) {
        let step = gradient[i]! + weightDecay * values[i]!;
        if (velocity !== null) {
          step += momentum * velocity[i]!;
          velocity[i] = step;
        }
        values[i]! -= learningRate * step;
      }
    }
  });
}
