// How far times come out from what was predicted, as a variance. What happens to a request on its way adds up like arrivals
// do, so variance goes with the predicted time: a variance per ms is learned, of all and of each octave of the predicted
// time, for where bursts or idle hours make it otherwise. Old errors fade. No clock.

import { z } from 'zod';

const octaves = 24; // [2^b, 2^(b+1)) ms; beyond four hours is one
const keepErrors = 100; // guess: an error counts 1/e after so many more
/** What all errors weigh against an octave's own, in errors (guess). */
const priorErrors = 4;
/** Before any error was seen: relative deviation (guess). */
const relativeStart = 0.25;
/** A machine that stood still makes one error huge: more than this, relative to the prediction, counts as this (guess). */
const relativeMax = 4;

export interface SavedSpread {
  /** Per octave, then of all: errors, and the sum of their squares per predicted ms. */
  readonly counts: readonly number[];
  readonly sums: readonly number[];
}
const amounts = z.array(z.number().nonnegative()).length(octaves + 1);
export const savedSpread: z.ZodType<SavedSpread> = z.strictObject({
  counts: amounts,
  sums: amounts,
});

export class ErrorSpread {
  #counts: number[] = new Array<number>(octaves + 1).fill(0);
  #sums: number[] = new Array<number>(octaves + 1).fill(0);

  /** `weight`: how much of an error it is, where many happen together; in (0, 1]. */
  learn(predictedMs: number, actualMs: number, weight: number): void {
    if (!(predictedMs > 0)) return;
    const errorMs = Math.min(relativeMax * predictedMs, Math.abs(actualMs - predictedMs));
    const keep = 1 - weight / keepErrors;
    for (const i of [octaves, Math.min(octaves - 1, Math.floor(octaveOf(predictedMs)))]) {
      this.#counts[i] = keep * this.#counts[i]! + weight;
      this.#sums[i] = keep * this.#sums[i]! + (weight * errorMs ** 2) / predictedMs;
    }
  }

  /** In ms². */
  variance(predictedMs: number): number {
    const count = this.#counts[octaves]!;
    if (count === 0) return (relativeStart * predictedMs) ** 2;
    const all = (relativeStart ** 2 * predictedMs + this.#sums[octaves]!) / (1 + count);
    const perMs = (octave: number): number => {
      const i = Math.min(octaves - 1, Math.max(0, octave));
      return (priorErrors * all + this.#sums[i]!) / (priorErrors + this.#counts[i]!);
    };
    // Between the middles of two octaves on the line.
    const place = octaveOf(predictedMs) - 0.5;
    const low = Math.floor(place);
    return predictedMs * (perMs(low) + (place - low) * (perMs(low + 1) - perMs(low)));
  }

  save(): SavedSpread {
    return { counts: [...this.#counts], sums: [...this.#sums] };
  }

  restore({ counts, sums }: SavedSpread): void {
    this.#counts = [...counts];
    this.#sums = [...sums];
  }
}

function octaveOf(ms: number): number {
  return Math.log2(Math.max(1, ms));
}
