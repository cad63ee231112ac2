// From logits to one token. Order: repetition penalty (prompt and answer), frequency and presence penalty (answer only),
// bias, temperature, top-k and min-p, top-p, draw. Log-probabilities are of the raw logits, before all of that, as OpenAI
// reports them. Only row-math.ts reads a whole row; the rest follows the blocks that can matter. Cuts are by radix
// histogram over the floats' bits: linear, where sorting 49k entries takes 10 ms. Ties: the lower token id wins.

import { GatewayError } from '../errors.ts';
import { blockNumbers, plainRowMath, type RowMath, type RowScale } from '../kernels/row-math.ts';
import type { Sampling } from './messages.ts';
import { adjust, type SampleHistory, usesHistory } from './penalties.ts';
import { drawUniform } from './random-draw.ts';

export interface Logprob {
  readonly token: number;
  readonly logprob: number;
}

export interface TokenLogprobs {
  readonly logprob: number;
  readonly top: readonly Logprob[];
}

/** Below this a temperature is greedy: the division by it would overflow before it changed an answer. */
const temperatureMin = 1e-5;

/** Work arrays for one vocabulary, shared by all sequences of a loop. */
export class Sampler {
  readonly #math: RowMath;
  readonly #maxima: Float32Array; // [V / 64], of the row that is being sampled
  readonly #maximaBits: Uint32Array;
  readonly #masses: Float64Array; // [V / 64]
  readonly #adjusted: Float32Array; // [V]
  readonly #weights: Float64Array; // [V], of kept tokens: exp((logit - max) / temperature)
  readonly #kept: Uint32Array; // [V], ids still in, ascending
  readonly #edge: Uint32Array; // [V], ids that a cut still has to tell apart
  readonly #histogram: Float64Array = new Float64Array(2048);
  #row: Float32Array; // [V], the logits in question and their bits
  #bits: Uint32Array;

  constructor(vocabSize: number, math: RowMath = plainRowMath) {
    this.#math = math;
    this.#maxima = new Float32Array(Math.ceil(vocabSize / blockNumbers));
    this.#maximaBits = bitsOf(this.#maxima);
    this.#masses = new Float64Array(this.#maxima.length);
    this.#adjusted = new Float32Array(vocabSize);
    this.#weights = new Float64Array(vocabSize);
    this.#kept = new Uint32Array(vocabSize);
    this.#edge = new Uint32Array(vocabSize);
    this.#row = this.#adjusted;
    this.#bits = bitsOf(this.#row);
  }

  /** Draw `index` of this sequence. Borrows `logits` [V] and does not change them. Throws ENGINE_FAILED when one is NaN
   *  or infinite: such a row has no answer. */
  sample(logits: Float32Array, sampling: Sampling, history: SampleHistory, index: number): number {
    let row = logits;
    if (usesHistory(sampling) || sampling.logitBias.length > 0) {
      row = this.#adjusted;
      row.set(logits);
      adjust(row, sampling, history);
    }
    const best = this.#read(row);
    if (sampling.temperature < temperatureMin) return best;
    const { topK, topP, minP } = sampling;
    const max = row[best]!;
    const uniform = drawUniform(sampling.seed, index);
    if (topK === 0 && minP === 0) {
      const scale = { max, maxima: this.#maxima, inverse: 1 / sampling.temperature };
      const total = this.#math.masses(row, scale, this.#masses);
      if (topP === 1) return this.#drawFromAll(uniform * total, scale);
      return this.#draw(this.#nucleus(total, max, sampling), uniform);
    }
    // Before the exponentials: top-k and min-p both keep a prefix of the same order, so they commute.
    let count = this.#gather(Math.max(this.#leastOf(topK), lowestLogit(minP, max, sampling)));
    if (topK > 0 && topK < count) {
      count = this.#keepFrom(count, this.#cut(this.#kept, count, topK), null);
    }
    count = this.#weigh(count, max, sampling);
    if (topP < 1) count = this.#keepMass(count, topP * this.#sum(count));
    return this.#draw(count, uniform);
  }

  /** Log-softmax of `logits`: the chosen token's, and the `count` likeliest, best first. */
  logprobs(logits: Float32Array, token: number, count: number): TokenLogprobs {
    const max = logits[this.#read(logits)]!;
    const scale = { max, maxima: this.#maxima, inverse: 1 };
    const logTotal = max + Math.log(this.#math.masses(logits, scale, this.#masses));
    const found = count === 0 ? 0 : this.#gather(this.#leastOf(count));
    const top = [...this.#kept.subarray(0, found)]
      .sort((a, b) => logits[b]! - logits[a]! || a - b)
      .slice(0, count);
    return {
      logprob: logits[token]! - logTotal,
      top: top.map((one) => ({ token: one, logprob: logits[one]! - logTotal })),
    };
  }

  /** Makes `row` the one in question; returns the index of its largest logit, the first of equals. */
  #read(row: Float32Array): number {
    if (!this.#math.maxima(row, this.#maxima)) {
      throw new GatewayError('ENGINE_FAILED', 'the model produced no finite logits');
    }
    if (row !== this.#row) this.#bits = bitsOf(row);
    this.#row = row;
    const maxima = this.#maxima;
    let block = 0;
    for (let i = 1; i < maxima.length; i++) if (maxima[i]! > maxima[block]!) block = i;
    let best = block * blockNumbers;
    while (row[best]! !== maxima[block]!) best += 1;
    return best;
  }

  /** A logit that at least `count` logits reach, as so many blocks' maxima do; -Infinity when that does not tell. */
  #leastOf(count: number): number {
    const blocks = this.#maxima.length;
    if (count === 0 || count > blocks) return Number.NEGATIVE_INFINITY;
    const bits = this.#bits;
    this.#bits = this.#maximaBits;
    for (let i = 0; i < blocks; i++) this.#kept[i] = i;
    const { key } = this.#cut(this.#kept, blocks, count);
    this.#bits = bits;
    return logitOf(key);
  }

  /** Keeps every token whose logit is at least `least`; returns how many. */
  #gather(least: number): number {
    const row = this.#row;
    let out = 0;
    for (let block = 0; block < this.#maxima.length; block++) {
      if (this.#maxima[block]! < least) continue;
      const end = Math.min((block + 1) * blockNumbers, row.length);
      for (let i = block * blockNumbers; i < end; i++) {
        if (row[i]! < least) continue;
        this.#kept[out] = i;
        out += 1;
      }
    }
    return out;
  }

  /** Keeps the smallest set of likeliest tokens whose share of all, `total`, reaches top-p: looks below the likeliest
   *  only as far as it must. */
  #nucleus(total: number, max: number, sampling: Sampling): number {
    const target = sampling.topP * total;
    // A token this light cannot be in the set: all such together weigh less than the share that stays outside.
    const light = (0.999 * (1 - sampling.topP) * total) / this.#row.length;
    for (let weight = 0.01 * total; ; weight /= 16) {
      const least = lowestLogit(Math.max(weight, light), max, sampling);
      const count = this.#weigh(this.#gather(least), max, { ...sampling, minP: 0 });
      if (weight <= light || this.#sum(count) >= target) return this.#keepMass(count, target);
    }
  }

  /** Weighs the kept tokens and drops what min-p does not let through; returns how many stay. */
  #weigh(count: number, max: number, { temperature, minP }: Sampling): number {
    const inverse = 1 / temperature;
    let out = 0;
    for (let i = 0; i < count; i++) {
      const token = this.#kept[i]!;
      // Relative to the best token, whose weight is 1: min-p needs no normalisation.
      const weight = Math.exp((this.#row[token]! - max) * inverse);
      if (weight < minP || weight === 0) continue;
      this.#weights[token] = weight;
      this.#kept[out] = token;
      out += 1;
    }
    return out;
  }

  /** The smallest set of the likeliest kept tokens whose weight reaches `target`. */
  #keepMass(count: number, target: number): number {
    return this.#keepFrom(
      count,
      this.#cut(this.#kept, count, target, this.#weights),
      this.#weights,
    );
  }

  #sum(count: number): number {
    let sum = 0;
    for (let i = 0; i < count; i++) sum += this.#weights[this.#kept[i]!]!;
    return sum;
  }

  /** Where the order by logit reaches an accumulated `target` of tokens, or of their weights: the bit key there, and what is
   *  left to take of it. */
  #cut(ids: Uint32Array, count: number, target: number, weights: Float64Array | null = null): Cut {
    let left = target;
    let key = 0;
    let edge = ids;
    let edges = count;
    for (const { shift, width } of digits) {
      const histogram = this.#histogram.fill(0);
      for (let i = 0; i < edges; i++) {
        const token = edge[i]!;
        const digit = (orderKey(this.#bits[token]!) >>> shift) & (width - 1);
        histogram[digit] = histogram[digit]! + (weights === null ? 1 : weights[token]!);
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
  #keepFrom(count: number, cut: Cut, weights: Float64Array | null): number {
    let left = cut.left;
    let out = 0;
    for (let i = 0; i < count; i++) {
      const token = this.#kept[i]!;
      const key = orderKey(this.#bits[token]!);
      if (key < cut.key) continue;
      if (key === cut.key) {
        if (left <= 0) continue;
        left -= weights === null ? 1 : weights[token]!;
      }
      this.#kept[out] = token;
      out += 1;
    }
    return out;
  }

  /** Inverse of the cumulative distribution over the kept tokens, in order of id. */
  #draw(count: number, uniform: number): number {
    const target = uniform * this.#sum(count);
    let sum = 0;
    for (let i = 0; i < count; i++) {
      const token = this.#kept[i]!;
      sum += this.#weights[token]!;
      if (sum > target) return token;
    }
    return this.#kept[count - 1]!; // target rounded up to the total
  }

  /** The same over all tokens: finds the block by its mass, then the token in it. */
  #drawFromAll(target: number, { max, inverse }: RowScale): number {
    let block = 0;
    let sum = 0; // before the block
    let next = 0;
    for (let i = 0; i < this.#masses.length && next <= target; i++) {
      if (this.#masses[i] === 0) continue;
      block = i;
      sum = next;
      next += this.#masses[i]!;
    }
    let last = block * blockNumbers;
    const end = Math.min(last + blockNumbers, this.#row.length);
    for (let token = last; token < end; token++) {
      const weight = Math.exp((this.#row[token]! - max) * inverse);
      if (weight > 0) last = token;
      sum += weight;
      if (sum > target) return token;
    }
    return last; // target rounded up to the total
  }
}

/** A logit below which every weight is below `weight`. */
function lowestLogit(weight: number, max: number, { temperature }: Sampling): number {
  const depth = temperature * Math.log(weight);
  return max + depth - 1e-9 * (Math.abs(max) + Math.abs(depth)); // the weight itself decides, where it is asked
}

function bitsOf({ buffer, byteOffset, length }: Float32Array): Uint32Array {
  return new Uint32Array(buffer, byteOffset, length);
}

interface Cut {
  readonly key: number;
  readonly left: number;
}

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

const oneKey = new Uint32Array(1);
const oneLogit: Float32Array = new Float32Array(oneKey.buffer);

/** The inverse of orderKey. */
function logitOf(key: number): number {
  oneKey[0] = key >>> 31 === 1 ? key & 0x7fffffff : ~key;
  return oneLogit[0]!;
}
