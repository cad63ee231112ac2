// The learning rate of each step: up in a line, then down along half a cosine, or level.

export interface RateOptions {
  /** The highest. */
  readonly learningRate: number;
  /** Of all steps. */
  readonly warmupShare: number;
  readonly schedule: 'cosine' | 'constant';
}

/** Of step 0 … steps-1. No step has the rate 0: the first of n warming up has 1/n, and half a cosine after the last step
 *  would reach it. */
export function learningRateAt(step: number, steps: number, options: RateOptions): number {
  const { learningRate, warmupShare, schedule } = options;
  const warming = Math.ceil(warmupShare * steps);
  if (step < warming) return (learningRate * (step + 1)) / warming;
  if (schedule === 'constant') return learningRate;
  return (learningRate * (1 + Math.cos((Math.PI * (step - warming)) / (steps - warming)))) / 2;
}
