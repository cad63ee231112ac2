import { expect, it } from 'vitest';
import { rewardOf } from '../../../src/trainer/rewards.ts';

const judged = (answer: string, expected = ''): Parameters<ReturnType<typeof rewardOf>>[0] => {
  return { answer, expected, length: answer.length };
};

it.each([
  ['Yes.', 1],
  ['Yes. \n', 1],
  ['Yes', 0],
  ['3.5', 0],
  ['', 0],
])('an answer ends with a full stop: %j', (answer, score) => {
  expect(rewardOf({ kind: 'full-stop' })(judged(answer))).toBe(score);
});

it.each([
  ['four', 1],
  [' four\n', 1],
  ['four.', 0],
  ['', 0],
])('an answer is the expected one: %j', (answer, score) => {
  expect(rewardOf({ kind: 'expected' })(judged(answer, 'four '))).toBe(score);
});

it.each([
  [4, 1],
  [3, 0.75],
  [6, 0.5],
  [0, 0],
  [9, 0],
])('an answer of %i tokens is as good as it is near to 4', (length, score) => {
  expect(rewardOf({ kind: 'length', tokens: 4 })(judged('x'.repeat(length)))).toBe(score);
});
