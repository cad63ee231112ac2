// A small critic, Q(x) = w · tanh(W x), learned by one-step temporal differences against a copy of itself that follows slowly
// (SARSA with a target network). Optionally held to BEER's bound.

import { z } from 'zod';
import { GatewayError } from '../errors.ts';
import { beerTerm } from './beer.ts';

const width = 8; // H, guess
const rate = 0.005; // the test's queue: 0.69 off the true values after 20,000 decisions, at 0.02 1.11
const follow = 0.005; // τ of algorithms.md section 16
const beerWeight = 1e-3; // β of the same

export interface SavedCritic {
  readonly hidden: number[]; // W [H, inputs]
  readonly last: number[]; // w [H]
}
export const savedCritic: z.ZodType<SavedCritic> = z.strictObject({
  hidden: z.array(z.number()),
  last: z.array(z.number()).length(width),
});

export interface CriticOptions {
  /** γ in [0, 1). */
  readonly discount: number;
  readonly regularizer: 'none' | 'beer';
}

interface Layers {
  readonly hidden: Float64Array; // W [H, inputs]
  readonly last: Float64Array; // w [H]
}

export class Critic {
  readonly #options: CriticOptions;
  readonly #inputs: number;
  readonly #own: Layers;
  readonly #target: Layers;

  /** `inputs`: numbers of x, each about 0…1. Throws INVALID_REQUEST for BEER without a discount. */
  constructor(inputs: number, options: CriticOptions) {
    if (options.regularizer === 'beer' && !(options.discount > 0)) {
      throw new GatewayError('INVALID_REQUEST', 'BEER needs a discount above 0');
    }
    this.#options = options;
    this.#inputs = inputs;
    // Spread over (−1, 1) without a generator: rows must only differ.
    const hidden = Float64Array.from({ length: width * inputs }, (_, i) => Math.sin(7 * i + 1));
    this.#own = { hidden, last: new Float64Array(width) };
    this.#target = { hidden: hidden.slice(), last: new Float64Array(width) };
  }

  value(x: Float64Array): number {
    return dot(this.#own.last, this.#features(this.#own, x));
  }

  /** What followed from x: a reward at once, and then a decision with the features `next`. */
  learn(x: Float64Array, reward: number, next: Float64Array): void {
    const { discount, regularizer } = this.#options;
    const { hidden, last } = this.#own;
    const phi = this.#features(this.#own, x); // [H]
    const phiNext = this.#features(this.#target, next); // [H]
    const error = reward + discount * dot(this.#target.last, phiNext) - dot(last, phi);
    const weightNorm = Math.hypot(...last);
    const beer =
      regularizer === 'beer'
        ? beerTerm({ phi, phiNext, weightNorm, reward, discount }).gradient
        : null;
    for (let i = 0; i < width; i++) {
      const slope = (error * last[i]! - beerWeight * (beer?.[i] ?? 0)) * (1 - phi[i]! ** 2);
      last[i]! += rate * error * phi[i]!;
      for (let j = 0; j < this.#inputs; j++) hidden[i * this.#inputs + j]! += rate * slope * x[j]!;
    }
    approach(this.#target.hidden, hidden);
    approach(this.#target.last, last);
  }

  #features({ hidden }: Layers, x: Float64Array): Float64Array {
    return Float64Array.from({ length: width }, (_, i) =>
      Math.tanh(dot(hidden.subarray(i * this.#inputs, (i + 1) * this.#inputs), x)),
    );
  }

  save(): SavedCritic {
    return { hidden: [...this.#own.hidden], last: [...this.#own.last] };
  }

  /** False, and nothing changed, for one of another number of inputs. */
  restore({ hidden, last }: SavedCritic): boolean {
    if (hidden.length !== width * this.#inputs) return false;
    for (const { hidden: into, last: intoLast } of [this.#own, this.#target]) {
      into.set(hidden);
      intoLast.set(last);
    }
    return true;
  }
}

function approach(target: Float64Array, own: Float64Array): void {
  for (let i = 0; i < own.length; i++) target[i]! += follow * (own[i]! - target[i]!);
}

function dot(a: Float64Array, b: Float64Array): number {
  let sum = 0;
  for (let i = 0; i < a.length; i++) sum += a[i]! * b[i]!;
  return sum;
}
