// What callers say of answers. One score says little, and a cell of the archive keeps the largest it ever saw, so means of
// several are offered to it, never single ones. Bounded: the oldest are forgotten.

import { LRUCache } from 'lru-cache';
import type { Generation } from '../adapters/adapter.ts';
import type { Elite } from './archive.ts';
import type { Outcome } from './policy.ts';

/** What answered without others beside it. */
export interface OnlyAdapter {
  readonly name: string;
  readonly generation: Generation;
}

/** An answer that can still be scored: what made it, and how long it took. */
export interface ScorableAnswer extends Omit<Elite, 'objective'> {
  readonly tenant: string;
  /** Of the archive, for which it counts; null: for none. */
  readonly row: string | null;
  readonly planned: Pick<Outcome, 'input' | 'plan'>;
  readonly only: OnlyAdapter | null;
}

export interface Scored extends Pick<ScorableAnswer, 'only'> {
  readonly planned: Pick<Outcome, 'input' | 'plan'>;
  /** For a row, when enough scores were gathered. */
  readonly candidate: { readonly row: string; readonly elite: Elite } | null;
}

/** Guess: a third of one score's deviation, and a cell hears of its traffic within a day. */
export const scoresPerCandidate = 8;
// Guesses: a few minutes of busy traffic, a few kilobytes each; 256 rows × 10 cells with a few candidates each.
const answersMax = 2048;
const sumsMax = 8192;

interface Sum {
  count: number;
  score: number;
  latencyMs: number;
}

export class ArchiveScores {
  readonly #answers = new LRUCache<string, ScorableAnswer>({ max: answersMax });
  readonly #sums = new LRUCache<string, Sum>({ max: sumsMax });

  remember(id: string, answer: ScorableAnswer): void {
    this.#answers.set(id, answer);
  }

  /** Counts an answer once. null: no such answer of this tenant. */
  score(
    { id, tenant, score }: { id: string; tenant: string; score: number },
    cellOf: (latencyMs: number) => number,
  ): Scored | null {
    const answer = this.#answers.get(id);
    if (answer === undefined || answer.tenant !== tenant) return null;
    this.#answers.delete(id);
    const { tenant: _, row, planned, latencyMs, only, ...made } = answer;
    if (row === null) return { planned, only, candidate: null };
    // Per cell, so that the mean latency of a candidate lies in the cell that its answers did.
    const key = JSON.stringify([row, made.adapter, made.generation, made.rank, cellOf(latencyMs)]);
    const sum = this.#sums.get(key) ?? { count: 0, score: 0, latencyMs: 0 };
    sum.count += 1;
    sum.score += score;
    sum.latencyMs += latencyMs;
    if (sum.count < scoresPerCandidate) {
      this.#sums.set(key, sum);
      return { planned, only, candidate: null };
    }
    this.#sums.delete(key);
    const [objective, meanMs] = [sum.score / sum.count, sum.latencyMs / sum.count];
    return { planned, only, candidate: { row, elite: { ...made, objective, latencyMs: meanMs } } };
  }
}
