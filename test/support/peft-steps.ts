// The fixtures of test/oracle/peft-steps.py, and the same 20 steps by a TrainingSession.

import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { parseRecipe } from '../../src/jobs/recipe.ts';
import type { Example } from '../../src/trainer/examples.ts';
import { type TrainingBase, TrainingSession } from '../../src/trainer/session.ts';
import { decided } from './training-base.ts';

export interface PeftSteps {
  readonly rank: number;
  readonly lengths: readonly number[];
  readonly learningRate: number;
  readonly steps: number;
  readonly warmupShare: number;
  readonly weightDecay: number;
  readonly clipNorm: number;
  readonly seed: number;
  readonly losses: readonly number[];
  readonly norms: readonly number[];
  /** ‖·‖ of the first block's factors after the last step. */
  readonly finalNorms: readonly number[];
}

export function readPeftSteps(name: 'tiny' | 'smollm2'): PeftSteps {
  const path = join(import.meta.dirname, `../golden/trainer/peft-steps-${name}.json`);
  return JSON.parse(readFileSync(path, 'utf8')) as PeftSteps;
}

export interface PeftComparison {
  /** Largest relative distances over all steps. */
  readonly loss: number;
  readonly norm: number;
  readonly finalNorm: number;
}

export async function compareWithPeft(
  base: TrainingBase,
  golden: PeftSteps,
): Promise<PeftComparison> {
  const { rank, steps, seed } = golden;
  let state = seed;
  const uniform = (): number => {
    state = (Math.imul(state, 1_664_525) + 1_013_904_223) >>> 0;
    return state / 2 ** 32;
  };
  const recipe = decided(
    parseRecipe(
      {
        ...{ kind: 'lora', rank, ranks: [rank], epochs: steps },
        ...{ windowTokens: 128, batchWindows: 2, accumulation: 3 }, // all examples in a step
        ...{ learningRate: golden.learningRate, warmupShare: golden.warmupShare },
        ...{ weightDecay: golden.weightDecay, clipNorm: golden.clipNorm },
      },
      'recipe',
    ),
  );
  const { config } = base;
  const sizes = new TrainingSession({ base, recipe, training: [blank], heldOut: [], start: null });
  const numbers = sizes.parameters.flatMap(({ name, values, columns }) => {
    const scale = name.endsWith('.a') ? columns ** -0.5 : 0.01;
    return Array.from(values, () => (uniform() - 0.5) * 2 * scale);
  });
  sizes[Symbol.dispose]();
  const training = golden.lengths.map((length): Example => {
    const tokens = Int32Array.from({ length }, () => Math.floor(uniform() * config.vocabSize));
    const learnt = Uint8Array.from({ length }, (_, i) => (0 < i && uniform() < 0.6 ? 1 : 0));
    return { tokens, learnt };
  });
  using session = new TrainingSession({ base, recipe, training, heldOut: [], start: null });
  session.restore({ ...session.checkpoint(), parameters: Float32Array.from(numbers) });
  if (session.steps !== steps) throw new Error(`${session.steps} steps, want ${steps}`);
  const distance = (got: readonly number[], wanted: readonly number[]): number =>
    Math.max(...got.map((value, i) => Math.abs(value / wanted[i]! - 1)));
  const reports = [];
  while (session.step < steps) reports.push(await session.takeStep(async () => {}));
  const finalNorms = session.parameters.slice(0, 14).map(({ values }) => Math.hypot(...values));
  return {
    loss: distance(
      reports.map(({ loss }) => loss),
      golden.losses,
    ),
    norm: distance(
      reports.map(({ gradientNorm }) => gradientNorm),
      golden.norms,
    ),
    finalNorm: distance(finalNorms, golden.finalNorms),
  };
}

const blank: Example = { tokens: new Int32Array(2), learnt: Uint8Array.of(0, 1) };
