// What a request asks of tokens before anything is drawn: penalties on what the prompt and the answer hold already, and
// its own biases.

import type { Sampling } from './messages.ts';

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

const f32Max = (2 - 2 ** -23) * 2 ** 127;

/** Changes `logits` in place. */
export function adjust(logits: Float32Array, sampling: Sampling, history: SampleHistory): void {
  const { repetitionPenalty, frequencyPenalty, presencePenalty } = sampling;
  const repeat = (token: number): void => {
    const x = logits[token];
    if (x === undefined) return;
    const changed = x > 0 ? x / repetitionPenalty : x * repetitionPenalty;
    // A penalty can leave the range of f32; an infinite logit would fail the row as the model's own fault.
    if (Number.isFinite(x)) logits[token] = Math.max(-f32Max, Math.min(changed, f32Max));
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
