// How long a gradient of many parameters is, and not longer than wanted.

import type { Parameter } from './optimizers/optimizer.ts';

/** Sum of squares over all parameters. */
export function squaredNorm(parameters: ReadonlyArray<Pick<Parameter, 'gradient'>>): number {
  let sum = 0;
  for (const { gradient } of parameters) {
    for (let i = 0; i < gradient.length; i++) sum += gradient[i]! * gradient[i]!;
  }
  return sum;
}

/** Scales all gradients together to a length of at most `normMax`, as torch's clip_grad_norm_ does; returns the length
 *  before. One that is not finite is left as it is: its step must not be taken. */
export function clipGradients(
  parameters: ReadonlyArray<Pick<Parameter, 'gradient'>>,
  normMax: number,
): number {
  const norm = Math.sqrt(squaredNorm(parameters));
  const factor = normMax / (norm + 1e-6);
  if (!Number.isFinite(norm) || factor >= 1) return norm;
  for (const { gradient } of parameters) {
    for (let i = 0; i < gradient.length; i++) gradient[i]! *= factor;
  }
  return norm;
}
