import { afterAll, describe, expect, it } from 'vitest';
import { GgmlKernels } from '../../src/kernels/ggml/ggml-kernels.ts';
import type { Kernels } from '../../src/kernels/kernels.ts';
import { ReferenceKernels } from '../../src/kernels/reference-kernels.ts';
import { TfjsKernels } from '../../src/kernels/tfjs/tfjs-kernels.ts';
import { type StepReport, TrainingSession } from '../../src/trainer/session.ts';
import { loadForTest, whyNoTensorflow } from '../support/tensorflow.ts';
import { openTinyBaseOn, tinyExamples, tinyRecipe } from '../support/training-base.ts';

// The same training on every backend: losses, gradient norms and where the factors end after three steps.

const examples = tinyExamples(8, 32);
const recipe = tinyRecipe({ windowTokens: 32, learningRate: 1e-2, warmupShare: 0 });

async function train(
  kernels: Kernels,
): Promise<{ reports: StepReport[]; parameters: Float32Array; heldOut: number }> {
  const base = await openTinyBaseOn(kernels);
  using session = new TrainingSession({
    ...{ base, recipe, start: null },
    ...{ training: examples.slice(2), heldOut: examples.slice(0, 2) },
  });
  const reports: StepReport[] = [];
  while (session.step < 3) reports.push(await session.takeStep(async () => {}));
  const losses = await session.evaluate(session.publish(), async () => {});
  return { reports, parameters: session.checkpoint().parameters, heldOut: losses.at(-1)!.loss };
}

const ggml = new GgmlKernels({ threads: 1 });
afterAll(() => ggml[Symbol.dispose]());
const wanted = await train(ggml);

const backends: Record<string, () => Promise<Kernels>> = {
  reference: async () => new ReferenceKernels(),
};
const missing = whyNoTensorflow('@tensorflow/tfjs-node');
if (missing === null) {
  backends.tfjs = async () => new TfjsKernels(await loadForTest('@tensorflow/tfjs-node'));
}

describe('three training steps, as on ggml', () => {
  for (const [name, create] of Object.entries(backends)) {
    it(name, async () => {
      using kernels = await create();
      const { reports, parameters, heldOut } = await train(kernels);
      reports.forEach(({ loss, gradientNorm }, i) => {
        expect(Math.abs(loss / wanted.reports[i]!.loss - 1)).toBeLessThan(1e-5);
        expect(Math.abs(gradientNorm / wanted.reports[i]!.gradientNorm - 1)).toBeLessThan(1e-4);
      });
      const away = Math.hypot(...parameters.map((value, i) => value - wanted.parameters[i]!));
      // Adam's first steps divide by the gradient's size: where that is all rounding, signs may differ.
      expect(away / Math.hypot(...wanted.parameters)).toBeLessThan(1e-3);
      expect(Math.abs(heldOut / wanted.heldOut - 1)).toBeLessThan(1e-4);
    });
  }

  if (missing !== null) it.skip(`tfjs (skipped: ${missing})`, () => undefined);
});
