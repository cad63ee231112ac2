// A Stepper that computes nothing and takes as long as the machine would: its step moves the clock. What it "says" is one
// token again and again, and the end token when the request has had its answer. It knows a request by the number that its
// prompt begins with, and only from its cells, as a model would.

import { projections } from '../../../src/model/decoder-config.ts';
import type { Segment, Stepper, StepResult } from '../../../src/model/stepper.ts';
import { fakeConfig } from '../fake-stepper.ts';
import { type Machine, noiseAt, type RequestSize, stepMs } from './machine.ts';
import type { SimulatedClock } from './simulated-clock.ts';

const { vocabSize } = fakeConfig;
/** Tokens of a prompt that say which request it is: 16.7 million of them. */
export const numberTokens = 4;
export const endToken = 0;
const wordToken = 1;

/** A prompt of so many tokens that begins with `number`. */
export function numberedPrompt(number: number, tokens: number): Int32Array {
  if (tokens < numberTokens) throw new RangeError(`a prompt of ${tokens} tokens`);
  const prompt = new Int32Array(tokens).fill(wordToken);
  for (let i = 0, rest = number; i < numberTokens; i++, rest = Math.floor(rest / vocabSize)) {
    prompt[i] = rest % vocabSize;
  }
  return prompt;
}

export interface SimulatedStepperOptions {
  readonly machine: Machine;
  readonly seed: number;
  readonly clock: SimulatedClock;
  readonly sizeOf: (number: number) => RequestSize;
}

export class SimulatedStepper implements Stepper {
  readonly config: Stepper['config'] = fakeConfig;
  readonly pageBytes = 1000;
  readonly cells: number;
  readonly pages: number;
  readonly tokensMax: number;
  readonly segmentsMax: number;
  steps = 0;
  readonly #options: SimulatedStepperOptions;
  readonly #tokens: Int32Array; // [cells]
  readonly #word: Float32Array = logitsOf(wordToken);
  readonly #end: Float32Array = logitsOf(endToken);

  constructor(options: SimulatedStepperOptions) {
    this.#options = options;
    const { cells, pages, tokensMax, segmentsMax } = options.machine;
    this.cells = cells;
    this.pages = pages;
    this.tokensMax = tokensMax;
    this.segmentsMax = segmentsMax;
    this.#tokens = new Int32Array(cells);
  }

  step(segments: readonly Segment[]): StepResult {
    this.steps += 1;
    const { machine, clock, seed } = this.#options;
    const work = { decodeRows: 0, prefillTokens: 0, decodeRanks: 0, prefillRanks: 0, kvCells: 0 };
    let tokens = 0;
    for (const segment of segments) {
      const count = segment.tokens.length;
      const ranks = count * (segment.adapter?.rank ?? 0);
      this.#tokens.set(segment.tokens, segment.cellBase + segment.position);
      tokens += count;
      work.kvCells += count * segment.position + (count * (count + 1)) / 2;
      if (this.#isPrompt(segment)) {
        work.prefillTokens += count;
        work.prefillRanks += ranks;
      } else {
        work.decodeRows += count;
        work.decodeRanks += ranks;
      }
    }
    if (tokens > this.tokensMax || segments.length > this.segmentsMax || tokens === 0) {
      throw new Error(`${segments.length} segments, ${tokens} tokens`);
    }
    clock.advance(stepMs(machine.cost, work) * noiseAt(machine, seed, clock.nowMs()));
    const logits = (index: number): Float32Array =>
      this.#isAnswered(segments[index]!) ? this.#end : this.#word;
    return {
      logits,
      argmax: (index) => (logits(index) === this.#end ? endToken : wordToken),
      atomWeights: () => null,
    };
  }

  /** Several tokens at once are a prompt, or an answer that is computed again. */
  #isPrompt(segment: Segment): boolean {
    if (segment.tokens.length > 1 || !segment.wantsLogits) return true;
    return segment.position < this.#sizeOf(segment).promptTokens;
  }

  #isAnswered(segment: Segment): boolean {
    const { promptTokens, answerTokens } = this.#sizeOf(segment);
    return segment.position + segment.tokens.length - promptTokens >= answerTokens;
  }

  #sizeOf({ cellBase }: Segment): RequestSize {
    let number = 0;
    for (let i = numberTokens - 1; i >= 0; i--) {
      number = number * vocabSize + this.#tokens[cellBase + i]!;
    }
    return this.#options.sizeOf(number);
  }

  copyCells(from: number, to: number, count: number): void {
    this.#tokens.copyWithin(to, from, from + count);
  }

  writePage(): void {
    const modules = this.config.blocks * projections.length;
    this.#options.clock.advance(this.#options.machine.pageWriteMs / modules);
  }

  setAtomBank(): void {
    throw new Error('no adapter here has a bank');
  }

  embeddings(): Float32Array {
    throw new Error('no adapter here has labels');
  }

  [Symbol.dispose](): void {}
}

function logitsOf(token: number): Float32Array {
  const logits = new Float32Array(vocabSize);
  logits[token] = 1;
  return logits;
}
