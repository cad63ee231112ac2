// What a step computed, read when it is asked for: rows of logits once each, and which atoms a row used.

import { GatewayError } from '../errors.ts';
import type { Program } from '../kernels/kernels.ts';
import type { StoredBank } from './atom-memory.ts';
import type { DecoderConfig } from './decoder-config.ts';
import type { PlacedSegment } from './step-inputs.ts';
import type { StepResult } from './stepper.ts';

export interface StepOutputs {
  readonly program: Program;
  readonly placed: readonly PlacedSegment[];
  /** Index of a segment → its first output. */
  readonly outputs: ReadonlyMap<number, number>;
  /** The decoder's, one an output, used again every step. */
  readonly rows: Float32Array[];
}

export class Results implements StepResult {
  readonly #step: StepOutputs;
  readonly #config: DecoderConfig;
  readonly #bank: StoredBank | null;
  readonly #known: Set<number> = new Set();

  constructor(step: StepOutputs, config: DecoderConfig, bank: StoredBank | null) {
    this.#step = step;
    this.#config = config;
    this.#bank = bank;
  }

  logits(segment: number, draft = 0): Float32Array {
    const { program, outputs, rows } = this.#step;
    const { vocabSize } = this.#config;
    const first = outputs.get(segment);
    if (first === undefined || draft < 0 || draft > (this.#placed(segment).segment.drafts ?? 0)) {
      throw new GatewayError('SHAPE_MISMATCH', `segment ${segment} did not want logits ${draft}`);
    }
    const output = first + draft;
    rows[output] ??= new Float32Array(vocabSize);
    if (!this.#known.has(output)) program.read('logits', output * vocabSize, rows[output]);
    this.#known.add(output);
    return rows[output];
  }

  #placed(segment: number): PlacedSegment {
    return this.#step.placed.find(({ index }) => index === segment)!;
  }

  atomWeights(index: number): Float32Array | null {
    const { segment, rowStart } = this.#placed(index);
    if (segment.adapter === null || segment.adapter.atoms === null) return null;
    const { K, blockLayers } = this.#bank!;
    const own = segment.adapter.atoms.bias.length;
    const row = rowStart + segment.tokens.length - 1 - (segment.drafts ?? 0);
    const weights = new Float32Array(Math.ceil(this.#config.blocks / blockLayers) * own);
    for (let at = 0; at < weights.length; at += own) {
      // Before the atoms' weights is that of the ranks as they are: 0 in a row with atoms.
      const to = weights.subarray(at, at + own);
      this.#step.program.read(`atoms${at / own}`, row * (1 + K) + 1, to);
    }
    return weights;
  }

  argmax(segment: number): number {
    const row = this.logits(segment);
    let best = 0;
    for (let i = 1; i < row.length; i++) if (row[i]! > row[best]!) best = i;
    return best;
  }
}
