// Scored answers → lines to train on and lines to judge by. Pure. What is accepted: a whole answer with score enough, or what
// it was corrected to. Of one question, whatever its spelling, one answer at most; a question whose best answers contradict
// each other teaches nothing. A question is held out by its hash, so for ever, however it is answered.

import { createHash } from 'node:crypto';
import { isHeldOut } from './reservoir.ts';

export type CapturedPrompt =
  | {
      readonly messages: readonly {
        readonly role: 'system' | 'user' | 'assistant';
        readonly content: string;
      }[];
    }
  | { readonly prompt: string };

export interface ScoredAnswer {
  readonly prompt: CapturedPrompt;
  readonly answer: string;
  /** Not cut off. */
  readonly isWhole: boolean;
  /** 0…1. */
  readonly score: number;
  /** What the answer should have been; null: nobody said. */
  readonly correction: string | null;
  readonly scoredS: number;
}

export interface RefreshData {
  /** JSONL, the oldest score first. */
  readonly training: readonly string[];
  readonly heldOut: readonly string[];
  /** Of both, scored after `sinceS`; `heldOut` ends with its own. */
  readonly fresh: number;
  readonly freshHeldOut: number;
  /** Questions that are not there, by why. */
  readonly dropped: {
    readonly score: number;
    readonly empty: number;
    readonly contradictory: number;
  };
}

/** The best answers, since all of them are computed for each generation at each rank. Guess. */
export const heldOutMax = 256;

interface Candidate {
  readonly prompt: CapturedPrompt;
  readonly answer: string;
  readonly worth: number;
  readonly scoredS: number;
}

export function selectExamples(
  answers: readonly ScoredAnswer[],
  { scoreMin, heldOutShare }: { readonly scoreMin: number; readonly heldOutShare: number },
  sinceS: number,
): RefreshData {
  const byQuestion = new Map<string, Candidate[]>();
  for (const one of answers) {
    const key = questionOf(one.prompt);
    byQuestion.set(key, [...(byQuestion.get(key) ?? []), candidateOf(one, scoreMin)]);
  }
  const dropped = { score: 0, empty: 0, contradictory: 0 };
  const kept: { readonly isOut: boolean; readonly best: Candidate }[] = [];
  for (const [key, candidates] of byQuestion) {
    const best = bestOf(candidates);
    if (typeof best === 'string') dropped[best] += 1;
    else kept.push({ isOut: isHeldOut(sha256Of(key), heldOutShare), best });
  }
  kept.sort((a, b) => a.best.scoredS - b.best.scoredS);
  const heldOut = kept.filter(({ isOut }) => isOut).slice(-heldOutMax);
  const training = kept.filter(({ isOut }) => !isOut);
  const freshIn = (of: typeof kept): number =>
    of.filter(({ best }) => best.scoredS > sinceS).length;
  return {
    training: training.map(({ best }) => lineOf(best)),
    heldOut: heldOut.map(({ best }) => lineOf(best)),
    fresh: freshIn(training) + freshIn(heldOut),
    freshHeldOut: freshIn(heldOut),
    dropped,
  };
}

function candidateOf(
  { prompt, answer, isWhole, score, correction, scoredS }: ScoredAnswer,
  scoreMin: number,
): Candidate {
  const accepted = isWhole && score >= scoreMin ? score : Number.NEGATIVE_INFINITY;
  const worth = correction === null ? accepted : Infinity;
  return { prompt, answer: correction ?? answer, worth, scoredS };
}

/** Or why there is none. */
function bestOf(candidates: readonly Candidate[]): Candidate | keyof RefreshData['dropped'] {
  const most = Math.max(...candidates.map(({ worth }) => worth));
  if (most === Number.NEGATIVE_INFINITY) return 'score';
  const best = candidates.filter(({ worth }) => worth === most);
  if (new Set(best.map(({ answer }) => spelled(answer))).size > 1) return 'contradictory';
  const newest = best.reduce((a, b) => (b.scoredS > a.scoredS ? b : a));
  return newest.answer.trim() === '' ? 'empty' : newest;
}

function questionOf(prompt: CapturedPrompt): string {
  if ('prompt' in prompt) return `p:${spelled(prompt.prompt)}`;
  return `m:${JSON.stringify(prompt.messages.map(({ role, content }) => [role, spelled(content)]))}`;
}

const sha256Of = (text: string): Buffer => createHash('sha256').update(text).digest();

const spelled = (text: string): string =>
  text.normalize('NFKC').toLowerCase().replaceAll(/\s+/g, ' ').trim();

function lineOf({ prompt, answer }: Candidate): string {
  if ('prompt' in prompt) return JSON.stringify({ prompt: prompt.prompt, completion: answer });
  const before = prompt.messages.map(({ role, content }) =>
    // What earlier turns said was not scored.
    role === 'assistant' ? { role, content, weight: 0 } : { role, content },
  );
  return JSON.stringify({ messages: [...before, { role: 'assistant', content: answer }] });
}
