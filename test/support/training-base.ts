// The tiny random Llama as a base to train on, and examples for it.

import { expect } from 'vitest';
import type { ExampleShape } from '../../src/jobs/example-lines.ts';
import { parseRecipe, type Recipe } from '../../src/jobs/recipe.ts';
import { GgmlKernels } from '../../src/kernels/ggml/ggml-kernels.ts';
import type { Kernels } from '../../src/kernels/kernels.ts';
import { readDecoderConfig } from '../../src/model/decoder-config.ts';
import { sha256OfFile } from '../../src/model/file-hash.ts';
import { openGguf } from '../../src/model/gguf.ts';
import { loadWeights } from '../../src/model/weights.ts';
import type { Checkpoint } from '../../src/trainer/checkpoint.ts';
import {
  createExampleEncoder,
  type Example,
  type ExampleEncoder,
} from '../../src/trainer/examples.ts';
import type { RunRecipe, TrainingBase, TrainingSession } from '../../src/trainer/session.ts';
import { baseModelPath } from './base-model.ts';
import { tinyPath } from './open-test-decoder.ts';

export async function openTinyBase(): Promise<OpenBase> {
  return openAt(tinyPath);
}

/** Over other kernels, which are the caller's: in f32. */
export async function openTinyBaseOn(kernels: Kernels): Promise<TrainingBase> {
  using file = openGguf(tinyPath);
  const config = readDecoderConfig(file);
  const weights = loadWeights(file, config, { kernels, mode: 'exact', cache: null });
  return { config, weights, kernels, hash: await sha256OfFile(tinyPath) };
}

export async function openRealBase(): Promise<OpenBase> {
  return openAt(await baseModelPath());
}

export interface OpenBase extends TrainingBase {
  readonly kernels: GgmlKernels;
}

async function openAt(path: string): Promise<OpenBase> {
  using file = openGguf(path);
  const config = readDecoderConfig(file);
  const kernels = new GgmlKernels({ threads: 1, f32Activations: true });
  const weights = loadWeights(file, config, { kernels, mode: 'faithful', cache: null });
  return { config, weights, kernels, hash: await sha256OfFile(path) };
}

export function tinyEncoder(windowRows: number): ExampleEncoder {
  using file = openGguf(tinyPath);
  return createExampleEncoder(file.metadata, windowRows);
}

/** Sums in words: what a small model can learn by heart. */
export function tinyExamples(count: number, windowRows: number): Example[] {
  const encode = tinyEncoder(windowRows);
  const words = 'one two three four five the model answers a question'.split(' ');
  return Array.from({ length: count }, (_, i) => {
    const [asked, answer] = [words[i % 10]!, words[(3 * i + 1) % 10]!];
    const shape: ExampleShape = {
      kind: 'chat',
      messages: [
        { role: 'user', content: `${asked} ${i}`, learnt: false },
        { role: 'assistant', content: `${answer} ${asked}`, learnt: true },
      ],
    };
    return encode(shape);
  });
}

export function decided(recipe: Recipe): RunRecipe {
  const { learningRate } = recipe;
  if (learningRate === 'sweep') throw new Error('no learning rate');
  return { ...recipe, learningRate };
}

/** Small steps over the tiny base; the rest by default. */
export function tinyRecipe(more: Readonly<Record<string, unknown>> = {}): RunRecipe {
  const sizes = { rank: 4, windowTokens: 48, batchWindows: 2, accumulation: 2, epochs: 100 };
  return decided(parseRecipe({ ...sizes, stepsMax: 20, recompute: false, ...more }, 'recipe'));
}

/** Losses of the steps. */
export async function takeSteps(session: TrainingSession, until: number): Promise<number[]> {
  const losses: number[] = [];
  while (session.step < until) losses.push((await session.takeStep(async () => {})).loss);
  return losses;
}

export interface Resumed extends Disposable {
  readonly straight: TrainingSession;
  /** From the checkpoint on. */
  readonly second: TrainingSession;
  readonly checkpoint: Checkpoint;
}

/** The same training in one go, and cut off after its checkpoint at `cut` and what a crash loses. */
export async function resume(
  open: () => TrainingSession,
  { cut, lost, steps }: { readonly cut: number; readonly lost: number; readonly steps: number },
): Promise<Resumed> {
  const [straight, second] = [open(), open()];
  await takeSteps(straight, steps);
  using first = open();
  await takeSteps(first, cut);
  const checkpoint = first.checkpoint();
  await takeSteps(first, cut + lost);
  second.restore(checkpoint);
  expect(second.step).toBe(cut);
  await takeSteps(second, steps);
  expect(second.checkpoint()).toEqual(straight.checkpoint());
  expect(second.checkpoint().parameters).not.toEqual(checkpoint.parameters);
  const close = (): void => {
    straight[Symbol.dispose]();
    second[Symbol.dispose]();
  };
  return { straight, second, checkpoint, [Symbol.dispose]: close };
}
