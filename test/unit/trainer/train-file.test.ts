import { mkdirSync, mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { aurac } from '../../../src/adapters/aurac.ts';
import { generationOf, openPacked } from '../../../src/adapters/pack.ts';
import { importPacked } from '../../../src/adapters/packed-import.ts';
import type { FromTrainer, TrainerSpec } from '../../../src/jobs/messages.ts';
import { sha256OfFile } from '../../../src/model/file-hash.ts';
import { directionsIn } from '../../../src/trainer/continual.ts';
import { readBases } from '../../../src/trainer/coso-file.ts';
import { sweepRates } from '../../../src/trainer/sweep.ts';
import { type TrainHooks, trainFile } from '../../../src/trainer/train-file.ts';
import { tinyPath } from '../../support/open-test-decoder.ts';
import { tinyBase } from '../../support/tiny-base.ts';
import { tinyRecipe } from '../../support/training-base.ts';

let root: string;
let modelHash: string;
let trainingPath: string;
beforeAll(async () => {
  root = mkdtempSync(join(tmpdir(), 'train-file-'));
  modelHash = await sha256OfFile(tinyPath);
  trainingPath = join(root, 'training.jsonl');
  const words = 'one two three four five'.split(' ');
  const lines = Array.from({ length: 60 }, (_, i) => {
    const [asked, answer] = [words[i % 5], words[(i + 1) % 5]];
    const messages = [
      { role: 'user', content: `after ${asked} ${i}` },
      { role: 'assistant', content: `${answer}` },
    ];
    return JSON.stringify({ messages });
  });
  writeFileSync(trainingPath, `${lines.join('\n')}\n`);
});
afterAll(() => rmSync(root, { recursive: true }));

let folders = 0;
function specOf(more: Partial<TrainerSpec> = {}): TrainerSpec {
  folders += 1;
  const folder = join(root, `claim-${folders}`);
  mkdirSync(folder);
  return {
    ...{ modelPath: tinyPath, modelHash, jobId: 'job', fence: folders, trainingPath, folder },
    ...{ heldOutPath: null, startFrom: null, compare: null, resumeFrom: null, threads: 1 },
    backend: 'ggml',
    cacheDirectory: root,
    recipe: tinyRecipe({ stepsMax: 12, checkpointEvery: 5, evaluateEvery: 8, learningRate: 1e-2 }),
    ...more,
  };
}

/** Told messages; `breaths`: after so many it is told to stop. */
async function run(
  spec: TrainerSpec,
  breaths: number = Infinity,
  onBreath: () => void = () => {},
): Promise<FromTrainer[]> {
  const told: FromTrainer[] = [];
  let left = breaths;
  let now = 0;
  const hooks: TrainHooks = {
    tell: (message) => void told.push(message),
    breathe: async () => {
      left -= 1;
      onBreath();
      return left < 0 ? 'stop' : 'go';
    },
    nowMs: () => {
      now += 5;
      return now;
    },
  };
  await trainFile(spec, hooks);
  return told;
}

type Kind = FromTrainer['kind'];
function only<K extends Kind>(
  told: readonly FromTrainer[],
  kind: K,
): (FromTrainer & { kind: K })[] {
  return told.filter((message): message is FromTrainer & { kind: K } => message.kind === kind);
}
const adapterBytes = (directory: string): Buffer =>
  readFileSync(join(directory, 'adapter_model.safetensors'));

describe('a training file and a recipe', () => {
  it('become an adapter, told step by step', async () => {
    const told = await run(specOf());
    expect(told[0]).toMatchObject({ kind: 'started', steps: 12 });
    const progress = only(told, 'progress');
    expect(progress.map(({ step }) => step)).toEqual(Array.from({ length: 12 }, (_, i) => i + 1));
    for (const { ms, tokens, loss, steps } of progress) {
      expect(ms).toBe(5);
      expect(tokens).toBeGreaterThan(20);
      expect(loss).toBeGreaterThan(0);
      expect(steps).toBe(12);
    }
    expect(only(told, 'checkpoint').map(({ step }) => step)).toEqual([5, 10, 12]);
    expect(only(told, 'evaluation').map(({ step }) => step)).toEqual([8, 12]);
    const result = only(told, 'result')[0]!;
    expect(told.at(-1)).toBe(result);
    expect(result.losses.map(({ rank }) => rank)).toEqual([1, 2, 4]);
    expect(result.losses.at(-1)!.loss).toBeLessThan(result.baseLoss!);
    const gains = result.losses.map(({ loss }) => result.baseLoss! - loss);
    expect(result.aurac).toBe(aurac([1, 2, 4], gains).v1);
    const config = readFileSync(join(result.directory, 'rankgate.json'), 'utf8');
    const bytes = new Uint8Array(adapterBytes(result.directory));
    const { manifest } = importPacked(config, bytes, { ...tinyBase, hash: modelHash });
    expect(manifest).toMatchObject({ kind: 'matryoshka', rankMax: 4, baseHash: modelHash });
  });

  it('with coso leave beside the adapter what the next run keeps, stopped anywhere or not', async () => {
    const continual = { kind: 'coso', gap: 3, sketch: 8 };
    const recipe = tinyRecipe({
      ...{ kind: 'lora', rank: 4, stepsMax: 9, checkpointEvery: 4, learningRate: 1e-2 },
      continual,
    });
    const bytesIn = (directory: string): Buffer[] =>
      readdirSync(directory)
        .sort()
        .map((name) => readFileSync(join(directory, name)));
    const told = await run(specOf({ recipe }));
    expect(told[0]).toMatchObject({ kind: 'started', kept: 0 });
    const { directory } = only(told, 'result')[0]!;
    expect(readdirSync(directory).sort()).toEqual([
      ...['adapter_model.coso.safetensors', 'adapter_model.safetensors', 'rankgate.json'],
    ]);
    for (const breaths of [3, 11, 18, 21]) {
      const first = await run(specOf({ recipe }), breaths);
      expect(first.at(-1)).toEqual({ kind: 'stopped' });
      const last = only(first, 'checkpoint').at(-1);
      const second = await run(specOf({ recipe, resumeFrom: last?.path ?? null }));
      expect(bytesIn(only(second, 'result')[0]!.directory)).toEqual(bytesIn(directory));
    }
    const startFrom = join(directory, 'adapter_model.safetensors');
    const more = tinyRecipe({ kind: 'lora', rank: 8, stepsMax: 6, continual });
    const next = await run(specOf({ recipe: more, startFrom }));
    const { kept } = next[0] as { kept: number };
    expect(kept).toBeGreaterThan(14); // at least one of each module
    const after = only(next, 'result')[0]!.directory;
    const bases = readBases(readFileSync(join(after, 'adapter_model.coso.safetensors')));
    expect(directionsIn(bases)).toBeGreaterThan(kept);
    // Nothing of it is lost in silence.
    rmSync(join(directory, 'adapter_model.coso.safetensors'));
    await expect(run(specOf({ recipe: more, startFrom }))).rejects.toMatchObject({
      code: 'INVALID_ADAPTER',
      message: expect.stringContaining('must not forget is not beside the adapter'),
    });
    const plain = tinyRecipe({ kind: 'lora', rank: 8, stepsMax: 2 });
    expect((await run(specOf({ recipe: plain, startFrom })))[0]).toMatchObject({ kept: null });
  });

  it('with squeeze cont begin from the ranks of an adapter that are worth most', async () => {
    const first = only(await run(specOf()), 'result')[0]!;
    const startFrom = join(first.directory, 'adapter_model.safetensors');
    const recipe = tinyRecipe({ kind: 'lora', rank: 2, stepsMax: 1, learningRate: 1e-6 });
    await expect(run(specOf({ recipe, startFrom }))).rejects.toThrow('it has 4 ranks');
    const cont = { ...recipe, squeeze: { kind: 'cont' } as const };
    const { losses, directory } = only(
      await run(specOf({ recipe: cont, startFrom })),
      'result',
    )[0]!;
    // As the adapter at two ranks: a step that small changes nothing.
    expect(losses.at(-1)!.loss).toBeCloseTo(first.losses[1]!.loss, 3);
    const bytes = new Uint8Array(adapterBytes(directory));
    const { manifest } = openPacked(bytes, generationOf(bytes));
    const from = generationOf(new Uint8Array(readFileSync(startFrom)));
    expect(manifest).toMatchObject({ rankMax: 2, source: { from: [from] } });
    await expect(run(specOf({ recipe: cont }))).rejects.toMatchObject({
      ...{ code: 'INVALID_REQUEST', param: 'squeeze.kind' },
    });
  });

  it('choose modules before the run, and can be stopped there', async () => {
    const modules = { kind: 'diffora', keepRatio: 0.5, searchShare: 0.5 };
    const recipe = tinyRecipe({ kind: 'lora', stepsMax: 4, learningRate: 1e-2, modules });
    const { directory } = only(await run(specOf({ recipe })), 'result')[0]!;
    const config = readFileSync(join(directory, 'rankgate.json'), 'utf8');
    const bytes = new Uint8Array(adapterBytes(directory));
    const { manifest } = importPacked(config, bytes, { ...tinyBase, hash: modelHash });
    expect(manifest.modules.length).toBe(7);
    expect(await run(specOf({ recipe }), 3)).toEqual([{ kind: 'stopped' }]);
  });

  it('stopped anywhere and gone on with, the adapter is the same to the byte', async () => {
    const whole = only(await run(specOf()), 'result')[0]!;
    for (const breaths of [0, 1, 7, 22, 26]) {
      const first = await run(specOf(), breaths);
      expect(first.at(-1)).toEqual({ kind: 'stopped' });
      const last = only(first, 'checkpoint').at(-1);
      const second = await run(specOf({ resumeFrom: last?.path ?? null }));
      const [next] = only(second, 'progress');
      expect(next?.step).toBe(last?.step === 12 ? undefined : (last?.step ?? 0) + 1);
      const result = only(second, 'result')[0]!;
      expect(adapterBytes(result.directory)).toEqual(adapterBytes(whole.directory));
      expect({ ...result, directory: '' }).toEqual({ ...whole, directory: '' });
    }
  });

  it('of queryable are no refresh: what it compares are pairs', async () => {
    const recipe = tinyRecipe({ kind: 'queryable', rank: 8 });
    const spec = specOf({ recipe, startFrom: join(root, 'none'), compare: { earlier: null } });
    await expect(run(spec)).rejects.toMatchObject({ code: 'UNSUPPORTED', param: 'kind' });
  });

  it('with a validation file are measured on that file', async () => {
    const heldOutPath = join(root, 'validation.jsonl');
    writeFileSync(heldOutPath, '{"prompt":"one","completion":" two three"}\n');
    const result = only(await run(specOf({ heldOutPath })), 'result')[0]!;
    const own = only(await run(specOf()), 'result')[0]!;
    expect(result.baseLoss).not.toBeCloseTo(own.baseLoss!, 3);
  });

  it('go on from a generation', async () => {
    const first = only(await run(specOf()), 'result')[0]!;
    const startFrom = join(first.directory, 'adapter_model.safetensors');
    const second = only(await run(specOf({ startFrom })), 'result')[0]!;
    expect(second.baseLoss).toBe(first.baseLoss);
    expect(second.losses.at(-1)!.loss).toBeLessThan(first.losses.at(-1)!.loss);
  });

  it('as a refresh are compared with what they go on from, without what fits no window', async () => {
    const { directory } = only(await run(specOf()), 'result')[0]!;
    const startFrom = join(directory, 'adapter_model.safetensors');
    const heldOutPath = join(root, 'refresh.jsonl');
    const long = JSON.stringify({ prompt: 'word '.repeat(200), completion: ' end' });
    const short = ['one', 'two'].map((prompt) => JSON.stringify({ prompt, completion: ' three' }));
    writeFileSync(heldOutPath, [long, ...short].join('\n'));
    const spec = { startFrom, heldOutPath };
    await expect(run(specOf(spec))).rejects.toMatchObject({ code: 'INVALID_FILE' });
    const compare = { earlier: startFrom };
    const { comparison } = only(await run(specOf({ ...spec, compare })), 'result')[0]!;
    expect(comparison).toMatchObject({ ranks: [1, 2, 4] });
    const { before, after, earlier } = comparison!;
    expect(earlier).toEqual(before.byRank.at(-1));
    expect(before.byRank.map(({ length }) => length)).toEqual([2, 2, 2]);
    expect(after.byRank).not.toEqual(before.byRank);
    expect(only(await run(specOf()), 'result')[0]!.comparison).toBeNull();
  });

  it('name the lines that cannot be learnt', async () => {
    const path = join(root, 'bad.jsonl');
    writeFileSync(path, `{"prompt":"a","completion":"b"}\n{}\n${'x\n'.repeat(200)}`);
    await expect(run(specOf({ trainingPath: path }))).rejects.toMatchObject({
      code: 'INVALID_FILE',
      message: expect.stringMatching(
        /^training file: 201 lines cannot be learnt: line 2: messages: .*; line 3: not JSON; line 4: not JSON$/,
      ),
    });
  });

  it('with a sweep choose the rate first, and a crash later does not choose again', async () => {
    const recipe = { ...specOf().recipe, learningRate: 'sweep' as const };
    const whole = await run(specOf({ recipe }));
    const rates = new Set(only(whole, 'progress').map((message) => message.learningRate));
    expect(sweepRates).toContain(Math.max(...rates));
    expect(only(whole, 'progress').map(({ step }) => step)[0]).toBe(1);
    const early = await run(specOf({ recipe }), 5);
    expect(early.slice(1)).toEqual([{ kind: 'stopped' }]);
    const breaths: number[] = [];
    await run(specOf({ recipe }), Infinity, () => void breaths.push(1));
    const late = await run(specOf({ recipe }), breaths.length - 12);
    const { path } = only(late, 'checkpoint').at(-1)!;
    const result = only(await run(specOf({ recipe, resumeFrom: path })), 'result')[0]!;
    expect(adapterBytes(result.directory)).toEqual(
      adapterBytes(only(whole, 'result')[0]!.directory),
    );
  });

  it('are refused for another model file, recipe or checkpoint', async () => {
    await expect(run(specOf({ modelHash: '0'.repeat(64) }))).rejects.toMatchObject({
      code: 'BASE_MISMATCH',
    });
    const recipe = { ...specOf().recipe, seed: 7 };
    const told = await run(specOf(), 3);
    const { path } = only(told, 'checkpoint')[0]!;
    await expect(run(specOf({ recipe, resumeFrom: path }))).rejects.toMatchObject({
      code: 'INVALID_REQUEST',
      message: expect.stringContaining('another recipe, base or file'),
    });
  });
});
