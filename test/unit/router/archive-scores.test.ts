import { describe, expect, it } from 'vitest';
import {
  ArchiveScores,
  type ScorableAnswer,
  type Scored,
  scoresPerCandidate,
} from '../../../src/router/archive-scores.ts';

const cellOf = (ms: number): number => Math.floor(Math.log2(ms));
const answer = (over: Partial<ScorableAnswer> = {}): ScorableAnswer => ({
  tenant: 'key-1',
  row: '/law',
  adapter: 'support',
  generation: `sha256:${'a'.repeat(64)}`,
  kind: 'lora',
  rank: 8,
  latencyMs: 100,
  only: null,
  planned: {} as ScorableAnswer['planned'], // handed back unread
  ...over,
});

/** Scores one answer after the other; what the last one came to. */
function scoreAll(
  scores: ArchiveScores,
  each: ReadonlyArray<readonly [score: number, answer: ScorableAnswer]>,
): Scored | null {
  let last: Scored | null = null;
  for (const [i, [score, one]] of each.entries()) {
    scores.remember(`id${i}`, one);
    last = scores.score({ id: `id${i}`, tenant: one.tenant, score }, cellOf);
  }
  return last;
}

const times = <T>(count: number, value: (i: number) => T): T[] =>
  Array.from({ length: count }, (_, i) => value(i));

describe('ArchiveScores', () => {
  it('makes one candidate of enough scores: their means', () => {
    const scores = new ArchiveScores();
    const each = times(scoresPerCandidate, (i) => [i % 2, answer({ latencyMs: 100 + i })] as const);
    expect(scoreAll(scores, each.slice(1))!.candidate).toBeNull();
    const { tenant: _, row, planned, only, ...made } = answer();
    const latencyMs = 100 + (scoresPerCandidate - 1) / 2;
    expect(scoreAll(scores, each.slice(0, 1))).toEqual({
      planned,
      only,
      candidate: { row, elite: { ...made, objective: 0.5, latencyMs } },
    });
    // The next candidate starts from nothing.
    expect(scoreAll(scores, each.slice(1))!.candidate).toBeNull();
  });

  it('adds up only what is the same in adapter, generation, rank, row and cell', () => {
    const others: Partial<ScorableAnswer>[] = [
      {},
      { row: '/code' },
      { adapter: 'legal' },
      { generation: `sha256:${'b'.repeat(64)}` },
      { rank: 16 },
      { latencyMs: 200 },
    ];
    const scores = new ArchiveScores();
    const each = others.flatMap((over) =>
      times(scoresPerCandidate - 1, () => [1, answer(over)] as const),
    );
    for (const one of each) expect(scoreAll(scores, [one])!.candidate).toBeNull();
    for (const over of others) {
      expect(scoreAll(scores, [[1, answer(over)]])!.candidate!.elite.objective).toBe(1);
    }
  });

  it('hands back the plan of an answer without a row, and no candidate', () => {
    const scores = new ArchiveScores();
    const planned = { plan: { rank: 3 } } as ScorableAnswer['planned'];
    for (let i = 0; i <= scoresPerCandidate; i++) {
      const scored = scoreAll(scores, [[1, answer({ row: null, planned })]]);
      expect(scored).toEqual({ planned, only: null, candidate: null });
    }
  });

  it('counts an answer once, for whoever got it, and no unknown one', () => {
    const scores = new ArchiveScores();
    scores.remember('a', answer());
    const score = (id: string, tenant: string): unknown =>
      scores.score({ id, tenant, score: 1 }, cellOf);
    expect(score('b', 'key-1')).toBeNull();
    expect(score('a', 'key-2')).toBeNull();
    expect(score('a', 'key-1')).not.toBeNull();
    expect(score('a', 'key-1')).toBeNull();
  });

  it('forgets the oldest answers', () => {
    const scores = new ArchiveScores();
    for (let i = 0; i <= 2048; i++) scores.remember(`id${i}`, answer());
    const isKnown = (i: number): boolean =>
      scores.score({ id: `id${i}`, tenant: 'key-1', score: 1 }, cellOf) !== null;
    expect([isKnown(0), isKnown(1), isKnown(2048)]).toEqual([false, true, true]);
  });
});
