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
  /** Micro-batches of at most `batchWindows` windows, of all epochs together. */
  readonly microBatchCount: number;
  /** Those of a step of `accumulation`. */
  microBatches(step: number): readonly (readonly Window[])[];
  /** At most `count` from the `first` on, of one epoch. */
  slice(first: number, count: number): readonly (readonly Window[])[];
}

type Planned = Pick<
  Recipe,
  | 'epochs'
  | 'stepsMax'
  | 'batchWindows'
  | 'windowTokens'
  | 'accumulation'
  | 'batchSchedule'
  | 'seed'
>;

export function planSteps(examples: readonly Example[], recipe: Planned): StepPlan {
  const { epochs, stepsMax, batchWindows, windowTokens, accumulation, seed } = recipe;
  const epochOf = (epoch: number): (readonly Window[])[] => {
    const random = createRandom(BigInt(seed), [streams.order, epoch]);
    return inGroups(packWindows(examples, windowTokens, random), batchWindows);
  };
  /** First step and first micro-batch of each epoch, and of what would be the next. */
  const starts = [{ step: 0, batch: 0 }];
  // With growing batches steps take more of the data than is known here.
  const most = recipe.batchSchedule === null ? (stepsMax ?? Infinity) : Infinity;
  let answersMax = 0;
  for (let epoch = 0; epoch < epochs && starts[epoch]!.step < most; epoch++) {
    const groups = epochOf(epoch);
    for (const group of groups) answersMax = Math.max(answersMax, answersIn(examples, group));
    const { step, batch } = starts[epoch]!;
    const steps = Math.ceil(groups.length / accumulation);
    starts.push({ step: step + steps, batch: batch + groups.length });
  }
  let current: { readonly epoch: number; readonly groups: (readonly Window[])[] } | null = null;
  const groupsOf = (epoch: number): (readonly Window[])[] => {
    if (current?.epoch !== epoch) current = { epoch, groups: epochOf(epoch) };
    return current.groups;
  };
  const end = starts.at(-1)!;
  return {
    steps: Math.min(end.step, stepsMax ?? Infinity),
    answersMax,
    microBatchCount: end.batch,
    microBatches(step) {
      const epoch = starts.findLastIndex((start) => start.step <= step);
      const first = (step - starts[epoch]!.step) * accumulation;
      return groupsOf(epoch).slice(first, first + accumulation);
    },
    slice(first, count) {
      const epoch = starts.findLastIndex((start) => start.batch <= first);
      const from = first - starts[epoch]!.batch;
      return groupsOf(epoch).slice(from, from + count);
    },
  };
}

export function inGroups(windows: readonly Window[], size: number): (readonly Window[])[] {
  return Array.from({ length: Math.ceil(windows.length / size) }, (_, i) =>
    windows.slice(i * size, (i + 1) * size),
  );
}
