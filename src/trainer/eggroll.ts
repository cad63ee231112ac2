// EGGROLL (algorithms.md section 19): a gradient of any score from forward passes alone. Members of a generation see the weights
// moved by σ·E, and the estimate is the sum of their scores times E. Each E is a product of two thin matrices, so it is served
// as an adapter's ranks; it is drawn again from (seed, generation, pair, module) wherever it is needed, and never kept.

import { createRandom } from '../adapters/families/seeded-random.ts';
import type { ParameterShape } from './optimizers/optimizer.ts';

/** E = left·rightᵀ/√rank of one pair of members: the first is moved by +E, the second by -E. */
export interface PairNoise {
  readonly left: Float32Array; // [rank, rows]
  readonly right: Float32Array; // [rank, columns]
}

export interface NoiseKey {
  readonly seed: number;
  readonly generation: number;
  /** Of members 2·pair and 2·pair + 1. */
  readonly pair: number;
  /** moduleIndex, which `initialTensors` draws by too, in a generation of its own. */
  readonly module: number;
}

const pairsMax = 1024;

/** Standard normals. */
export function pairNoise(
  { seed, generation, pair, module }: NoiseKey,
  { rows, columns }: Pick<ParameterShape, 'rows' | 'columns'>,
  rank: number,
): PairNoise {
  const random = createRandom(BigInt(seed), [module, 1 + generation * pairsMax + pair]);
  const draw = (count: number): Float32Array =>
    Float32Array.from({ length: count }, () => random.normal());
  return { left: draw(rank * rows), right: draw(rank * columns) };
}

const varianceFloor = 1e-5;

/** z-scores within each `groupSize` neighbours, who had the same task: how hard a task is moves nothing. */
export function shapeFitness(scores: readonly number[], groupSize: number): number[] {
  return scores.map((score, i) => {
    const from = i - (i % groupSize);
    const group = scores.slice(from, from + groupSize);
    const mean = group.reduce((sum, each) => sum + each, 0) / group.length;
    const variance = group.reduce((sum, each) => sum + (each - mean) ** 2, 0) / group.length;
    return (score - mean) / Math.sqrt(variance + varianceFloor);
  });
}

/** What each pair's E weighs in the estimate: (1/N)·√N·(z₊ - z₋), so that its numbers are about as large as E's whatever N
 *  is. Exactly 0 for members that fared alike. */
export function pairWeights(fitness: readonly number[]): number[] {
  const scale = 1 / Math.sqrt(fitness.length);
  return Array.from(
    { length: fitness.length / 2 },
    (_, pair) => scale * (fitness[2 * pair]! - fitness[2 * pair + 1]!),
  );
}

/** Adds weight·E. */
export function addNoise(
  gradient: Float32Array, // [rows, columns]
  { left, right }: PairNoise,
  weight: number,
  rank: number,
): void {
  const rows = left.length / rank;
  const columns = right.length / rank;
  for (let r = 0; r < rank; r++) {
    for (let i = 0; i < rows; i++) {
      const factor = (weight / Math.sqrt(rank)) * left[r * rows + i]!;
      const at = i * columns;
      for (let j = 0; j < columns; j++) gradient[at + j]! += factor * right[r * columns + j]!;
    }
  }
}
