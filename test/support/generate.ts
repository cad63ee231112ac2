// The shortest way from token ids to greedy tokens over a Stepper, for golden tests.

import { scrapCells } from '../../src/model/step-inputs.ts';
import type { AdapterRows, Stepper } from '../../src/model/stepper.ts';

export interface GreedyOptions {
  readonly count: number;
  readonly endTokens?: readonly number[];
  readonly adapter?: AdapterRows | null;
  readonly cellBase?: number;
}

/** Prefills in one go, then decodes one token a step. */
export function generateGreedy(
  stepper: Stepper,
  prompt: readonly number[],
  options: GreedyOptions,
): number[] {
  const { count, endTokens = [], adapter = null, cellBase = scrapCells } = options;
  const tokens: number[] = [];
  let next = Int32Array.from(prompt);
  for (let position = 0; tokens.length < count; ) {
    const result = stepper.step([{ tokens: next, cellBase, position, adapter, wantsLogits: true }]);
    position += next.length;
    const token = result.argmax(0);
    if (endTokens.includes(token)) break;
    tokens.push(token);
    next = Int32Array.of(token);
  }
  return tokens;
}

/** Logits of every position, one token a step: [prompt][V]. */
export function logitsPerToken(
  stepper: Stepper,
  prompt: readonly number[],
  adapter: AdapterRows | null = null,
): Float32Array[] {
  return prompt.map((token, position) => {
    const tokens = Int32Array.of(token);
    const segment = { tokens, cellBase: scrapCells, position, adapter, wantsLogits: true };
    return stepper.step([segment]).logits(0).slice();
  });
}

/** KL(p ‖ q) in nats of two rows of logits. */
export function divergence(p: Float32Array, q: Float32Array): number {
  const [a, b] = [logSoftmax(p), logSoftmax(q)];
  return a.reduce((sum, log, i) => sum + Math.exp(log) * (log - b[i]!), 0);
}

function logSoftmax(logits: Float32Array): Float64Array {
  const top = logits.reduce((a, b) => Math.max(a, b), Number.NEGATIVE_INFINITY);
  const total = logits.reduce((sum, logit) => sum + Math.exp(logit - top), 0);
  return Float64Array.from(logits, (logit) => logit - top - Math.log(total));
}
