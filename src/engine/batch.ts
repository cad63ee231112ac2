// Both ends of a step: what goes into the stepper as segments, and what comes of it as figures for the latency model and
// as the token that a reader is told of.

import type { Segment } from '../model/stepper.ts';
import type { GeneratedToken, StepWork } from './messages.ts';
import type { TokenLogprobs } from './sampler.ts';
import type { Sequence } from './sequence.ts';

export interface Chosen {
  readonly sequence: Sequence;
  readonly segment: Segment;
}

/** The next `count` tokens, or those of them that have one rank, of a sequence that holds its cells; and `drafts` guesses
 *  that stand behind them. */
export function chooseSegment(sequence: Sequence, count: number, drafts: number): Chosen {
  const { position, holdings } = sequence;
  if (holdings === null) throw new Error(`sequence ${sequence.id} holds no cells`);
  const { cells, spans } = holdings;
  const next = spans.find(({ from }) => from > position)?.from ?? Number.POSITIVE_INFINITY;
  const end = Math.min(position + count, next);
  const segment: Segment = {
    tokens: sequence.tokens.subarray(position, end + drafts),
    cellBase: cells.cellBase,
    position,
    adapter: spans.findLast(({ from }) => from <= position)!.rows,
    wantsLogits: end === sequence.count,
    drafts,
  };
  return { sequence, segment };
}

export function workOf(batch: readonly Chosen[]): StepWork {
  const work = { decodeRows: 0, prefillTokens: 0, decodeRanks: 0, prefillRanks: 0, kvCells: 0 };
  for (const { sequence, segment } of batch) {
    const count = segment.tokens.length;
    const { position, adapter } = segment;
    const ranks = count * (adapter?.rank ?? 0);
    // Row i of the segment attends to position + i + 1 cells.
    work.kvCells += count * position + (count * (count + 1)) / 2;
    if (sequence.isPrompt(position)) {
      work.prefillTokens += count;
      work.prefillRanks += ranks;
    } else {
      work.decodeRows += count;
      work.decodeRanks += ranks;
    }
  }
  return work;
}

/** The chosen token with its bytes and, when they were asked for, its log-probabilities. */
export function describeToken(
  token: number,
  logprobs: TokenLogprobs | null,
  bytesOf: (token: number) => Uint8Array,
): GeneratedToken {
  const bytes = bytesOf(token);
  if (logprobs === null) return { token, bytes, logprob: Number.NaN, top: [] };
  const top = logprobs.top.map((one) => ({ ...one, bytes: bytesOf(one.token) }));
  return { token, bytes, logprob: logprobs.logprob, top };
}
