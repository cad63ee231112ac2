// What a family hands over to be packed: one module's numbers as the kernels will use them, y += B·f(A·x) with every scale
// folded into B. f64, so that rounding to the stored type happens once.

import type { ModuleRef } from '../model/stepper.ts';

export interface ServedModule extends ModuleRef {
  readonly in: number;
  readonly out: number;
  readonly rank: number;
  /** Row i is rank i. null: made from the seed (fly) or in the basis (svfit). */
  readonly a: Float64Array | null; // [rank, in]
  /** Rank-major. null: in the basis (svfit). */
  readonly b: Float64Array | null; // [rank, out]
  /** What each rank is multiplied by: svfit's δs. */
  readonly gates: Float32Array | null; // [rank]
  /** What is added to |h| before ranks are chosen: fly's d. */
  readonly bias: Float32Array | null; // [rank]
}

/** A plain low-rank pair. */
export function servedPair(
  { block, projection }: ModuleRef,
  { rank, a, b }: Readonly<{ rank: number; a: Float64Array; b: Float64Array }>,
): ServedModule {
  const sizes = { in: a.length / rank, out: b.length / rank };
  return { block, projection, ...sizes, rank, a, b, gates: null, bias: null };
}
