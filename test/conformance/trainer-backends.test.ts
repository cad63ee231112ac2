import { afterAll, describe, expect, it } from 'vitest';
import type { EggrollRecipe } from '../../src/jobs/recipe.ts';
import { GgmlKernels } from '../../src/kernels/ggml/ggml-kernels.ts';
import type { Kernels } from '../../src/kernels/kernels.ts';
import { ReferenceKernels } from '../../src/kernels/reference-kernels.ts';
import { TfjsKernels } from '../../src/kernels/tfjs/tfjs-kernels.ts';
import { openGguf } from '../../src/model/gguf.ts';
import { EggrollSession } from '../../src/trainer/eggroll-session.ts';
import type { Reward } from '../../src/trainer/rewards.ts';
import { type StepReport, TrainingSession } from '../../src/trainer/session.ts';
import { scoringOf } from '../../src/trainer/task-scores.ts';
import { tinyPath } from '../support/open-test-decoder.ts';
import { loadForTest, whyNoTensorflow } from '../support/tensorflow.ts';
import { openTinyBaseOn, tinyExamples, tinyRecipe } from '../support/training-base.ts';

// The same training on every backend: losses, gradient norms and where the factors end after three steps.

const examples = tinyExamples(8, 32);
const [heldOut, training] = [examples.slice(0, 2), examples.slice(2)];
const breathe = async (): Promise<void> => {};
const steps = { windowTokens: 32, learningRate: 1e-2, warmupShare: 0 };

interface Trained {
  readonly reports: StepReport[];
  readonly parameters: Float32Array;
  readonly heldOut: number;
}

async function train(kernels: Kernels, more: object = {}): Promise<Trained> {
  const base = await openTinyBaseOn(kernels);
  const recipe = tinyRecipe({ ...steps, ...more });
  using session = new TrainingSession({ base, recipe, training, heldOut, start: null });
  const reports: StepReport[] = [];
  while (session.step < 3) reports.push(await session.takeStep(breathe));
  const losses = await session.evaluate(session.files(), breathe);
  return { reports, parameters: session.checkpoint().parameters, heldOut: losses.at(-1)!.loss };
}

function expectAlike({ reports, parameters, heldOut }: Trained, wanted: Trained): void {
  reports.forEach(({ loss, gradientNorm }, i) => {
    expect(Math.abs(loss / wanted.reports[i]!.loss - 1)).toBeLessThan(1e-5);
    expect(Math.abs(gradientNorm / wanted.reports[i]!.gradientNorm - 1)).toBeLessThan(1e-4);
  });
  const away = Math.hypot(...parameters.map((value, i) => value - wanted.parameters[i]!));
  // Adam's first steps divide by the gradient's size: where that is all rounding, signs may differ.
  expect(away / Math.hypot(...wanted.parameters)).toBeLessThan(1e-3);
  expect(Math.abs(heldOut / wanted.heldOut - 1)).toBeLessThan(1e-4);
}

const ggml = new GgmlKernels({ threads: 1 });
afterAll(() => ggml[Symbol.dispose]());

const backends: Record<string, () => Promise<Kernels>> = {
  reference: async () => new ReferenceKernels(),
};
const missing = whyNoTensorflow('@tensorflow/tfjs-node');
const tfjs = async (): Promise<Kernels> =>
  new TfjsKernels(await loadForTest('@tensorflow/tfjs-node'));
if (missing === null) backends.tfjs = tfjs;

describe('three training steps, as on ggml', () => {
  for (const [name, create] of Object.entries(backends)) {
    it(name, async () => {
      using kernels = await create();
      expectAlike(await train(kernels), await train(ggml));
    });
  }

  if (missing !== null) it.skip(`tfjs (skipped: ${missing})`, () => undefined);
});

/** What uses other ops, or reads weights and gradients otherwise. */
const ways = {
  hydra: { kind: 'hydra' },
  triangular: { kind: 'triangular' },
  'triangular that grows': { kind: 'triangular', rankGrowth: { interval: 1 } },
  salt: { kind: 'salt', tailRank: 2 },
  svfit: { kind: 'svfit' },
  fly: { kind: 'fly', scaling: 'none' },
  mora: { kind: 'mora', recompute: true },
  queryable: { kind: 'queryable', bank: { atoms: 5, queryWidth: 6, blockLayers: 1 } },
  flexmore: { kind: 'flexmore', experts: [1, 3].map((rank) => ({ name: `of ${rank}`, rank })) },
  'lora from eva': { kind: 'lora', init: { kind: 'eva', rho: 2, tokens: 256 } },
  'sandwich, computed again': { objective: 'sandwich', recompute: true },
  'lora-pro under trp': {
    kind: 'lora',
    optimizer: { name: 'lora-pro-sgd' },
    regularizer: { kind: 'trp', every: 2 },
  },
};

describe('on TensorFlow.js as on ggml', () => {
  for (const [name, more] of Object.entries(ways)) {
    if (missing !== null) it.skip(`${name} (skipped: ${missing})`, () => undefined);
    else
      it(name, async () => {
        using kernels = await tfjs();
        expectAlike(await train(kernels, more), await train(ggml, more));
      });
  }

  const title = 'a run by scores';
  if (missing !== null) it.skip(`${title} (skipped: ${missing})`, () => undefined);
  else
    it(title, async () => {
      using kernels = await tfjs();
      const [got, wanted] = [await answers(kernels), await answers(ggml)];
      expect(new Set(wanted).size).toBeGreaterThan(8);
      // Random weights have near ties: a last bit may turn one.
      expect(got.filter((answer, i) => answer === wanted[i]).length).toBeGreaterThanOrEqual(14);
    });
});

/** What the members of the first generation answer. */
async function answers(kernels: Kernels): Promise<string[]> {
  const base = await openTinyBaseOn(kernels);
  using file = openGguf(tinyPath);
  const sizes = { population: 16, groupSize: 4, sigma: 0.2, answerTokens: 8 };
  const method = { kind: 'eggroll', ...sizes, reward: { kind: 'expected' } };
  const recipe = tinyRecipe({ method, windowTokens: 32 });
  const all: string[] = [];
  const reward: Reward = ({ answer }) => all.push(answer) % 2;
  const scoring = { ...scoringOf(file.metadata, recipe.method as EggrollRecipe), reward };
  const data = { training, heldOut, start: null };
  using session = new EggrollSession({ base, recipe, ...data, scoring });
  await session.takeStep(breathe);
  return all;
}
