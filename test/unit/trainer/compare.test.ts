import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { generationOf, openPacked, type PackedAdapter } from '../../../src/adapters/pack.ts';
import type { Packed } from '../../../src/adapters/pack-pairs.ts';
import { guardExamples } from '../../../src/jobs/guard-texts.ts';
import { compareAdapters } from '../../../src/trainer/compare.ts';
import type { Example } from '../../../src/trainer/examples.ts';
import { TrainingSession } from '../../../src/trainer/session.ts';
import {
  type OpenBase,
  openTinyBase,
  tinyEncoder,
  tinyExamples,
  tinyRecipe,
} from '../../support/training-base.ts';

const breathe = async (): Promise<void> => {};
const opened = ({ bytes }: Packed): PackedAdapter => openPacked(bytes, generationOf(bytes));
const learntIn = ({ learnt }: Example): number => learnt.reduce((sum, one) => sum + one, 0);

let base: OpenBase;
let session: TrainingSession;
let published: readonly [before: Packed, after: Packed];
const heldOut = tinyExamples(10, 48).slice(4);
const recipe = tinyRecipe({ stepsMax: 8, learningRate: 1e-2 });

beforeAll(async () => {
  base = await openTinyBase();
  session = new TrainingSession({
    ...{ base, recipe, training: tinyExamples(4, 48), heldOut, start: null, modules: null },
  });
  while (session.step < 2) await session.takeStep(breathe);
  const before = session.publish();
  while (session.step < 8) await session.takeStep(breathe);
  published = [before, session.publish()];
});
afterAll(() => {
  session[Symbol.dispose]();
  base.kernels[Symbol.dispose]();
});

describe('generations on the same examples', () => {
  it('have each example’s loss, whose mean is what an evaluation says', async () => {
    const guard = guardExamples.map(tinyEncoder(48));
    const options = { base, ranks: recipe.ranks, heldOut, guard, breathe };
    const [before, after] = published.map(opened) as [PackedAdapter, PackedAdapter];
    const compared = await compareAdapters({ before, after, earlier: before }, options);
    expect(compared.ranks).toEqual([1, 2, 4]);
    expect(compared.earlier).toEqual(compared.before.byRank.at(-1));
    expect(compared.before.guard).toHaveLength(guardExamples.length);
    const weights = heldOut.map(learntIn);
    const answers = weights.reduce((a, b) => a + b, 0);
    for (const [losses, packed] of [
      [compared.before, published[0]],
      [compared.after, published[1]],
    ] as const) {
      const evaluated = await session.evaluate(packed, breathe);
      for (const [i, { loss }] of evaluated.entries()) {
        expect(losses.byRank[i]).toHaveLength(heldOut.length);
        const mean =
          losses.byRank[i]!.reduce((sum, one, e) => sum + one * weights[e]!, 0) / answers;
        expect(Math.abs(mean - loss)).toBeLessThan(1e-5);
      }
    }
    // The largest rank learnt most, and other text is another loss.
    expect(compared.after.byRank.at(-1)).not.toEqual(compared.before.byRank.at(-1));
    expect(compared.after.guard).not.toEqual(compared.before.guard);
  });
});
