// What a recipe adds to the loss, and does between steps, so that products come out of few ranks: TRP (trp.ts).

import { scaleOf } from '../adapters/families/matryoshka.ts';
import type { Recipe } from '../jobs/recipe.ts';
import type { Parameter } from './optimizers/optimizer.ts';
import { addNuclearGradient, type LowRankPair, truncateProduct } from './trp.ts';

/** Before a step, on the gradients of a lora's pairs. */
export function addPenalty(
  { regularizer, scaling, rank }: Pick<Recipe, 'regularizer' | 'scaling' | 'rank'>,
  parameters: readonly Parameter[],
): void {
  if (regularizer === null || regularizer.weight === 0) return;
  const penalty = { weight: regularizer.weight, scale: scaleOf(scaling, rank) };
  for (const pair of pairsOf(parameters)) addNuclearGradient(pair, penalty);
}

/** After step `step`, counted from 1. */
export function pruneProducts(
  { regularizer }: Pick<Recipe, 'regularizer'>,
  parameters: readonly Parameter[],
  step: number,
): void {
  if (regularizer === null || step % regularizer.every !== 0) return;
  for (const pair of pairsOf(parameters)) truncateProduct(pair, regularizer.energy);
}

/** Each a is followed by its b. */
export function pairsOf(parameters: readonly Parameter[]): LowRankPair[] {
  return Array.from({ length: parameters.length / 2 }, (_, i) => ({
    a: parameters[2 * i]!,
    b: parameters[2 * i + 1]!,
  }));
}
