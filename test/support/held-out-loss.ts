// Mean loss in nats of a decoder on windows of tokens, each from an empty cache.

import { scrapCells } from '../../src/model/step-inputs.ts';
import type { AdapterRows, Stepper } from '../../src/model/stepper.ts';

/** Windows are [n + 1] tokens each: n inputs, and what follows each of them. n ≤ the stepper's segmentsMax. */
export function heldOutLoss(
  stepper: Stepper,
  windows: readonly Int32Array[],
  adapter: AdapterRows | null,
): number {
  let [sum, count] = [0, 0];
  for (const window of windows) {
    const tokens = window.subarray(0, -1);
    const segment = { tokens, cellBase: scrapCells, position: 0, adapter, wantsLogits: true };
    const result = stepper.step([{ ...segment, drafts: tokens.length - 1 }]);
    for (let i = 0; i < tokens.length; i++) {
      sum += lossOf(result.logits(0, i), window[i + 1]!);
      count += 1;
    }
  }
  return sum / count;
}

function lossOf(logits: Float32Array, target: number): number {
  let top = Number.NEGATIVE_INFINITY;
  for (const logit of logits) top = Math.max(top, logit);
  let total = 0;
  for (const logit of logits) total += Math.exp(logit - top);
  return Math.log(total) + top - logits[target]!;
}

export function windowsOf(tokens: ArrayLike<number>, count: number, length: number): Int32Array[] {
  const all = Int32Array.from(tokens);
  if (all.length < count * length + 1) throw new RangeError(`${all.length} tokens are too few`);
  return Array.from({ length: count }, (_, i) => all.slice(i * length, (i + 1) * length + 1));
}
