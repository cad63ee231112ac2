import { expect, it } from 'vitest';
import { type EggrollRecipe, parseRecipe } from '../../src/jobs/recipe.ts';
import { openGguf } from '../../src/model/gguf.ts';
import { EggrollSession } from '../../src/trainer/eggroll-session.ts';
import { createExampleEncoder } from '../../src/trainer/examples.ts';
import { scoringOf } from '../../src/trainer/task-scores.ts';
import { baseModelPath } from '../support/base-model.ts';
import { countTraining } from '../support/counting-kernels.ts';
import { decided, openRealBase } from '../support/training-base.ts';

const words = (
  'hot big fast old happy dark rich strong heavy tall wet early loud clean brave hard deep full wide sharp young cheap soft ' +
  'thick sweet tight long open cold small slow new sad light poor weak short dry late quiet dirty near shallow empty narrow ' +
  'blunt dear thin bitter loose closed first true safe kind rough polite awake alive simple warm fresh busy proud calm'
).split(' ');
const generations = 30;
const breathe = async (): Promise<void> => {};

it('SmolLM2 ends more answers with a full stop: 10 points within 50 generations, no gradient', async () => {
  const base = await openRealBase();
  using _ = base.kernels;
  const watched = countTraining(base.kernels);
  using file = openGguf(await baseModelPath());
  const encode = createExampleEncoder(file.metadata, 96);
  const examples = words.flatMap((word) =>
    ['opposite', 'synonym'].map((kind) =>
      encode({
        kind: 'chat',
        messages: [
          { role: 'system', content: 'Answer with one word.', learnt: false },
          { role: 'user', content: `What is the ${kind} of ${word}?`, learnt: false },
          { role: 'assistant', content: '-', learnt: true }, // no score looks at it
        ],
      }),
    ),
  );
  const isHeldOut = (_: unknown, i: number): boolean => Math.floor(i / 2) % 3 === 0; // by words
  const reward = { kind: 'full-stop' };
  const recipe = parseRecipe(
    {
      method: { kind: 'eggroll', answerTokens: 14, reward },
      ...{ ranks: [4], stepsMax: generations, windowTokens: 96 },
    },
    'recipe',
  );
  const session = new EggrollSession({
    base: { ...base, kernels: watched.kernels },
    recipe: decided(recipe),
    training: examples.filter((example, i) => !isHeldOut(example, i)),
    heldOut: examples.filter(isHeldOut),
    start: null,
    scoring: scoringOf(file.metadata, recipe.method as EggrollRecipe),
  });
  const shareOf = (loss: number): number => 1 - loss;
  const before = shareOf((await session.baseLoss(breathe))!);
  const started = process.cpuUsage();
  while (session.step < session.steps) await session.takeStep(breathe);
  const cpuSeconds = process.cpuUsage(started).user / 1e6;
  const after = shareOf((await session.evaluate(session.publish(), breathe)).at(-1)!.loss);
  process.stdout.write(`${JSON.stringify({ generations, before, after, cpuSeconds })}\n`);
  expect(after).toBeGreaterThan(before + 0.1);
  expect(watched.count).toBe(0);
}, 900_000);
