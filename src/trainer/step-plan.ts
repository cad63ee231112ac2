// Which windows each step learns from: a function of the examples and the recipe, so a job that goes on from step n needs to
// know nothing else. An epoch's last step may have fewer windows.

import { createRandom } from '../adapters/families/seeded-random.ts';
import type { Recipe } from '../jobs/recipe.ts';
import type { Example } from './examples.ts';
import { streams } from './objective.ts';
import { answersIn, packWindows, type Window } from './packing.ts';

export interface StepPlan {
  readonly steps: number;
  /** Most learnt tokens of one micro-batch. */
  readonly answersMax: number;
  /** Micro-batches of at most `batchWindows` windows. */
  microBatches(step: number): readonly (readonly Window[])[];
}

type Planned = Pick<
  Recipe,
  'epochs' | 'stepsMax' | 'batchWindows' | 'windowTokens' | 'accumulation' | 'seed'
>;

export function planSteps(examples: readonly Example[], recipe: Planned): StepPlan {
  const { epochs, stepsMax, batchWindows, windowTokens, accumulation, seed } = recipe;
  const epochOf = (epoch: number): (readonly Window[])[] => {
    const random = createRandom(BigInt(seed), [streams.order, epoch]);
    return inGroups(packWindows(examples, windowTokens, random), batchWindows);
  };
  /** First step of each epoch, and of what would be the next. */
  const starts = [0];
  let answersMax = 0;
  for (let epoch = 0; epoch < epochs && starts.at(-1)! < (stepsMax ?? Infinity); epoch++) {
    const groups = epochOf(epoch);
    for (const group of groups) answersMax = Math.max(answersMax, answersIn(examples, group));
    starts.push(starts.at(-1)! + Math.ceil(groups.length / accumulation));
  }
  let current: { readonly epoch: number; readonly groups: (readonly Window[])[] } | null = null;
  return {
    steps: Math.min(starts.at(-1)!, stepsMax ?? Infinity),
    answersMax,
    microBatches(step) {
      const epoch = starts.findLastIndex((start) => start <= step);
      if (current?.epoch !== epoch) current = { epoch, groups: epochOf(epoch) };
      const first = (step - starts[epoch]!) * accumulation;
      return current.groups.slice(first, first + accumulation);
    },
  };
}

export function inGroups(windows: readonly Window[], size: number): (readonly Window[])[] {
  return Array.from({ length: Math.ceil(windows.length / size) }, (_, i) =>
    windows.slice(i * size, (i + 1) * size),
  );
}
