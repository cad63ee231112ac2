import { afterAll, expect, it } from 'vitest';
import { generationOf, openPacked } from '../../../src/adapters/pack.ts';
import { openGguf } from '../../../src/model/gguf.ts';
import { EggrollSession } from '../../../src/trainer/eggroll-session.ts';
import { scoringOf, TaskScores } from '../../../src/trainer/task-scores.ts';
import { taskOf } from '../../../src/trainer/tasks.ts';
import { tinyPath } from '../../support/open-test-decoder.ts';
import { openTinyBase, tinyExamples, tinyRecipe } from '../../support/training-base.ts';

const base = await openTinyBase();
afterAll(() => base.kernels[Symbol.dispose]());
const breathe = async (): Promise<void> => {};
const mean = (values: readonly number[]): number =>
  values.reduce((sum, value) => sum + value, 0) / values.length;

it('scores of an adapter at each rank are those that its training ended with', async () => {
  using file = openGguf(tinyPath);
  const reward = { kind: 'similarity', metric: 'fuzzy_match', reference: null } as const;
  const sizes = { population: 8, groupSize: 4, sigma: 0.3, answerTokens: 8 };
  const method = { kind: 'eggroll', ...sizes, reward } as const;
  const recipe = tinyRecipe({ method, rank: 12, ranks: [1, 4, 12], stepsMax: 3 });
  const scoring = scoringOf(file.metadata, { reward, answerTokens: 8 });
  const examples = tinyExamples(24, 48);
  const [heldOut, training] = [examples.slice(0, 20), examples.slice(20)]; // more than a round of rows
  using session = new EggrollSession({
    ...{ base, recipe: { ...recipe, learningRate: 1 }, training, heldOut, start: null, scoring },
  });
  while (session.step < 3) await session.takeStep(breathe);
  const published = session.publish();
  const wanted = await session.evaluate(published, breathe);
  expect(new Set(wanted.map(({ loss }) => loss)).size).toBe(3);

  const tasks = heldOut.map((example) => taskOf(example, scoring.text));
  const scores = new TaskScores(base, tasks, scoring, 12);
  const packed = openPacked(published.bytes, generationOf(published.bytes));
  for (const { rank, loss } of wanted) {
    const own = await scores.of(packed, rank, breathe);
    expect(own).toHaveLength(20);
    expect(1 - mean(own)).toBeCloseTo(loss, 12);
  }
  expect(1 - mean(await scores.of(null, 0, breathe))).toBeCloseTo(
    (await session.baseLoss(breathe))!,
    12,
  );
});

it('prompts, answers and the question must fit the context', () => {
  using file = openGguf(tinyPath);
  const reward = { kind: 'judge', question: 'Well?' } as const;
  const scoring = scoringOf(file.metadata, { reward, answerTokens: 1024 });
  const tasks = [{ prompt: new Int32Array(1020), expected: '' }];
  expect(() => new TaskScores(base, tasks, scoring, 4)).toThrow(
    /^prompts of 1020 tokens and answers of 1024 and a question of \d+, the base has 2048$/,
  );
});
