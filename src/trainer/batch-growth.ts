// AdAdaGrad's norm test (Lau et al., arXiv 2402.11215): a batch is large enough when the variance of its mean gradient is
// below η² of that gradient's square. Small batches first, larger ones when the noise is what is left.

/** Of one batch. A sample is whatever the batch is counted in: an example, a window. */
export interface SampleStatistics {
  readonly samples: number;
  /** Σ‖gᵢ‖² over the samples. */
  readonly squaredNorms: number;
  /** ‖ḡ‖² of their mean. */
  readonly meanSquaredNorm: number;
}

export interface GrowthOptions {
  readonly eta: number;
  readonly max: number;
}

/** ‖Var‖₁, the sum of all numbers' variances over samples: no gradient of a sample has to be kept for it. */
export function varianceOf({ samples, squaredNorms, meanSquaredNorm }: SampleStatistics): number {
  return Math.max(0, squaredNorms - samples * meanSquaredNorm) / (samples - 1);
}

/** Never smaller, at most twice `current`: with few samples the test's own answer is far too low (measured in
 *  algorithms.md section 21), and after a doubling there are more. */
export function nextBatchSize(
  current: number,
  statistics: SampleStatistics,
  { eta, max }: GrowthOptions,
): number {
  if (statistics.samples < 2) return current;
  const wanted = Math.ceil(varianceOf(statistics) / (eta * eta * statistics.meanSquaredNorm));
  // Not a number where all gradients are zero.
  if (!(wanted > current)) return current;
  return Math.max(current, Math.min(wanted, 2 * current, max));
}
