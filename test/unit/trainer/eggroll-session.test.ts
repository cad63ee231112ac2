import { mkdirSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, describe, expect, it } from 'vitest';
import { importPacked } from '../../../src/adapters/packed-import.ts';
import type { FromTrainer, TrainerSpec } from '../../../src/jobs/messages.ts';
import { type EggrollRecipe, parseRecipe } from '../../../src/jobs/recipe.ts';
import { openGguf } from '../../../src/model/gguf.ts';
import { addNoise, pairNoise } from '../../../src/trainer/eggroll.ts';
import { type EggrollOptions, EggrollSession } from '../../../src/trainer/eggroll-session.ts';
import type { Judged, Reward } from '../../../src/trainer/rewards.ts';
import { TrainingSession } from '../../../src/trainer/session.ts';
import { sweepRates } from '../../../src/trainer/sweep.ts';
import type { Scoring } from '../../../src/trainer/task-scores.ts';
import { answerText } from '../../../src/trainer/tasks.ts';
import { trainFile } from '../../../src/trainer/train-file.ts';
import { countTraining } from '../../support/counting-kernels.ts';
import { tinyPath } from '../../support/open-test-decoder.ts';
import { openTinyBase, tinyExamples, tinyRecipe } from '../../support/training-base.ts';

const base = await openTinyBase();
afterAll(() => base.kernels[Symbol.dispose]());

using file = openGguf(tinyPath);
const text = answerText(file.metadata);
const examples = tinyExamples(40, 48);
const [training, heldOut] = [examples.slice(0, 32), examples.slice(32)];
const breathe = async (): Promise<void> => {};

/** Share of letters: of all that is printed, what random weights can be moved to. */
function letters({ answer }: Judged): number {
  return (answer.match(/[a-z]/g)?.length ?? 0) / Math.max(1, answer.length);
}

function recipeOf(method: object = {}, more: object = {}) {
  const reward = { kind: 'full-stop' };
  return tinyRecipe({
    method: {
      kind: 'eggroll',
      population: 16,
      groupSize: 8,
      sigma: 0.2,
      answerTokens: 12,
      reward,
      ...method,
    },
    ...{ learningRate: 0.1, stepsMax: 30, ...more },
  });
}

function open({ reward = letters, ...more }: Partial<EggrollOptions> & { reward?: Reward } = {}) {
  const { recipe = recipeOf() } = more;
  const { answerTokens } = recipe.method as EggrollRecipe;
  const scoring: Scoring = { text, reward, judge: null, answerTokens };
  return new EggrollSession({ base, recipe, training, heldOut, start: null, scoring, ...more });
}

describe('a training run by scores', () => {
  it('raises them for prompts it has not seen, and computes no gradient', async () => {
    const watched = countTraining(base.kernels);
    const over = { ...base, kernels: watched.kernels };
    const session = open({ base: over, recipe: recipeOf({ population: 32 }) });
    const before = await session.baseLoss(breathe);
    while (session.step < session.steps) await session.takeStep(breathe);
    const after = await session.evaluate(session.publish(), breathe);
    expect(after.map(({ rank }) => rank)).toEqual([1, 2, 4]);
    expect(after.at(-1)!.loss).toBeLessThan(before! - 0.1);
    expect(watched.count).toBe(0);
    // The other way of training does, by the same count.
    const options = { base: over, recipe: tinyRecipe(), training, heldOut, start: null };
    using other = new TrainingSession(options);
    expect(other.steps).toBeGreaterThan(0);
    expect(watched.count).toBeGreaterThan(10);
  }, 60_000);

  it('has members whose answers are those of the adapter they stand for', async () => {
    const answers: string[] = [];
    const reward = (judged: Judged): number => {
      answers.push(judged.answer);
      return 0;
    };
    const method = { population: 20, groupSize: 20, noiseRank: 2 };
    const recipe = recipeOf(method, { rank: 12, order: 'as-trained', ranks: [12] });
    const [task] = training;
    const options = { recipe, reward, training: [task!], heldOut: [task!] };
    const session = open(options);
    await session.takeStep(breathe);
    const members = answers.splice(0);
    expect(members).toHaveLength(20);
    expect(new Set(members).size).toBeGreaterThan(10);
    const moved = open(options);
    for (const [member, answer] of members.entries()) {
      const checkpoint = moved.checkpoint();
      let at = 0;
      checkpoint.parameters.fill(0);
      for (const { module, rows, columns } of moved.parameters) {
        const size = rows * columns;
        const noise = pairNoise(
          { seed: recipe.seed, generation: 0, pair: member >> 1, module },
          { rows, columns },
          2,
        );
        const by = member % 2 === 0 ? 0.2 : -0.2;
        addNoise(checkpoint.parameters.subarray(at, at + size), noise, by, 2);
        at += size;
      }
      moved.restore(checkpoint);
      answers.length = 0;
      await moved.evaluate(moved.publish(), breathe);
      expect(answers, `member ${member}`).toEqual([answer]);
    }
  });

  it('goes on from a checkpoint with the bytes it would have had', async () => {
    const recipe = recipeOf({}, { optimizer: { name: 'adamw' }, stepsMax: 6 });
    const straight = open({ recipe });
    while (straight.step < 6) await straight.takeStep(breathe);
    const first = open({ recipe });
    while (first.step < 3) await first.takeStep(breathe);
    const checkpoint = first.checkpoint();
    const second = open({ recipe });
    second.restore(checkpoint);
    while (second.step < 6) await second.takeStep(breathe);
    expect(second.checkpoint()).toEqual(straight.checkpoint());
    expect(second.publish().bytes).toEqual(straight.publish().bytes);
    expect(second.checkpoint().parameters).not.toEqual(checkpoint.parameters);
    first.restart(recipe.learningRate, 6);
    while (first.step < 6) await first.takeStep(breathe);
    expect(first.publish().bytes).toEqual(straight.publish().bytes);
    expect(() => open().restore(checkpoint)).toThrow('another recipe');
  });

  it('refuses answers that would leave the context', () => {
    const learnt = Uint8Array.from({ length: 1026 }, (_, i) => (i < 1025 ? 0 : 1));
    const example = { tokens: new Int32Array(1026).fill(5), learnt };
    const recipe = recipeOf({ answerTokens: 1024 });
    const more = 'prompts of 1025 tokens and answers of 1024, the base has 2048';
    expect(() => open({ recipe, training: [example] })).toThrow(more);
    const one = { tokens: example.tokens.slice(1), learnt: learnt.slice(1) };
    open({
      recipe: recipeOf({ answerTokens: 1024, population: 2, groupSize: 2 }),
      training: [one],
    });
  });

  it('leaves no trace of a generation that is interrupted', async () => {
    const session = open();
    await session.takeStep(breathe);
    const before = session.checkpoint();
    let left = 5;
    const interrupt = async (): Promise<void> => {
      left -= 1;
      if (left < 0) throw new Error('enough');
    };
    await expect(session.takeStep(interrupt)).rejects.toThrow('enough');
    expect(session.checkpoint()).toEqual(before);
  });

  it('asks every prompt once an epoch, each of one group', async () => {
    const asked: string[] = [];
    const reward = ({ expected }: Judged): number => {
      asked.push(expected);
      return 0;
    };
    const recipe = recipeOf({ groupSize: 4 }, { epochs: 2, stepsMax: null });
    const own = tinyExamples(10, 48);
    const session = open({ recipe, reward, training: own });
    expect(session.steps).toBe(5); // 2 epochs of 10, 4 at a time
    while (session.step < session.steps) await session.takeStep(breathe);
    const groups = asked.filter((_, i) => i % 4 === 0);
    expect(asked).toEqual(groups.flatMap((each) => [each, each, each, each]));
    const [one, other] = [new Set(groups.slice(0, 10)), new Set(groups.slice(10))];
    expect(one.size).toBe(10);
    expect(other).toEqual(one);
    expect(groups.slice(10)).not.toEqual(groups.slice(0, 10));
    // Nobody fared better than anybody else.
    expect(session.checkpoint().parameters.every((value) => value === 0)).toBe(true);
  });
});

it.each([0.1, 'sweep'])(
  'a file of examples becomes an adapter, at rate %s',
  async (learningRate) => {
    const folder = mkdtempSync(join(tmpdir(), 'eggroll-'));
    const trainingPath = join(folder, 'training.jsonl');
    const lines = Array.from({ length: 12 }, (_, i) => {
      return JSON.stringify({ prompt: `after ${i} comes `, completion: `${i + 1}` });
    });
    writeFileSync(trainingPath, `${lines.join('\n')}\n`);
    const told: FromTrainer[] = [];
    let now = 0;
    const spec = {
      ...{ modelPath: tinyPath, modelHash: base.hash, jobId: 'job', fence: 1, trainingPath },
      ...{
        heldOutPath: trainingPath,
        startFrom: null,
        compare: null,
        resumeFrom: null,
        backend: 'ggml' as const,
        threads: 1,
      },
    };
    const claim = join(folder, 'claim');
    mkdirSync(claim);
    const sizes = { population: 4, groupSize: 4, answerTokens: 4, sigma: 0.2 };
    const method = { kind: 'eggroll', ...sizes, reward: { kind: 'length', tokens: 3 } };
    const recipe = parseRecipe({ method, learningRate, stepsMax: 3, windowTokens: 48 }, 'recipe');
    await trainFile(
      { ...spec, folder: claim, cacheDirectory: folder, recipe },
      {
        tell: (message) => void told.push(message),
        breathe: async () => 'go',
        nowMs: () => {
          now += 1;
          return now;
        },
      },
    );
    expect(told.map(({ kind }) => kind)).toEqual([
      ...['started', 'progress', 'progress', 'progress', 'checkpoint', 'evaluation', 'result'],
    ]);
    const progress = told.find((message) => message.kind === 'progress')!;
    if (learningRate === 'sweep') expect(sweepRates).toContain(progress.learningRate);
    else expect(progress.learningRate).toBe(learningRate);
    const result = told.at(-1) as FromTrainer & { kind: 'result' };
    expect(result.losses.map(({ rank }) => rank)).toEqual([1, 2, 4]);
    const bytes = new Uint8Array(readFileSync(join(result.directory, 'adapter_model.safetensors')));
    const config = readFileSync(join(result.directory, 'rankgate.json'), 'utf8');
    const { manifest } = importPacked(config, bytes, {
      ...{ config: base.config, hash: base.hash, names: [] },
    });
    expect(manifest.kind).toBe('lora');
    rmSync(folder, { recursive: true });
  },
);

it('a refresh by scores goes on from a generation, by how near answers are to those that callers liked', async () => {
  const folder = mkdtempSync(join(tmpdir(), 'eggroll-'));
  const trainingPath = join(folder, 'training.jsonl');
  // A refresh's lines: each question's best answer, or its correction.
  const lines = Array.from({ length: 12 }, (_, i) => {
    return JSON.stringify({ prompt: `after ${i} comes `, completion: `${i + 1}` });
  });
  writeFileSync(trainingPath, `${lines.join('\n')}\n`);
  let claims = 0;
  const run = async (over: Pick<TrainerSpec, 'recipe' | 'startFrom' | 'compare'>) => {
    claims += 1;
    const claim = join(folder, `claim-${claims}`);
    mkdirSync(claim);
    const told: FromTrainer[] = [];
    await trainFile(
      {
        ...{ modelPath: tinyPath, modelHash: base.hash, jobId: 'job', fence: claims, trainingPath },
        ...{ heldOutPath: trainingPath, resumeFrom: null, folder: claim, cacheDirectory: folder },
        ...{ backend: 'ggml', threads: 1, ...over },
      },
      { tell: (message) => void told.push(message), breathe: async () => 'go', nowMs: () => 0 },
    );
    return told.at(-1) as FromTrainer & { kind: 'result' };
  };
  const shape = { kind: 'lora', rank: 4, windowTokens: 48 };
  const plain = parseRecipe({ ...shape, stepsMax: 4, learningRate: 1e-2 }, 'recipe');
  const first = await run({ recipe: plain, startFrom: null, compare: null });
  const reward = { kind: 'similarity', metric: 'fuzzy_match' };
  const method = { kind: 'eggroll', population: 8, groupSize: 4, answerTokens: 4, reward };
  const scored = parseRecipe({ ...shape, method, stepsMax: 3, learningRate: 0.05 }, 'recipe');
  const startFrom = join(first.directory, 'adapter_model.safetensors');
  const { comparison } = await run({ recipe: scored, startFrom, compare: { earlier: null } });
  const { before, after } = comparison!;
  expect(before.byRank.map(({ length }) => length)).toEqual([12, 12, 12]);
  expect(after.byRank).not.toEqual(before.byRank);
  // It began as what was served: this far it could not have come from the base.
  const mean = (losses: readonly number[]): number => losses.reduce((a, b) => a + b, 0) / 12;
  expect(mean(after.byRank.at(-1)!)).toBeLessThan(first.baseLoss! - 0.5);
  rmSync(folder, { recursive: true });
});
