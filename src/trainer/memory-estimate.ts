// What training will take, in bytes, from sizes alone: nothing is loaded or recorded for it. The values between the ops are
// those that the tape keeps for the way back (autodiff.ts) as ggml's allocator lays them out; a test holds the estimate to
// within a tenth of what the allocator then takes.

import type { Recipe } from '../jobs/recipe.ts';
import type { DecoderWeights } from '../model/decoder.ts';
import {
  type DecoderConfig,
  type Projection,
  projectionShape,
  projections,
} from '../model/decoder-config.ts';

export interface MemorySizes {
  readonly config: DecoderConfig;
  readonly recipe: Pick<
    Recipe,
    | ('kind' | 'rank' | 'rankSelection' | 'targets')
    | ('batchWindows' | 'windowTokens' | 'recompute')
  >;
  /** Most learnt tokens of one micro-batch: only they have logits. */
  readonly answersMax: number;
  readonly weightBytes: number;
  readonly optimizerBytes: number;
  /** What is trained and what its graph needs beside it. */
  readonly numbers: { readonly trained: number; readonly constant: number };
}

export interface TrainingMemory extends Readonly<Record<string, number>> {
  /** The base's, as they are multiplied. */
  readonly weights: number;
  /** And once more for the way back, transposed and in f32. */
  readonly transposed: number;
  /** Values, as they began, gradients, and where the kernels read them, trained and as they are served. */
  readonly factors: number;
  readonly optimizer: number;
  /** Everything between: activations, logits, gradients on their way. */
  readonly scratch: number;
}

const f32Bytes = 4;

export function estimateMemory(sizes: MemorySizes): TrainingMemory {
  const { config, weightBytes, optimizerBytes } = sizes;
  const { trained, constant } = sizes.numbers;
  const shapes = projections.map((name) => projectionShape(config, name));
  const frozen = shapes.reduce((sum, shape) => sum + shape.in * shape.out, 0) * config.blocks;
  return {
    weights: weightBytes,
    transposed: f32Bytes * (frozen + config.vocabSize * config.width),
    factors: f32Bytes * (5 * trained + 3 * constant),
    optimizer: optimizerBytes,
    scratch: f32Bytes * scratchNumbers(sizes, trained),
  };
}

/** The most numbers that are there at once, at any of the stages where they are many. */
function scratchNumbers({ config, recipe, answersMax }: MemorySizes, factors: number): number {
  const { blocks, width, heads, kvHeads, headSize, ffnWidth, vocabSize } = config;
  const { kind, rank, targets, batchWindows, windowTokens, recompute } = recipe;
  // A has no gradient, which would want its input; within one block that frees nothing at the peak.
  const isFrozen = !recompute && (kind === 'fly' || kind === 'svfit');
  const has = (...names: readonly Projection[]): number =>
    Number(!isFrozen && targets.some((name) => names.includes(name)));
  const rows = batchWindows * windowTokens;
  const state = rows * width;
  const queries = rows * heads * headSize;
  const inner = rows * ffnWidth;
  // What a block keeps: its input, q, k, v and, where a factor's gradient wants them, the inputs of projections.
  const attention =
    state * (1 + has('attn_q', 'attn_k', 'attn_v')) + queries + 2 * rows * kvHeads * headSize;
  const mlp =
    queries * has('attn_output') +
    state * (1 + has('ffn_gate', 'ffn_up')) +
    inner * (2 + has('ffn_down'));
  const own = targets.map((name) => keptBy(recipe, projectionShape(config, name)));
  const kept = attention + mlp + rows * own.reduce((sum, numbers) => sum + numbers, 0);
  const isSeen = kind === 'fly' || kind === 'mora';
  const seen = isSeen ? blocks * rows * rank * targets.length : 0;
  // The way back through attention; 2.5 and 4 are fitted to what ggml 0.23.0's allocator takes.
  const scores = 2.5 * batchWindows * heads * windowTokens ** 2 + 4 * state;
  const logits = 2 * answersMax * vocabSize;
  if (recompute) {
    const inputs = blocks * state + 2 * seen; // 2 is fitted: they lie between what is freed
    return Math.max(
      inputs + 2 * state + logits,
      inputs + factors + kept + (kind === 'hydra' ? 6 : 3) * inner - 2 * state,
      inputs + factors + kept - mlp + scores,
    );
  }
  return Math.max(
    state + blocks * kept + Math.max(logits, inner + 2 * state),
    state + blocks * kept - mlp + scores,
    state + kept + factors,
  );
}

/** Of a row in a projection, for the way back: h, what else has its width, and what the family multiplies besides the input. */
function keptBy(
  { kind, rank, rankSelection }: MemorySizes['recipe'],
  { in: width, out }: { readonly in: number; readonly out: number },
): number {
  switch (kind) {
    case 'hydra':
      return 2 * rank + out;
    case 'mora':
      return 4 * rank + width;
    case 'fly':
    case 'queryable':
      return 2 * rank;
    default:
      return rankSelection === null ? rank : 3 * rank; // gates, and what they are multiplied with
  }
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
