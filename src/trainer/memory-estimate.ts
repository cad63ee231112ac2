// What training will take, in bytes, from sizes alone: nothing is loaded or recorded for it. The values between the ops are
// those that the tape keeps for the way back (autodiff.ts) as ggml's allocator lays them out; a test holds the estimate to
// within a tenth of what the allocator then takes.

import type { Recipe } from '../jobs/recipe.ts';
import type { DecoderWeights } from '../model/decoder.ts';
import { type DecoderConfig, projectionShape, projections } from '../model/decoder-config.ts';

export interface MemorySizes {
  readonly config: DecoderConfig;
  readonly recipe: Pick<Recipe, 'rank' | 'targets' | 'batchWindows' | 'windowTokens' | 'recompute'>;
  /** Most learnt tokens of one micro-batch: only they have logits. */
  readonly answersMax: number;
  readonly weightBytes: number;
  readonly optimizerBytes: number;
}

export interface TrainingMemory extends Readonly<Record<string, number>> {
  /** The base's, as they are multiplied. */
  readonly weights: number;
  /** And once more for the way back, transposed and in f32. */
  readonly transposed: number;
  /** Values, gradients and what is added to them, and the values where the kernels read them. */
  readonly factors: number;
  readonly optimizer: number;
  /** Everything between: activations, logits, gradients on their way. */
  readonly scratch: number;
}

const f32Bytes = 4;

export function estimateMemory(sizes: MemorySizes): TrainingMemory {
  const { config, recipe, weightBytes, optimizerBytes } = sizes;
  const shapes = projections.map((name) => projectionShape(config, name));
  const frozen = shapes.reduce((sum, shape) => sum + shape.in * shape.out, 0) * config.blocks;
  const factors = factorCount(config, recipe);
  return {
    weights: weightBytes,
    transposed: f32Bytes * (frozen + config.vocabSize * config.width),
    factors: 3 * f32Bytes * factors,
    optimizer: optimizerBytes,
    scratch: f32Bytes * (scratchNumbers(sizes) + factors),
  };
}

export function factorCount(
  config: DecoderConfig,
  { rank, targets }: Pick<Recipe, 'rank' | 'targets'>,
): number {
  const each = targets.map((name) => projectionShape(config, name));
  return config.blocks * rank * each.reduce((sum, shape) => sum + shape.in + shape.out, 0);
}

/** Numbers that are there at once, gradients of the factors not counted. */
function scratchNumbers({ config, recipe, answersMax }: MemorySizes): number {
  const { blocks, width, heads, kvHeads, headSize, ffnWidth, vocabSize } = config;
  const { rank, targets, batchWindows, windowTokens, recompute } = recipe;
  const rows = batchWindows * windowTokens;
  const queries = heads * headSize;
  // Per row: both norms' inputs and results; q, k, v and what attention made of them; gate, up and their product; h.
  const kept =
    4 * width + 2 * queries + 2 * kvHeads * headSize + 3 * ffnWidth + rank * targets.length;
  const scores = batchWindows * heads * windowTokens ** 2;
  const wayBack = rows * (3 * ffnWidth + 2 * width) + 3 * scores;
  const logits = 2 * answersMax * vocabSize;
  const outside = rows * width * (recompute ? blocks : 1);
  return outside + rows * kept * (recompute ? 1 : blocks) + Math.max(logits, wayBack);
}

export function bytesOfWeights({
  tokenEmbedding,
  blocks,
  outputNorm,
  output,
}: DecoderWeights): number {
  const all = new Set([tokenEmbedding, outputNorm, output, ...blocks.flatMap(Object.values)]);
  return Array.from(all).reduce((sum, { bytes }) => sum + bytes, 0);
}
