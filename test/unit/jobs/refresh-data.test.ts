import { describe, expect, it } from 'vitest';
import {
  heldOutMax,
  type RefreshData,
  type ScoredAnswer,
  selectExamples,
} from '../../../src/jobs/refresh-data.ts';

const settings = { scoreMin: 0.75, heldOutShare: 0.25 };
const select = (answers: ScoredAnswer[], sinceS = 0): RefreshData =>
  selectExamples(answers, settings, sinceS);

const said = (question: string, over: Partial<ScoredAnswer> = {}): ScoredAnswer => ({
  prompt: { messages: [{ role: 'user', content: question }] },
  answer: `answer to ${question}`,
  isWhole: true,
  score: 1,
  correction: null,
  scoredS: 100,
  ...over,
});
const many = (count: number, over: Partial<ScoredAnswer> = {}): ScoredAnswer[] =>
  Array.from({ length: count }, (_, i) => said(`question ${i}`, over));
const all = ({ training, heldOut }: RefreshData): string[] => [...training, ...heldOut];
const answersOf = (data: RefreshData): string[] =>
  all(data).map((line) => JSON.parse(line).messages.at(-1).content);

describe('what is learnt of scored answers', () => {
  it('is lines of training files', () => {
    const text = said('', { prompt: { prompt: 'Once' }, answer: ' upon a time' });
    const turns = said('', {
      prompt: {
        messages: [
          { role: 'user', content: 'Hi' },
          { role: 'assistant', content: 'Hello' },
          { role: 'user', content: 'Bye' },
        ],
      },
      answer: 'So long',
    });
    const lines = all(select([text, turns])).map((line) => JSON.parse(line));
    expect(lines).toContainEqual({ prompt: 'Once', completion: ' upon a time' });
    expect(lines).toContainEqual({
      messages: [
        { role: 'user', content: 'Hi' },
        { role: 'assistant', content: 'Hello', weight: 0 },
        { role: 'user', content: 'Bye' },
        { role: 'assistant', content: 'So long' },
      ],
    });
  });

  it('is what was liked, or what it was corrected to', () => {
    const data = select([
      said('a', { score: 0.75 }),
      said('b', { score: 0.74 }),
      said('c', { score: 0, correction: 'better' }),
      said('d', { isWhole: false }),
      said('e', { isWhole: false, correction: 'whole' }),
    ]);
    expect(new Set(answersOf(data))).toEqual(new Set(['answer to a', 'better', 'whole']));
    expect(data.dropped).toEqual({ score: 2, empty: 0, contradictory: 0 });
  });

  it('is nothing of what is empty', () => {
    const data = select([said('a', { answer: '  \n' }), said('b', { correction: ' ' })]);
    expect(all(data)).toEqual([]);
    expect(data.dropped.empty).toBe(2);
  });

  it('is nothing of a question whose best answers contradict each other', () => {
    const yes = many(20, { answer: 'yes' });
    const no = many(20, { answer: 'no' });
    const data = select([...yes, ...no]);
    expect(all(data)).toEqual([]);
    expect(data.dropped.contradictory).toBe(20);
    // One that is better than all others, or a correction, settles it.
    expect(answersOf(select([...yes, ...many(20, { answer: 'no', score: 0.8 })]))).toEqual(
      Array.from({ length: 20 }, () => 'yes'),
    );
    expect(answersOf(select([...yes, said('question 3', { correction: 'no' })]))).toContain('no');
    const disputed = [said('q', { correction: 'yes' }), said('q', { correction: 'no' })];
    expect(select(disputed).dropped.contradictory).toBe(1);
  });

  it('counts duplicates once, whatever their spelling', () => {
    const data = select([
      said('What is  it?', { answer: 'This.' }),
      said('what is it?', { answer: 'this.' }),
      said(' WHAT IS IT?\n', { answer: 'This. ' }),
    ]);
    expect(all(data)).toHaveLength(1);
    expect(data.dropped.contradictory).toBe(0);
  });

  it('holds the same questions out for ever, however they are answered', () => {
    const before = select(many(400));
    const after = select([
      ...many(400, { answer: 'other' }),
      ...many(50).map((one, i) => ({ ...one, ...said(`new ${i}`) })),
    ]);
    const questions = (lines: readonly string[]): string[] =>
      lines.map((line) => JSON.parse(line).messages[0].content);
    const [old, now] = [questions(before.heldOut), questions(after.heldOut)];
    expect(new Set(now.filter((one) => one.startsWith('question')))).toEqual(new Set(old));
    expect(Math.abs(old.length / 400 - 0.25)).toBeLessThan(0.07);
    expect(questions(after.training).filter((one) => now.includes(one))).toEqual([]);
  });

  it('tells what is new, which the held-out lines end with', () => {
    const data = select(
      [...many(60, { scoredS: 50 }), ...Array.from({ length: 60 }, (_, i) => said(`new ${i}`))],
      50,
    );
    expect(data.fresh).toBe(60);
    const isNew = data.heldOut.map((line) => line.includes('new '));
    expect(isNew.filter(Boolean)).toHaveLength(data.freshHeldOut);
    expect(isNew.slice(-data.freshHeldOut).every(Boolean)).toBe(true);
  });

  it('judges by the newest of many', () => {
    const data = selectExamples(
      many(heldOutMax + 40).map((one, i) => ({ ...one, scoredS: i })),
      { ...settings, heldOutShare: 1 },
      0,
    );
    expect(data.heldOut).toHaveLength(heldOutMax);
    expect(data.heldOut.at(-1)).toContain(`question ${heldOutMax + 39}`);
    expect(data.training).toEqual([]);
  });
});
