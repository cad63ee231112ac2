import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { type RewardRecipe, similarityMetrics } from '../../../src/jobs/reward-recipe.ts';
import { questionOf, rewardOf, similarity } from '../../../src/trainer/rewards.ts';

const judged = (answer: string, expected = ''): Parameters<ReturnType<typeof rewardOf>>[0] => {
  return { answer, expected, length: answer.length };
};
const score = (recipe: RewardRecipe, answer: string, expected?: string): number =>
  rewardOf(recipe)(judged(answer, expected));

it.each([
  ['Yes.', 1],
  ['Yes. \n', 1],
  ['Yes', 0],
  ['3.5', 0],
  ['', 0],
])('an answer ends with a full stop: %j', (answer, wanted) => {
  expect(score({ kind: 'full-stop' }, answer)).toBe(wanted);
});

it.each([
  ['four', 1],
  [' four\n', 1],
  ['four.', 0],
  ['', 0],
])('an answer is the expected one: %j', (answer, wanted) => {
  expect(score({ kind: 'expected' }, answer, 'four ')).toBe(wanted);
});

it.each([
  [4, 1],
  [3, 0.75],
  [6, 0.5],
  [0, 0],
  [9, 0],
])('an answer of %i tokens is as good as it is near to 4', (length, wanted) => {
  expect(score({ kind: 'length', tokens: 4 }, 'x'.repeat(length))).toBe(wanted);
});

it.each([
  ['{"a": [1, 2]}', 1],
  [' "text" ', 1],
  ['{a: 1}', 0],
  ['', 0],
])('an answer is JSON: %j', (answer, wanted) => {
  expect(score({ kind: 'json' }, answer)).toBe(wanted);
});

it.each([
  ['so 3 and 4 make 7', 'It is 7.', 0, 1],
  ['1,234.5 in all', '1234.5', 0, 1],
  ['-2', '2', 0, 0],
  ['3.14', 'pi is 3.1416', 0.01, 1],
  ['3.1', 'pi is 3.1416', 0.01, 0],
  ['none', 'none', 0, 0], // nothing that could be right
  ['7', 'seven', 0, 0],
])('the last number of %j is that of %j, give or take', (answer, expected, tolerance, wanted) => {
  expect(score({ kind: 'number', tolerance }, answer, expected)).toBe(wanted);
});

it.each([
  ['eq', 'Paris', 1],
  ['eq', 'paris', 0],
  ['eq', 'Paris ', 0],
  ['ne', 'Paris', 0],
  ['ne', 'paris', 1],
  ['like', 'In Paris.', 1],
  ['like', 'In PARIS.', 0],
  ['ilike', 'In PARIS.', 1],
  ['ilike', 'In Par', 0],
] as const)('%s of Paris: %j', (operation, answer, wanted) => {
  expect(score({ kind: 'check', operation, reference: 'Paris' }, answer, 'Rome')).toBe(wanted);
  expect(score({ kind: 'check', operation, reference: null }, answer, 'Paris')).toBe(wanted);
});

interface Golden {
  readonly cases: readonly {
    readonly answer: string;
    readonly reference: string;
    readonly values: Readonly<Record<(typeof similarityMetrics)[number], number>>;
  }[];
}

describe('a similarity', () => {
  const path = join(import.meta.dirname, '../../golden/trainer/similarity.json');
  const { cases } = JSON.parse(readFileSync(path, 'utf8')) as Golden;

  it.each(similarityMetrics)('is that of the public implementation: %s', (metric) => {
    for (const { answer, reference, values } of cases) {
      const got = similarity(metric, answer, reference);
      expect(got, `${answer} | ${reference}`).toBeCloseTo(values[metric], 12);
      expect(score({ kind: 'similarity', metric, reference: null }, answer, reference)).toBe(got);
    }
    expect(new Set(cases.map(({ values }) => values[metric])).size).toBeGreaterThan(1);
  });

  it('is 1 of a text of five words and itself, and from 0 to 1 of any two', () => {
    const words = fc.array(fc.constantFrom('a', 'b', 'Über', '世界', '7'), { maxLength: 12 });
    fc.assert(
      fc.property(fc.constantFrom(...similarityMetrics), words, words, (metric, a, b) => {
        const [one, other] = [a.join(' '), b.join(' ')];
        const value = similarity(metric, one, other);
        expect(value).toBeGreaterThanOrEqual(0);
        expect(value).toBeLessThanOrEqual(1);
        if (a.length >= 5) expect(similarity(metric, one, one)).toBe(1);
      }),
    );
  });
});

it('rewards add up by their weights, one of them a judge’s verdict', () => {
  const question = 'Is that right?';
  const recipe: RewardRecipe = {
    kind: 'weighted',
    parts: [
      { weight: 0.5, reward: { kind: 'full-stop' } },
      { weight: 0.25, reward: { kind: 'judge', question } },
    ],
  };
  expect(rewardOf(recipe)({ ...judged('Yes.'), verdict: 0.8 })).toBeCloseTo(0.7, 12);
  expect(rewardOf(recipe)({ ...judged('Yes'), verdict: 0.8 })).toBeCloseTo(0.2, 12);
  expect(questionOf(recipe)).toBe(question);
  expect(questionOf({ kind: 'json' })).toBeNull();
});
