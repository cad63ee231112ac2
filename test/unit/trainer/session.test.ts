import { afterAll, describe, expect, it } from 'vitest';
import { generationOf, openPacked, type PackedAdapter } from '../../../src/adapters/pack.ts';
import { squeezePacked } from '../../../src/adapters/pack-pairs.ts';
import { importPacked, packedConfig } from '../../../src/adapters/packed-import.ts';
import type { Example } from '../../../src/trainer/examples.ts';
import { type RunRecipe, TrainingSession } from '../../../src/trainer/session.ts';
import { planSteps } from '../../../src/trainer/step-plan.ts';
import {
  openTinyBase,
  resume,
  takeSteps,
  tinyExamples,
  tinyRecipe,
} from '../../support/training-base.ts';

const base = await openTinyBase();
afterAll(() => base.kernels[Symbol.dispose]());

const examples = tinyExamples(40, 48);
const [training, heldOut] = [examples.slice(0, 32), examples.slice(32)];
const breathe = async (): Promise<void> => {};

interface Opening {
  readonly training?: readonly Example[];
  readonly heldOut?: readonly Example[];
  readonly start?: PackedAdapter | null;
}

function open(recipe: RunRecipe, more: Opening = {}): TrainingSession {
  return new TrainingSession({ base, recipe, training, heldOut, start: null, ...more });
}

function packedOf(session: TrainingSession): PackedAdapter {
  const { bytes } = session.publish();
  return openPacked(bytes, generationOf(bytes));
}

const cases = [
  { name: 'lora, adamw', recipe: { kind: 'lora' } },
  {
    name: 'sandwich, adabelief',
    recipe: { objective: 'sandwich', optimizer: { name: 'adabelief' } },
  },
  { name: 'diag, frugal', recipe: { optimizer: { name: 'frugal', gap: 3 }, recompute: true } },
  {
    name: 'codyra',
    recipe: { kind: 'lora', rankSelection: { kind: 'codyra', thresholdMax: 0.1 } },
  },
  { name: 'coso', recipe: { kind: 'lora', continual: { kind: 'coso', gap: 3, sketch: 8 } } },
  { name: 'anneal', recipe: { kind: 'lora', squeeze: { kind: 'anneal', from: 16, share: 0.7 } } },
] as const;

describe('a training session', () => {
  it.each(cases)(
    'goes on from a checkpoint with the bytes it would have had: $name',
    async ({ recipe }) => {
      using run = await resume(() => open(tinyRecipe(recipe)), { cut: 10, lost: 3, steps: 20 });
      expect(run.second.publish().bytes).toEqual(run.straight.publish().bytes);
    },
  );

  it('learns, and what is published is what was learnt', async () => {
    const recipe = tinyRecipe({
      stepsMax: 60,
      learningRate: 1e-2,
      weightDecay: 0,
      accumulation: 16,
    });
    using session = open(recipe, { heldOut: training });
    const base0 = await session.baseLoss(breathe);
    const losses = await takeSteps(session, 60);
    expect(losses[0]).toBeCloseTo(base0!, 4); // all examples are in each step, and B is zero
    expect(losses.at(-1)).toBeLessThan(0.7 * losses[0]!);
    const byRank = await session.evaluate(session.publish(), breathe);
    expect(byRank.map(({ rank }) => rank)).toEqual([1, 2, 4]);
    // The last step moved the factors once more, and publication rounds them to f16.
    expect(byRank.at(-1)!.loss).toBeLessThan(losses.at(-1)! + 0.01);
    for (const [i, { loss }] of byRank.entries()) {
      expect(loss).toBeLessThanOrEqual((byRank[i - 1]?.loss ?? base0!) + 0.02);
    }
    // Evaluation leaves the training where it was.
    const before = session.checkpoint();
    await session.evaluate(session.publish(), breathe);
    expect(session.checkpoint()).toEqual(before);
  });

  it.each([
    { objective: 'multi', order: 'as-trained' },
    { objective: 'dylora', order: 'as-trained' },
    { objective: 'diag', order: 'as-published' },
    { objective: 'binary', order: 'svd', levels: 'energy' },
    { objective: 'sandwich', order: 'svd', scaling: 'sqrt' },
  ])('publishes %j as a file that an import takes', async (more) => {
    const recipe = tinyRecipe({ ...more, stepsMax: 4, targets: ['attn_q', 'ffn_down'] });
    using session = open(recipe);
    await takeSteps(session, 4);
    const { bytes, manifest } = session.publish();
    const into = { config: base.config, hash: base.hash, names: [] };
    expect(importPacked(packedConfig, bytes, into).manifest).toEqual(manifest);
    expect(manifest.modules.map(({ projection }) => projection)).toEqual(
      Array.from({ length: base.config.blocks }, () => ['attn_q', 'ffn_down']).flat(),
    );
    expect(await session.evaluate({ bytes, manifest }, breathe)).toHaveLength(3);
  });

  it('as published, diag leaves out P: other numbers than what was trained', async () => {
    using trained = open(tinyRecipe({ order: 'svd', stepsMax: 20, learningRate: 1e-2 }));
    using raw = open(tinyRecipe({ order: 'as-published', stepsMax: 20, learningRate: 1e-2 }));
    await takeSteps(trained, 20);
    raw.restore({ ...trained.checkpoint(), run: raw.run });
    const [folded] = (await trained.evaluate(trained.publish(), breathe)).slice(-1);
    const [bare] = (await raw.evaluate(raw.publish(), breathe)).slice(-1);
    expect(Math.abs(folded!.loss - bare!.loss)).toBeGreaterThan(1e-3);
  });

  it.each(['diag', 'multi'])('goes on from an adapter as it is served: %s', async (objective) => {
    using first = open(tinyRecipe({ stepsMax: 20, learningRate: 1e-2, rank: 2 }));
    await takeSteps(first, 20);
    const start = packedOf(first);
    const losses = await first.evaluate(first.publish(), breathe);
    using second = open(tinyRecipe({ objective, order: 'svd' }), { start });
    const again = await second.evaluate(second.publish(), breathe);
    expect(again.at(-1)!.loss).toBeCloseTo(losses.at(-1)!.loss, 3);
    expect(second.publish().manifest.source).toMatchObject({ from: [start.generation] });
    expect(again.at(-1)!.loss).not.toBeCloseTo((await second.baseLoss(breathe))!, 3);
  });

  it('refuses an adapter with more ranks, of other modules, or of another base', async () => {
    using first = open(tinyRecipe({ stepsMax: 2 }));
    await takeSteps(first, 2);
    const start = packedOf(first);
    expect(() => open(tinyRecipe({ rank: 2 }), { start })).toThrow('it has 4 ranks, the recipe 2');
    expect(() => open(tinyRecipe({ targets: ['attn_q'] }), { start })).toThrow('it changes attn_k');
    const other = { ...base, hash: '0'.repeat(64) };
    const options = { recipe: tinyRecipe(), training, heldOut, start };
    expect(() => new TrainingSession({ base: other, ...options })).toThrow('of another base');
  });

  it('leaves out a step whose numbers are not finite, and fails at the second in a row', async () => {
    using session = open(tinyRecipe());
    const sane = session.checkpoint();
    const parameters = sane.parameters.map(() => 1e30);
    session.restore({ ...sane, parameters });
    const report = await session.takeStep(breathe);
    expect(report.isTaken).toBe(false);
    expect(session.checkpoint()).toMatchObject({ step: 1, skipped: true, parameters });
    // A crash in between changes nothing.
    using restored = open(tinyRecipe());
    restored.restore(session.checkpoint());
    for (const one of [session, restored]) {
      await expect(one.takeStep(breathe)).rejects.toThrow('training diverged: loss NaN');
    }
    session.restore({ ...sane, step: 1, skipped: true });
    expect((await session.takeStep(breathe)).isTaken).toBe(true);
    expect(session.checkpoint().skipped).toBe(false);
  });

  it('an interrupted step leaves no trace', async () => {
    using straight = open(tinyRecipe({ objective: 'multi' }));
    await takeSteps(straight, 3);
    using session = open(tinyRecipe({ objective: 'multi' }));
    await takeSteps(session, 2);
    let breaths = 0;
    const stop = async (): Promise<void> => {
      breaths += 1;
      if (breaths === 4) throw new Error('enough');
    };
    await expect(session.takeStep(stop)).rejects.toThrow('enough');
    await takeSteps(session, 3);
    expect(session.checkpoint()).toEqual(straight.checkpoint());
  });

  it('packs without a trace: in any windows the losses are the same', async () => {
    const losses = await Promise.all(
      [48, 96, 200].map(async (windowTokens) => {
        using session = open(tinyRecipe({ windowTokens, batchWindows: 1 + (windowTokens % 3) }));
        return session.baseLoss(breathe);
      }),
    );
    for (const loss of losses) expect(loss).toBeCloseTo(losses[0]!, 5);
  });

  it('has an end, and another one with other data, base or recipe', () => {
    using session = open(tinyRecipe());
    const runs = [
      open(tinyRecipe({ seed: 1 })),
      open(tinyRecipe(), { training: training.slice(1) }),
      open(tinyRecipe(), { heldOut: [] }),
    ].map((other) => {
      using opened = other;
      expect(() => opened.restore(session.checkpoint())).toThrow(
        'it is of another recipe, base or file',
      );
      return opened.run;
    });
    expect(new Set([session.run, ...runs]).size).toBe(4);
    expect(() => open(tinyRecipe({ windowTokens: 4096, batchWindows: 1 }))).toThrow(
      'windows of 4096 tokens, the base has 2048',
    );
    expect(() => open(tinyRecipe(), { training: [] })).toThrow('no example to train on');
  });
});

describe('TRP', () => {
  const trp = { kind: 'trp', weight: 1e-2, every: 5, energy: 0.9 };
  const lora = { kind: 'lora', rank: 8, learningRate: 1e-2, stepsMax: 20 };

  it('of weight 0 and energy 1 changes no bit', async () => {
    using plain = open(tinyRecipe(lora));
    using idle = open(tinyRecipe({ ...lora, regularizer: { ...trp, weight: 0, energy: 1 } }));
    for (const session of [plain, idle]) await takeSteps(session, 20);
    expect(idle.checkpoint().parameters).toEqual(plain.checkpoint().parameters);
  });

  it('leaves products of fewer ranks, which a squeeze to them does not change', async () => {
    using plain = open(tinyRecipe(lora));
    using pruned = open(tinyRecipe({ ...lora, regularizer: trp }));
    for (const session of [plain, pruned]) await takeSteps(session, 20); // the last step prunes
    // What rounding to f32 left of the pruned directions is no rank.
    const squeezed = [plain, pruned].map((session) =>
      squeezePacked(packedOf(session), { variance: 1 - 1e-9 }),
    );
    const [all, few] = squeezed.map(({ manifest }) =>
      manifest.modules.reduce((sum, { rank }) => sum + rank, 0),
    );
    expect(few!).toBeLessThan(0.7 * all!);
    const [before] = (await pruned.evaluate(pruned.publish(), breathe)).slice(-1);
    const [after] = (await pruned.evaluate(squeezed[1]!, breathe)).slice(-1);
    expect(Math.abs(after!.loss / before!.loss - 1)).toBeLessThan(0.005);
  });
});

describe('growing batches', () => {
  const growing = (eta: number): RunRecipe =>
    tinyRecipe({
      ...{ stepsMax: null, epochs: 4, batchWindows: 1, accumulation: 2, learningRate: 3e-3 },
      batchSchedule: { kind: 'adadagrad', eta, max: 16 },
    });

  async function sizesOf(session: TrainingSession): Promise<number[]> {
    const sizes: number[] = [];
    while (session.step < session.steps) {
      sizes.push((await session.takeStep(breathe)).microBatches);
    }
    return sizes;
  }

  it('at most double where gradients are mostly noise, and see every example once an epoch', async () => {
    using session = open(growing(0.05));
    const sizes = await sizesOf(session);
    expect(sizes.slice(0, 3)).toEqual([2, 4, 8]);
    expect(sizes[3]).toBeGreaterThan(8);
    // Never smaller again, but for what is left of an epoch.
    const smaller = sizes.filter((size, i) => size < Math.max(...sizes.slice(0, i + 1)));
    expect(smaller.length).toBeLessThanOrEqual(4);
    expect(Math.max(...sizes)).toBeLessThanOrEqual(16);
    const taken = sizes.reduce((sum, size) => sum + size, 0);
    expect(taken).toBe(planSteps(training, growing(0.05)).microBatchCount);
    expect(session.step).toBe(sizes.length);
  });

  it('stay where eta is large', async () => {
    using session = open(growing(1e6));
    const sizes = await sizesOf(session);
    // An epoch may end with one.
    expect(sizes.filter((taken) => taken === 2).length).toBeGreaterThan(50);
    expect(sizes.filter((taken) => taken !== 2).length).toBeLessThanOrEqual(4);
  });

  it('go on from a checkpoint as they were', async () => {
    using straight = open(growing(0.3));
    const sizes = await sizesOf(straight);
    using first = open(growing(0.3));
    await takeSteps(first, 5);
    using second = open(growing(0.3));
    second.restore(first.checkpoint());
    expect(await sizesOf(second)).toEqual(sizes.slice(5));
    expect(second.checkpoint()).toEqual(straight.checkpoint());
  });
});
