// How long an adapter's answers get, learned from answers of which many were cut at the caller's limit. Cutting censors:
// an answer cut at 20 tokens says "at least 20", so lengths are kept as a survival curve (Kaplan and Meier 1958) over
// power-of-two buckets, with old answers fading. Before anything is known an answer is expected to use its whole limit.

import { LRUCache } from 'lru-cache';
import { z } from 'zod';

const bucketCount = 18; // bucket b holds lengths [2^b, 2^(b+1)); 2^18 tokens is beyond any context here
const keep = 0.98; // guess: an answer counts half after 34 more
const priorAnswers = 0.5; // guess: endless answers assumed per bucket before any is seen; fades with evidence

export interface AnswerLength {
  readonly mean: number; // tokens
  readonly deviation: number;
}

export interface Curve {
  /** Answers that reached the bucket, and those of them that stopped inside it. */
  readonly reached: number[];
  readonly stopped: number[];
}

export type SavedCurves = Array<[name: string, curve: Curve]>;
export const savedCurves: z.ZodType<SavedCurves> = z
  .array(
    z.tuple([
      z.string().max(2048),
      z.strictObject({
        reached: z.array(z.number().nonnegative()).length(bucketCount),
        stopped: z.array(z.number().nonnegative()).length(bucketCount),
      }),
    ]),
  )
  .max(10_000);

const bucketOf = (tokens: number): number =>
  Math.min(bucketCount - 1, Math.floor(Math.log2(Math.max(1, tokens))));

export class AnswerLengths {
  readonly #curves: LRUCache<string, Curve>;

  constructor(adaptersMax: number) {
    this.#curves = new LRUCache({ max: adaptersMax });
  }

  /** `adapter` '' is the base model. A cut answer reached its last bucket and is not known to have stopped there. */
  learn(adapter: string, tokens: number, isCut: boolean): void {
    let curve = this.#curves.get(adapter);
    if (curve === undefined) {
      curve = {
        reached: new Array<number>(bucketCount).fill(0),
        stopped: new Array<number>(bucketCount).fill(0),
      };
      this.#curves.set(adapter, curve);
    }
    const last = bucketOf(tokens);
    for (let b = 0; b < bucketCount; b++) {
      curve.reached[b] = curve.reached[b]! * keep;
      curve.stopped[b] = curve.stopped[b]! * keep;
      // Cut inside its last bucket: it left before the bucket could decide, so it does not count as reached.
      if (b < last || (b === last && !isCut)) curve.reached[b] = curve.reached[b]! + 1;
    }
    if (!isCut) curve.stopped[last] = curve.stopped[last]! + 1;
  }

  expect(adapter: string, tokensMax: number): AnswerLength {
    const curve = this.#curves.get(adapter);
    if (curve === undefined) return { mean: tokensMax, deviation: 0 };
    let alive = 1;
    let mean = 0;
    let square = 0;
    for (let b = 0; b < bucketCount && 2 ** b <= tokensMax; b++) {
      const reached = curve.reached[b]!;
      const stops = alive * (curve.stopped[b]! / (reached + priorAnswers / (1 + reached)));
      const tokens = Math.min(tokensMax, 1.5 * 2 ** b); // the bucket's middle
      mean += stops * tokens;
      square += stops * tokens * tokens;
      alive -= stops;
    }
    mean += alive * tokensMax;
    square += alive * tokensMax * tokensMax;
    // A long tail has a deviation beyond the limit itself, but no answer is longer than tokensMax: mean + 2 deviations,
    // which is what the guard uses, must not be either.
    const deviation = Math.sqrt(Math.max(0, square - mean * mean));
    return { mean: Math.max(1, mean), deviation: Math.min(deviation, (tokensMax - mean) / 2) };
  }

  save(): SavedCurves {
    return [...this.#curves.entries()];
  }

  restore(saved: SavedCurves): void {
    for (const [name, curve] of saved.toReversed()) this.#curves.set(name, curve);
  }
}
