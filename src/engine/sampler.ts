// From logits to one token. Order: repetition penalty (prompt and answer), frequency and presence
// penalty (answer only), bias, temperature, top-k and min-p, top-p, draw. Log-probabilities are of the raw logits, before
// all of that, as OpenAI reports them. Selection is by radix histogram over the floats' bits: linear in the vocabulary
// whatever the logits are, where a sort of 49k entries takes 10 ms. Ties: the lower token id wins.

import { GatewayError } from '../errors.ts';
import type { Sampling } from './messages.ts';
import { drawUniform } from './random-draw.ts';

export interface Logprob {
  readonly token: number;
  readonly logprob: number;
}

/** What one sequence's answer has made so far, as far as penalties look. */
export interface SampleHistory {
  /** Tokens of the prompt. */
  readonly prompt: ReadonlySet<number>;
  /** Token of the answer → how often. */
  readonly counts: ReadonlyMap<number, number>;
}

export const noHistory: SampleHistory = { prompt: new Set(), counts: new Map() };

export function usesHistory(sampling: Sampling): boolean {
  return (
    sampling.repetitionPenalty !== 1 ||
    sampling.frequencyPenalty !== 0 ||
    sampling.presencePenalty !== 0
  );
}

/** Index of the largest logit. Throws ENGINE_FAILED when one is NaN or infinite: such a row has no answer. */
export function greedyToken(logits: Float32Array): number {
  let best = 0;
  let max = Number.NEGATIVE_INFINITY;
  let poison = 0;
  for (let i = 0; i < logits.length; i++) {
    const x = logits[i]!;
    poison += x * 0; // NaN for NaN and ±Infinity, and NaN stays
    if (x > max) {
      max = x;
      best = i;
    }
  }
  if (poison !== 0) throw new GatewayError('ENGINE_FAILED', 'the model produced no finite logits');
  return best;
}

/** Below this a temperature is greedy: the division by it would overflow before it changed an answer. */
const temperatureMin = 1e-5;

/** Work arrays for one vocabulary, shared by all sequences of a loop. */
export class Sampler {
  readonly #logits: Float32Array; // [V], adjusted
  readonly #bits: Uint32Array; // [V], the same memory
  readonly #weights: Float64Array; // [V], exp((logit - max) / temperature); 0 = out
  readonly #kept: Uint32Array; // [V], ids still in, ascending
  readonly #edge: Uint32Array; // [V], ids that a cut still has to tell apart
  readonly #histogram: Float64Array = new Float64Array(2048);

  constructor(vocabSize: number) {
    this.#logits = new Float32Array(vocabSize);
    this.#bits = new Uint32Array(this.#logits.buffer);
    this.#weights = new Float64Array(vocabSize);
    this.#kept = new Uint32Array(vocabSize);
    this.#edge = new Uint32Array(vocabSize);
  }

  /** Draw `index` of this sequence. Borrows `logits` [V] and does not change them. Throws ENGINE_FAILED as greedyToken
   *  does. */
  sample(logits: Float32Array, sampling: Sampling, history: SampleHistory, index: number): number {
    const rawBest = greedyToken(logits);
    const isPlain = !usesHistory(sampling) && sampling.logitBias.length === 0;
    const isGreedy = sampling.temperature < temperatureMin;
    if (isPlain && isGreedy) return rawBest;
    this.#logits.set(logits);
    if (!isPlain) adjust(this.#logits, sampling, history);
    const best = isPlain ? rawBest : greedyToken(this.#logits);
    if (isGreedy) return best;

    // Before the exponentials: top-k and min-p both keep a prefix of the same order, so they commute.
    let count = this.#keepTop(sampling.topK);
    count = this.#weigh(count, best, sampling);
    if (sampling.topP < 1) count = this.#keepMass(count, sampling.topP);
    return this.#draw(count, drawUniform(sampling.seed, index));
  }

  #keepTop(k: number): number {
    const all = this.#logits.length;
    if (k > 0 && k <= likeliestMax) {
      const top = likeliest(this.#logits, k).sort((a, b) => a - b);
      this.#kept.set(top);
      return top.length;
    }
    for (let i = 0; i < all; i++) this.#kept[i] = i;
    if (k === 0 || k >= all) return all;
    return this.#keepFrom(all, this.#cut(all, k, 'count'), 'count');
  }

  /** Weighs the kept tokens and drops what min-p does not let through; returns how many stay. */
  #weigh(count: number, best: number, { temperature, minP }: Sampling): number {
    const max = this.#logits[best]!;
    const inverse = 1 / temperature;
    let out = 0;
    for (let i = 0; i < count; i++) {
      const token = this.#kept[i]!;
      // Relative to the best token, whose weight is 1: min-p needs no normalisation.
      const weight = Math.exp((this.#logits[token]! - max) * inverse);
      if (weight < minP || weight === 0) continue;
      this.#weights[token] = weight;
      this.#kept[out] = token;
      out += 1;
    }
    return out;
  }

  /** The smallest set of likeliest tokens whose share of what is kept reaches `p`. */
  #keepMass(count: number, p: number): number {
    let total = 0;
    for (let i = 0; i < count; i++) total += this.#weights[this.#kept[i]!]!;
    // A token this light cannot be in the set: all such together weigh less than the share that stays outside.
    const light = (0.999 * (1 - p) * total) / count;
    let heavy = 0;
    for (let i = 0; i < count; i++) {
      const token = this.#kept[i]!;
      if (this.#weights[token]! < light) continue;
      this.#kept[heavy] = token;
      heavy += 1;
    }
    return this.#keepFrom(heavy, this.#cut(heavy, p * total, 'weight'), 'weight');
  }

  /** Where the order by logit reaches an accumulated `target`: the bit key there, and what is left to take of it. */
  #cut(count: number, target: number, measure: Measure): Cut {
    let left = target;
    let key = 0;
    let edge = this.#kept;
    let edges = count;
    for (const { shift, width } of digits) {
      const histogram = this.#histogram.fill(0);
      for (let i = 0; i < edges; i++) {
        const token = edge[i]!;
        const digit = (orderKey(this.#bits[token]!) >>> shift) & (width - 1);
        histogram[digit] = histogram[digit]! + (measure === 'count' ? 1 : this.#weights[token]!);
      }
      // Rounding can leave the last non-empty bucket a hair short of the target: stop there at the latest.
      let lowest = 0;
      while (lowest < width - 1 && histogram[lowest] === 0) lowest += 1;
      let digit = width - 1;
      while (digit > lowest && histogram[digit]! < left) {
        left -= histogram[digit]!;
        digit -= 1;
      }
      key = (key | (digit << shift)) >>> 0;
      // Only the bucket that the cut falls into is looked at again, a digit further down.
      let next = 0;
      for (let i = 0; i < edges; i++) {
        const token = edge[i]!;
        if (((orderKey(this.#bits[token]!) >>> shift) & (width - 1)) !== digit) continue;
        this.#edge[next] = token;
        next += 1;
      }
      edge = this.#edge;
      edges = next;
    }
    return { key, left };
  }

  /** Keeps what lies above the cut and, of the ties at it, the first ones that fill it up. */
  #keepFrom(count: number, cut: Cut, measure: Measure): number {
    let left = cut.left;
    let out = 0;
    for (let i = 0; i < count; i++) {
      const token = this.#kept[i]!;
      const key = orderKey(this.#bits[token]!);
      if (key < cut.key) continue;
      if (key === cut.key) {
        if (left <= 0) continue;
        left -= measure === 'count' ? 1 : this.#weights[token]!;
      }
      this.#kept[out] = token;
      out += 1;
    }
    return out;
  }

  /** Inverse of the cumulative distribution over the kept tokens, in order of id. */
  #draw(count: number, uniform: number): number {
    let total = 0;
    for (let i = 0; i < count; i++) total += this.#weights[this.#kept[i]!]!;
    const target = uniform * total;
    let sum = 0;
    for (let i = 0; i < count; i++) {
      const token = this.#kept[i]!;
      sum += this.#weights[token]!;
      if (sum > target) return token;
    }
    return this.#kept[count - 1]!; // target rounded up to the total
  }
}

interface Cut {
  readonly key: number;
  readonly left: number;
}

/** What a cut adds up: tokens (top-k) or their weights (top-p). */
type Measure = 'count' | 'weight';

/** 32 bits from the top in three digits. */
const digits = [
  { shift: 21, width: 2048 },
  { shift: 10, width: 2048 },
  { shift: 0, width: 1024 },
] as const;

/** Orders the bits of finite floats as the floats are: flips negatives wholly, and the sign of the rest. -0 is +0. */
function orderKey(bits: number): number {
  if (bits === 0x80000000) return bits;
  return (bits >>> 31 === 1 ? ~bits : bits | 0x80000000) >>> 0;
}

const f32Max = (2 - 2 ** -23) * 2 ** 127;

function adjust(logits: Float32Array, sampling: Sampling, history: SampleHistory): void {
  const { repetitionPenalty, frequencyPenalty, presencePenalty } = sampling;
  const repeat = (token: number): void => {
    const x = logits[token];
    if (x === undefined) return;
    const changed = x > 0 ? x / repetitionPenalty : x * repetitionPenalty;
    // A penalty near 0 leaves the range of f32; an infinite logit would fail the row as the model's own fault.
    logits[token] = Math.min(changed, f32Max);
  };
  if (repetitionPenalty !== 1) {
    for (const token of history.prompt) if (!history.counts.has(token)) repeat(token);
    for (const token of history.counts.keys()) repeat(token);
  }
  for (const [token, times] of history.counts) {
    const x = logits[token];
    if (x !== undefined) logits[token] = x - frequencyPenalty * times - presencePenalty;
  }
  for (const [token, bias] of sampling.logitBias) {
    const x = logits[token];
    if (x !== undefined) logits[token] = x + bias;
  }
}

/** Log-softmax of the raw logits: the chosen token's, and the `count` likeliest, best first. */
export function logprobsOf(
  logits: Float32Array,
  token: number,
  count: number,
): { readonly logprob: number; readonly top: readonly Logprob[] } {
  const max = logits[greedyToken(logits)]!;
  let sum = 0;
  for (let i = 0; i < logits.length; i++) sum += Math.exp(logits[i]! - max);
  const logTotal = max + Math.log(sum);
  return {
    logprob: logits[token]! - logTotal,
    top: likeliest(logits, count).map((one) => ({ token: one, logprob: logits[one]! - logTotal })),
  };
}

/** Up to here an insertion list beats the radix cut, also when the logits ascend. */
const likeliestMax = 64;

/** Ids of the `count` largest logits, best first. */
function likeliest(logits: Float32Array, count: number): number[] {
  const top: number[] = [];
  if (count === 0) return top;
  let least = Number.NEGATIVE_INFINITY;
  for (let i = 0; i < logits.length; i++) {
    const x = logits[i]!;
    if (top.length === count && x <= least) continue;
    let at = top.length;
    while (at > 0 && logits[top[at - 1]!]! < x) at -= 1;
    top.splice(at, 0, i);
    if (top.length > count) top.pop();
    least = logits[top.at(-1)!]!;
  }
  return top;
}
