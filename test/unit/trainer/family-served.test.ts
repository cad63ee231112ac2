import { afterAll, expect, it } from 'vitest';
import { generationOf, openPacked } from '../../../src/adapters/pack.ts';
import { createResidency } from '../../../src/adapters/residency.ts';
import type { AdapterRows, Stepper } from '../../../src/model/stepper.ts';
import type { Example } from '../../../src/trainer/examples.ts';
import { TrainingSession } from '../../../src/trainer/session.ts';
import { openTiny } from '../../support/open-test-decoder.ts';
import { openTinyBase, tinyExamples, tinyRecipe } from '../../support/training-base.ts';

// The losses that a run reports are those of its adapter in the decoder that serves: through residency, rows and pages.

const base = await openTinyBase();
afterAll(() => base.kernels[Symbol.dispose]());

const examples = tinyExamples(8, 48);
const breathe = async (): Promise<void> => {};
/** Pages and their products are f16 and f32 in another order; an adapter that is not there is tenths away. */
const distanceMax = 2e-3;

/** Mean loss of the learnt tokens, each example from an empty cache. */
function servedLoss(stepper: Stepper, adapter: AdapterRows | null): number {
  let [sum, count] = [0, 0];
  for (const { tokens, learnt } of examples as readonly Example[]) {
    const inputs = tokens.slice(0, -1);
    const segment = { cellBase: 16, position: 0, adapter, wantsLogits: true };
    const first = learnt.indexOf(1) - 1; // only the answer's rows have logits
    const drafts = inputs.length - 1 - first;
    const result = stepper.step([{ ...segment, tokens: inputs, drafts }]);
    for (let i = first; i < inputs.length; i++) {
      if (learnt[i + 1] === 0) continue;
      const logits = result.logits(0, i - first);
      const top = Math.max(...logits);
      const total = logits.reduce((all, logit) => all + Math.exp(logit - top), 0);
      sum += Math.log(total) + top - logits[tokens[i + 1]!]!;
      count += 1;
    }
  }
  return sum / count;
}

it.each([
  { kind: 'matryoshka', objective: 'multi' },
  { kind: 'hydra' },
  { kind: 'salt' },
  { kind: 'triangular', rankGrowth: { interval: 4 } },
  { kind: 'fly', topK: 2 },
  { kind: 'mora', topK: 3 },
  { kind: 'lora', init: { kind: 'eva', rho: 2 } },
])('$kind is served with the losses that its run reports', async (more) => {
  const sizes = { rank: 8, stepsMax: 20, learningRate: 1e-2, schedule: 'constant' };
  const recipe = tinyRecipe({ ...sizes, ...more });
  const data = { training: examples, heldOut: examples, start: null };
  using session = new TrainingSession({ base, recipe, ...data });
  while (session.step < 20) await session.takeStep(breathe);
  const published = session.publish();
  const losses = await session.evaluate(published, breathe);
  const without = (await session.baseLoss(breathe))!;

  const { decoder } = await openTiny({ pages: 8 });
  using stepper = decoder;
  const packed = openPacked(published.bytes, generationOf(published.bytes));
  const { generation } = packed;
  const residency = createResidency({
    stepper,
    baseHash: base.hash,
    open: async () => packed,
  });
  let wake = (): void => {};
  const load = residency.beginLoad(generation, () => wake());
  for (let progress = load.advance(1e9); progress !== 'done'; progress = load.advance(1e9)) {
    expect(progress).toBe('reading');
    await new Promise<void>((resolve) => {
      wake = resolve;
    });
  }
  using use = residency.acquire(generation)!;
  expect(Math.abs(servedLoss(stepper, null) - without)).toBeLessThan(distanceMax);
  for (const { rank, loss } of losses) {
    expect(
      Math.abs(servedLoss(stepper, use.rows(Math.min(rank, use.rankMax))) - loss),
    ).toBeLessThan(distanceMax);
  }
  expect(Math.abs(losses.at(-1)!.loss - without)).toBeGreaterThan(0.05);
});
