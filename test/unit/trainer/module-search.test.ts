import { afterAll, describe, expect, it } from 'vitest';
import { moduleIndex } from '../../../src/model/decoder-config.ts';
import { searchModules } from '../../../src/trainer/module-search.ts';
import { type RunRecipe, TrainingSession } from '../../../src/trainer/session.ts';
import { openTinyBase, tinyExamples, tinyRecipe } from '../../support/training-base.ts';

// algorithms.md section 2 over the tiny model; that the right modules are found is family-tasks.test.ts.

const base = await openTinyBase();
afterAll(() => base.kernels[Symbol.dispose]());

const examples = tinyExamples(24, 48);
const [training, heldOut] = [examples.slice(0, 16), examples.slice(16)];
const breathe = async (): Promise<void> => {};

function recipeOf(keepRatio: number): RunRecipe {
  const modules = { kind: 'diffora', keepRatio, searchShare: 0.5 };
  return tinyRecipe({ kind: 'lora', stepsMax: 20, learningRate: 1e-2, modules });
}

describe('the search for modules', () => {
  it('keeps the share that is wanted, those with the largest gates, and the same again', async () => {
    const options = { base, recipe: recipeOf(1 / 3), training, heldOut, start: null };
    const { kept, gates } = await searchModules(options, breathe);
    expect([gates.length, kept.size]).toEqual([14, 5]); // 14 / 3, rounded up
    const least = Math.min(...Array.from(kept, (index) => gates[index]!));
    gates.forEach((gate, index) => {
      expect(gate >= least || !kept.has(index)).toBe(true);
      expect(gate).not.toBe(0.5); // every module's has been learnt
    });
    const again = await searchModules(options, breathe);
    expect(again).toEqual({ kept, gates });
  });

  it('refuses to choose without held-out examples', async () => {
    const options = { base, recipe: recipeOf(0.5), training, heldOut: [], start: null };
    await expect(searchModules(options, breathe)).rejects.toThrow('held-out examples');
  });

  it('leaves an adapter of these modules alone, smaller as they are fewer', async () => {
    const kept = new Set([0, 3, 12]);
    const recipe = { ...recipeOf(0.2), stepsMax: 4 };
    const bytesOf = async (modules: ReadonlySet<number> | null) => {
      const options = { base, recipe, training, heldOut, start: null, modules };
      using session = new TrainingSession(options);
      while (session.step < 4) await session.takeStep(breathe);
      return session.publish();
    };
    const [some, all] = [await bytesOf(kept), await bytesOf(null)];
    const indices = some.manifest.modules.map(({ block, projection }) =>
      moduleIndex(block, projection),
    );
    expect(new Set(indices)).toEqual(kept);
    expect(all.manifest.modules.length).toBe(14);
    const numbers = (of: typeof some): number =>
      of.manifest.modules.reduce((sum, module) => sum + module.in + module.out, 0);
    const share = some.bytes.length / all.bytes.length;
    expect(Math.abs(share / (numbers(some) / numbers(all)) - 1)).toBeLessThan(0.15);
  });
});
