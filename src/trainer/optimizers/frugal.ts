// FRUGAL (arXiv 2411.07837) with blocks: all numbers are one line cut into blocks of `density` of it; one block at a time
// has AdamW's moments, all the others go by the sign of their gradient. After `gap` steps it is the next block's turn, from
// moments of zero.

import { createRandom } from '../../adapters/families/seeded-random.ts';
import { type AdamOptions, adamStep, momentLengths, momentsOf } from './adam.ts';
import type { Optimizer, ParameterShape } from './optimizer.ts';
import { createState, withState } from './state.ts';

export interface FrugalOptions extends AdamOptions {
  readonly name: 'frugal';
  /** Share of the numbers that have moments, 0 … 1. */
  readonly density: number;
  /** Steps that a block keeps its moments. */
  readonly gap: number;
  /** Learning rate of the others, as a share. */
  readonly inactiveLrScale: number;
  /** `random`: a block drawn by the seed, perhaps the last one again. */
  readonly order: 'cyclic' | 'random';
  readonly seed: number;
}

export function createFrugal(
  options: FrugalOptions,
  parameters: readonly ParameterShape[],
): Optimizer {
  const { density, gap, inactiveLrScale, weightDecay } = options;
  const total = parameters.reduce((sum, { rows, columns }) => sum + rows * columns, 0);
  const size = Math.ceil(density * total);
  const blocks = size === 0 ? 0 : Math.ceil(total / size);
  const state = createState(momentLengths('block', size));
  const { m, v } = momentsOf(state, 'block');
  return withState({ name: options.name, state, parameters }, (current, learningRate) => {
    const taken = state.steps - 1;
    // The only block there is keeps its moments: nothing was switched.
    const since = blocks === 1 ? taken : taken % gap;
    if (since === 0) for (const array of [m, v]) array.fill(0);
    const start = size * activeBlock(options, blocks, Math.floor(taken / gap));
    const step = { ...options, learningRate, steps: since + 1 };
    const sign = { size: learningRate * inactiveLrScale, kept: 1 - learningRate * weightDecay };
    let at = 0;
    for (const { values, gradient } of current) {
      const { length } = values;
      const from = Math.min(Math.max(start - at, 0), length);
      const to = Math.min(Math.max(start + size - at, 0), length);
      signStep(values.subarray(0, from), gradient, sign);
      signStep(values.subarray(to), gradient.subarray(to), sign);
      if (from < to) {
        const offset = at + from - start;
        const active = { m: m.subarray(offset), v: v.subarray(offset) };
        adamStep(values.subarray(from, to), gradient.subarray(from), active, step);
      }
      at += length;
    }
  });
}

/** Which block has moments in the given turn. */
export function activeBlock(
  { order, seed }: Pick<FrugalOptions, 'order' | 'seed'>,
  blocks: number,
  turn: number,
): number {
  if (blocks <= 1) return 0;
  return order === 'cyclic' ? turn % blocks : createRandom(BigInt(seed), [turn, 0]).below(blocks);
}

function signStep(
  values: Float32Array,
  gradient: Float32Array,
  { size, kept }: { readonly size: number; readonly kept: number },
): void {
  for (let i = 0; i < values.length; i++) {
    values[i] = values[i]! * kept - size * Math.sign(gradient[i]!);
  }
}
