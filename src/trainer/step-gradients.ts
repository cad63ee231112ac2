// The gradients of one step: over its micro-batches and the passes of the objective, added up in the parameters.

import type { Recipe } from '../jobs/recipe.ts';
import type { TrainedDelta } from '../model/trained-delta.ts';
import type { TrainingDecoder } from '../model/training-decoder.ts';
import type { SampleStatistics } from './batch-growth.ts';
import type { Example } from './examples.ts';
import { squaredNorm } from './gradient-norm.ts';
import { passesOf } from './objective.ts';
import type { Parameter } from './optimizers/optimizer.ts';
import { answersIn, layOut, type Window } from './packing.ts';

export interface GradientSource {
  readonly decoder: TrainingDecoder;
  readonly delta: TrainedDelta;
  readonly parameters: readonly Parameter[];
  /** Ranks that the decoder's gate has. */
  readonly gateRanks: number;
  /** Room for the largest parameter. */
  readonly added: Float32Array;
}

export interface StepData {
  readonly recipe: Recipe;
  readonly training: readonly Example[];
  /** From 0. */
  readonly step: number;
  readonly groups: readonly (readonly Window[])[];
}

export interface StepGradients {
  /** Mean over the learnt tokens. */
  readonly loss: number;
  /** Rows that held a token, of all passes. */
  readonly tokens: number;
  /** Of the micro-batches; of objectives of one pass. */
  readonly statistics: SampleStatistics;
}

/** Writes over the parameters' gradients. */
export async function computeGradients(
  source: GradientSource,
  { recipe, training, step, groups }: StepData,
  breathe: () => Promise<void>,
): Promise<StepGradients> {
  const { batchWindows: windows, windowTokens: windowRows } = recipe;
  const passes = passesOf(recipe, step);
  const answers = answersIn(training, groups.flat());
  for (const { gradient } of source.parameters) gradient.fill(0);
  let loss = 0;
  let tokens = 0;
  let squares = 0;
  for (const group of groups) {
    for (const { gates, weight } of passes) {
      await breathe();
      const layout = layOut(training, group, { windows, windowRows, weight: weight / answers });
      const gate = repeated(gates, windows * windowRows, source.gateRanks);
      loss += source.decoder.step({ ...layout, gate }, source.delta);
      squares += addGradients(source);
      tokens += layout.rows;
    }
  }
  // A micro-batch's own mean gradient is `samples` times its part of the step's.
  const samples = groups.length;
  const meanSquaredNorm = squaredNorm(source.parameters);
  const statistics = { samples, squaredNorms: samples ** 2 * squares, meanSquaredNorm };
  return { loss, tokens, statistics };
}

/** Returns the square of what is added. */
function addGradients({ decoder, parameters, added: room }: GradientSource): number {
  let squares = 0;
  for (const { name, gradient } of parameters) {
    const added = room.subarray(0, gradient.length);
    decoder.read(name, added);
    for (let i = 0; i < added.length; i++) {
      const value = added[i]!;
      gradient[i]! += value;
      squares += value * value;
    }
  }
  return squares;
}

/** One row after another, `ranks` wide: modules with more ranks than the recipe have the last one's. */
function repeated(gates: Float64Array, rows: number, ranks: number): Float32Array {
  const row = Float32Array.from({ length: ranks }, (_, r) => gates[r] ?? gates.at(-1)!);
  const result = new Float32Array(rows * ranks);
  for (let i = 0; i < rows; i++) result.set(row, i * ranks);
  return result;
}
