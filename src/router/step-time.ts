// How long one engine step takes, learned online: ms = w · [1, decode rows, prefill tokens, decode ranks, prefill ranks,
// KV cells], by recursive least squares with forgetting (Haykin, Adaptive Filter Theory, ch. 10, in its Kalman form: the
// covariance is that of w, in ms²). Errors are taken relative to the step's length, because a 200 ms prefill step is off by
// more than a 10 ms decode step. w is kept ≥ 0, so a prediction never falls when work is added.

import { z } from 'zod';
import type { StepCosts, StepReport } from '../engine/messages.ts';

/** [1, decodeRows, prefillTokens, decodeRanks, prefillRanks, kvCells] */
export type StepWork = readonly [number, number, number, number, number, number];
const n = 6;

// The units in which w is learned, so that its entries are of one size: a typical busy step (guesses).
const scales: StepWork = [1, 8, 128, 128, 2048, 4096];
// Where learning starts, in ms per unit above: figures.md, eight rows of SmolLM2 on one core (31.7 ms a step without
// adapters, 15.6 ms for 128 ranks by mul_mat_id; 44 ms for 131,000 masked cells); prefill 150 tokens/s; the rest guesses. What was never seen keeps this
// value with this value as its own deviation, so unseen ranks look dear but not impossible.
const priors: readonly number[] = [8, 24, 850, 16, 250, 2];
const forgetting = 0.995; // a step counts half after 138 more
const noise = 0.1; // relative deviation of one step assumed by the filter (guess; sigma is measured separately)
const clipSigmas = 4;
const surprisesMax = 5; // guess: five pauses in a row are not pauses
const varianceGain = 0.02;
/** Steps before the innovation's own spread is known well enough to clip by. */
const warmupSteps = 8;
const msMin = 0.05;

export interface SavedStepTime {
  readonly steps: number;
  readonly weights: readonly number[];
  readonly covariance: readonly number[];
  readonly variance: number;
}
export const savedStepTime: z.ZodType<SavedStepTime> = z.strictObject({
  steps: z.number().int().nonnegative(),
  weights: z.array(z.number().nonnegative()).length(n),
  covariance: z.array(z.number()).length(n * n),
  variance: z.number().nonnegative(),
});

export interface StepEstimate {
  readonly ms: number;
  /** Deviation of the mean itself: large for work unlike any that was seen. */
  readonly doubtMs: number;
}

export function workOf(report: StepReport): StepWork {
  const { decodeRows, prefillTokens, decodeRanks, prefillRanks, kvCells } = report;
  return [1, decodeRows, prefillTokens, decodeRanks, prefillRanks, kvCells];
}

export class StepTime {
  #steps = 0;
  #weights: number[] = [...priors]; // [n], ms per scaled unit
  #covariance: Float64Array = new Float64Array(n * n); // [n, n], ms²
  #variance: number = noise ** 2; // of the relative innovation
  #surprises = 0; // clipped errors in a row, signed by their side

  constructor() {
    for (let i = 0; i < n; i++) this.#covariance[i * n + i] = priors[i]! ** 2;
  }

  get steps(): number {
    return this.#steps;
  }

  /** Relative deviation of one step around its prediction. */
  get relativeSigma(): number {
    return Math.sqrt(this.#variance);
  }

  get costs(): StepCosts {
    const [step, decodeRow, prefillToken, decodeRank, prefillRank, kvCell] = this.#weights.map(
      (weight, i) => weight / scales[i]!,
    );
    return {
      step: step!,
      decodeRow: decodeRow!,
      prefillToken: prefillToken!,
      decodeRank: decodeRank!,
      prefillRank: prefillRank!,
      kvCell: kvCell!,
    };
  }

  observe(report: StepReport): void {
    if (!(report.ms > 0) || !Number.isFinite(report.ms)) return;
    const x = workOf(report).map((value, i) => value / scales[i]!);
    if (!x.every((value) => value >= 0 && Number.isFinite(value))) return;
    const predicted = dot(this.#weights, x);
    const isWarm = this.#steps >= warmupSteps;
    // Before the filter has settled its own prediction may be far off, and dividing by it would weigh the step wrongly.
    const size = Math.max(msMin, isWarm ? predicted : Math.max(predicted, report.ms));
    let error = (report.ms - predicted) / size;
    if (isWarm) error = this.#clip(error);
    if (this.#steps > 0) this.#variance += varianceGain * (error * error - this.#variance);
    this.#update(x, error, size);
    this.#keepPositive();
    this.#steps++;
  }

  estimate(work: StepWork): StepEstimate {
    const x = work.map((value, i) => value / scales[i]!);
    const p = this.#times(x);
    return { ms: dot(this.#weights, x), doubtMs: Math.sqrt(Math.max(0, dot(p, x))) };
  }

  save(): SavedStepTime {
    return {
      steps: this.#steps,
      weights: [...this.#weights],
      covariance: [...this.#covariance],
      variance: this.#variance,
    };
  }

  restore(saved: SavedStepTime): void {
    this.#steps = saved.steps;
    this.#weights = [...saved.weights];
    this.#covariance = Float64Array.from(saved.covariance);
    this.#variance = saved.variance;
    this.#capCovariance();
  }

  /** A step during which the machine paused is ten times too long and says nothing about the next one; several in a row
   *  on the same side are a machine that changed, and then what was known counts for little. */
  #clip(error: number): number {
    const bound = clipSigmas * Math.sqrt(this.#variance);
    if (Math.abs(error) <= bound) {
      this.#surprises = 0;
      return error;
    }
    const side = Math.sign(error);
    this.#surprises = Math.sign(this.#surprises) === side ? this.#surprises + side : side;
    if (Math.abs(this.#surprises) < surprisesMax) return side * bound;
    this.#surprises = 0;
    this.#variance = error * error;
    for (let i = 0; i < n; i++) this.#covariance[i * n + i] = priors[i]! ** 2;
    this.#capCovariance();
    return error;
  }

  /** x [n], error relative to `size`: rows are divided by `size`, so that the noise is the same for all. */
  #update(x: readonly number[], error: number, size: number): void {
    const h = x.map((value) => value / size);
    const ph = this.#times(h); // [n]
    const gain = forgetting * noise * noise + dot(ph, h);
    for (let i = 0; i < n; i++) {
      this.#weights[i] = this.#weights[i]! + (ph[i]! / gain) * error;
      for (let j = 0; j < n; j++) {
        const p = this.#covariance[i * n + j]! - (ph[i]! * ph[j]!) / gain;
        this.#covariance[i * n + j] = p / forgetting;
      }
    }
    this.#capCovariance();
  }

  /** Forgetting inflates what is not seen without end; capped at the prior, where it says "unknown again". Scaling row and
   *  column alike keeps the matrix positive semi-definite and leaves what is being seen alone. */
  #capCovariance(): void {
    const p = this.#covariance;
    for (let i = 0; i < n; i++) {
      const excess = p[i * n + i]! / priors[i]! ** 2;
      if (excess <= 1) continue;
      const factor = 1 / Math.sqrt(excess);
      for (let j = 0; j < n; j++) {
        p[i * n + j] = p[i * n + j]! * factor;
        p[j * n + i] = p[j * n + i]! * factor;
      }
    }
  }

  /** Puts a negative weight on zero and moves the others to the best values given that (the constrained least-squares
   *  step in the metric of the covariance), worst first; clamping alone would bias every prediction upwards. */
  #keepPositive(): void {
    for (let round = 0; round < n; round++) {
      let worst = 0;
      for (let i = 1; i < n; i++) if (this.#weights[i]! < this.#weights[worst]!) worst = i;
      const excess = this.#weights[worst]!;
      if (excess >= 0) return;
      const pivot = Math.max(this.#covariance[worst * n + worst]!, Number.MIN_VALUE);
      for (let i = 0; i < n; i++) {
        this.#weights[i] = this.#weights[i]! - (this.#covariance[i * n + worst]! / pivot) * excess;
      }
      this.#weights[worst] = 0;
    }
    this.#weights = this.#weights.map((weight) => Math.max(0, weight));
  }

  #times(x: readonly number[]): number[] {
    const result = new Array<number>(n).fill(0);
    for (let i = 0; i < n; i++) {
      for (let j = 0; j < n; j++) result[i]! += this.#covariance[i * n + j]! * x[j]!;
    }
    return result;
  }
}

function dot(a: readonly number[], b: readonly number[]): number {
  let sum = 0;
  for (let i = 0; i < n; i++) sum += a[i]! * b[i]!;
  return sum;
}
