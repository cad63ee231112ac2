import { createHash } from 'node:crypto';
import {
  existsSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  rmSync,
  writeFileSync,
} from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import type { FromTrainer, TrainerSpec } from '../../../src/jobs/messages.ts';
import { parseRecipe } from '../../../src/jobs/recipe.ts';
import { TrainerChild } from '../../../src/jobs/trainer-child.ts';
import { entryExecArgv, entryUrl } from '../../../src/model/spawn-entry.ts';
import { tensorflowDirectory, whyNoTensorflow } from '../../support/tensorflow.ts';

// The real entry in a real process over the tiny model: how it answers to its channel.

const modelPath = join(import.meta.dirname, '../../golden/tiny/tiny-f32.gguf');
let root: string;
let child: TrainerChild;
let heard: FromTrainer[];
let ended: Promise<string>;
beforeEach(() => {
  root = mkdtempSync(join(tmpdir(), 'rankgate-trainer-'));
  mkdirSync(join(root, 'job'));
  heard = [];
});
afterEach(async () => {
  child.kill();
  await ended;
  rmSync(root, { recursive: true });
});

const small = { rank: 4, windowTokens: 64, batchWindows: 1, accumulation: 1, epochs: 20 };

const withTensorflow = {
  NODE_PATH: join(tensorflowDirectory, 'node_modules'),
  TF_CPP_MIN_LOG_LEVEL: '2',
  TF_NUM_INTRAOP_THREADS: '1',
};

function start(
  text: string,
  over: Partial<TrainerSpec> = {},
  environment: Readonly<Record<string, string>> = {},
  nice = 0,
): void {
  const trainingPath = join(root, 'file.jsonl');
  writeFileSync(trainingPath, text);
  const recipe = parseRecipe({ ...small, checkpointEvery: 1000 }, 'recipe');
  const spec: TrainerSpec = {
    modelPath,
    modelHash: createHash('sha256').update(readFileSync(modelPath)).digest('hex'),
    jobId: 'ftjob-1',
    fence: 1,
    recipe,
    trainingPath,
    heldOutPath: null,
    startFrom: null,
    compare: null,
    resumeFrom: null,
    folder: join(root, 'job'),
    backend: 'ggml',
    threads: 1,
    cacheDirectory: join(root, 'cache'),
    ...over,
  };
  const options = {
    entry: entryUrl(import.meta.url, '../../../src/trainer/trainer-process'),
    execArgv: entryExecArgv(import.meta.url),
    environment,
    nice,
    after(ms: number, callback: () => void) {
      const timer = setTimeout(callback, ms);
      return () => clearTimeout(timer);
    },
  };
  ended = new Promise((resolve) => {
    child = new TrainerChild(options, spec, {
      onMessage: (message) => void heard.push(message),
      onEnd: resolve,
    });
  });
}

const of = <K extends FromTrainer['kind']>(kind: K): Extract<FromTrainer, { kind: K }>[] =>
  heard.filter((message): message is Extract<FromTrainer, { kind: K }> => message.kind === kind);
const lines = Array.from({ length: 8 }, (_, i) => `{"prompt":"say ${i}","completion":"two"}`);

describe('a trainer process', () => {
  // What it always may (pacer.ts) begins long after this: loading the model took CPU time.
  it('computes only while it may, gives signs of life meanwhile, and ends with its result', async () => {
    start(lines.join('\n'));
    child.send({ kind: 'pace', share: 0 });
    await expect.poll(() => of('started').length, { timeout: 50_000 }).toBe(1);
    const alive = of('alive').length;
    await expect.poll(() => of('alive').length, { timeout: 50_000 }).toBe(alive + 2);
    expect(of('progress')).toEqual([]);
    child.send({ kind: 'pace', share: 1 });
    expect(await ended).toBe('exit code 0');
    const { steps } = of('started')[0]!;
    expect(of('progress').map(({ step }) => step)).toEqual(
      Array.from({ length: steps }, (_, i) => i + 1),
    );
    const [result] = of('result');
    expect(existsSync(join(result!.directory, 'adapter_model.safetensors'))).toBe(true);
    expect(heard.findLast(({ kind }) => kind !== 'alive')).toBe(result);
  }, 120_000);

  it('leaves a checkpoint when it is told to stop, however long it would have rested', async () => {
    start(lines.join('\n'));
    child.send({ kind: 'pace', share: 0.3 });
    await expect.poll(() => of('progress').length, { timeout: 50_000 }).toBeGreaterThan(1);
    child.send({ kind: 'pace', share: 0 });
    child.send({ kind: 'stop' });
    expect(await ended).toBe('exit code 0');
    const [checkpoint] = of('checkpoint');
    expect(checkpoint!.step).toBe(of('progress').at(-1)!.step);
    expect(existsSync(checkpoint!.path)).toBe(true);
    expect(of('stopped')).toHaveLength(1);
    expect(of('result')).toEqual([]);
  }, 60_000);

  it.runIf(process.platform === 'linux')(
    'at the last priority has only what nobody else wants, in all its threads',
    async () => {
      start(lines.join('\n'), {}, {}, 19);
      await expect.poll(() => of('progress').length, { timeout: 50_000 }).toBeGreaterThan(1);
      // proc_pid_stat(5): the policy is the 41st field, the 39th behind the command. 5 is SCHED_IDLE.
      const policies = readdirSync(`/proc/${child.pid}/task`).map(
        (thread) =>
          readFileSync(`/proc/${child.pid}/task/${thread}/stat`, 'utf8')
            .split(') ')
            .at(-1)!
            .split(' ')[38],
      );
      expect(policies.length).toBeGreaterThan(4);
      expect(new Set(policies)).toEqual(new Set(['5']));
    },
    60_000,
  );

  it('says what is wrong with a job, and that another attempt would not help', async () => {
    start(`${lines[0]}\n{"prompt":"${'long '.repeat(100)}","completion":"cut off"}`);
    expect(await ended).toBe('exit code 0');
    expect(of('failed')).toMatchObject([{ code: 'INVALID_FILE', retry: false }]);
    expect(of('failed')[0]!.message).toContain('line 2');
  }, 60_000);

  it('refuses a model file that is another one by now', async () => {
    start(lines.join('\n'), { modelHash: '0'.repeat(64) });
    await ended;
    expect(of('failed')).toMatchObject([{ code: 'BASE_MISMATCH', retry: false }]);
  }, 60_000);

  it('says what to install where TensorFlow.js is not there', async () => {
    start(lines.join('\n'), { backend: 'tfjs' });
    await ended;
    expect(of('failed')).toMatchObject([{ code: 'UNSUPPORTED', retry: false }]);
    expect(of('failed')[0]!.message).toContain('Install one of them');
  }, 60_000);

  const missing = whyNoTensorflow('@tensorflow/tfjs-node');
  const title = 'learns on TensorFlow.js what it learns on ggml';
  if (missing !== null) it.skip(`${title} (skipped: ${missing})`, () => undefined);
  else
    it(title, async () => {
      const recipe = parseRecipe({ ...small, stepsMax: 10, learningRate: 1e-2 }, 'recipe');
      const run = async (over: Partial<TrainerSpec>): Promise<typeof heard> => {
        heard = [];
        const folder = join(root, over.backend!);
        mkdirSync(folder);
        start(lines.join('\n'), { ...over, recipe, folder }, withTensorflow);
        expect(await ended).toBe('exit code 0');
        return heard;
      };
      const wanted = await run({ backend: 'ggml' });
      const got = await run({ backend: 'tfjs' });
      expect(wanted.find(({ kind }) => kind === 'started')).toMatchObject({
        kernels: expect.stringMatching(/^ggml /),
      });
      expect(of('started')).toMatchObject([
        { kernels: expect.stringMatching(/^@tensorflow\/tfjs-node/) },
      ]);
      const lossesOf = (told: typeof heard): number[] =>
        told.flatMap((message) => {
          if (message.kind === 'progress') return [message.loss];
          return message.kind === 'result' ? message.losses.map(({ loss }) => loss) : [];
        });
      const [losses, theirs] = [lossesOf(wanted), lossesOf(got)];
      expect(theirs).toHaveLength(10 + 3);
      theirs.forEach((loss, i) => {
        expect(Math.abs(loss / losses[i]! - 1), `${i}`).toBeLessThan(1e-4);
      });
      expect(losses[9]).toBeLessThan(0.9 * losses[0]!);
    }, 120_000);
});
