import { expect, it } from 'vitest';
import { scrapCells } from '../../../src/model/step-inputs.ts';
import { answersOf } from '../../../src/trainer/rollout.ts';
import { openTiny } from '../../support/open-test-decoder.ts';

const breathe = async (): Promise<void> => {};

it('answers many prompts as it answers each alone', async () => {
  const { decoder } = await openTiny();
  using _ = decoder;
  // More than one round of rows, and more tokens at once than a step has.
  const prompts = Array.from({ length: 20 }, (_, i) =>
    Int32Array.from({ length: 3 + 2 * i }, (_, j) => (7 * i + 13 * j) % 320),
  );
  const asked = prompts.map((prompt) => ({ prompt, adapter: null }));
  const limits = { cellsPerRow: 60, answerTokens: 10, ends: new Set<number>() };
  const { answers, tokens } = await answersOf(decoder, asked, limits, breathe);
  expect(answers.map(({ length }) => length)).toEqual(asked.map(() => 10));
  expect(tokens).toBe(prompts.reduce((sum, { length }) => sum + length + 9, 0));
  expect(new Set(answers.map(String)).size).toBeGreaterThan(10);

  for (const [i, prompt] of prompts.entries()) {
    const alone = [...prompt];
    let position = 0;
    while (alone.length < prompt.length + 10) {
      const segment = { cellBase: scrapCells, position, adapter: null, wantsLogits: true };
      const rest = Int32Array.from(alone.slice(position));
      position = alone.length;
      alone.push(decoder.step([{ ...segment, tokens: rest }]).argmax(0));
    }
    expect(answers[i]).toEqual(alone.slice(prompt.length));
  }

  // A token that ends an answer is none of it.
  const end = answers[3]![4]!;
  const ended = await answersOf(decoder, asked, { ...limits, ends: new Set([end]) }, breathe);
  expect(ended.answers).toEqual(
    answers.map((answer) => (answer.includes(end) ? answer.slice(0, answer.indexOf(end)) : answer)),
  );
});
