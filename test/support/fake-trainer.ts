// A real trainer process that computes a chain of hashes instead of gradients, with deaths on order: what it makes depends on
// every step, so a resume that lost or repeated one would show. Its orders are JSON in place of the training file's path.

import { createHash } from 'node:crypto';
import { existsSync, mkdirSync, readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import type { FromTrainer, ToTrainer, TrainerSpec } from '../../src/jobs/messages.ts';

export interface FakeTrainerOrders {
  readonly steps: number;
  readonly checkpointEvery?: number;
  /** Once, after the message of this step; a file in `scratchDir` remembers it. */
  readonly dieAtStep?: number;
  readonly dieAlways?: boolean;
  readonly signal?: NodeJS.Signals;
  readonly scratchDir?: string;
  /** Waits here for `stop`. */
  readonly holdAtStep?: number;
  readonly fail?: Omit<Extract<FromTrainer, { kind: 'failed' }>, 'kind'>;
  readonly exitCode?: number;
  /** Computes here without a word until the file `go-on` is in `scratchDir`. */
  readonly computeAtStep?: number;
  /** Tells each share that it is given, as a loss. */
  readonly echoPace?: boolean;
}

const spec = JSON.parse(process.argv[2]!) as TrainerSpec;
const orders = JSON.parse(spec.trainingPath) as FakeTrainerOrders;
const { steps, checkpointEvery = 2 } = orders;

const tell = (message: FromTrainer): Promise<void> =>
  new Promise((resolve) => {
    process.send!(message, undefined, undefined, () => resolve());
  });

const from = spec.resumeFrom === null ? null : JSON.parse(readFileSync(spec.resumeFrom, 'utf8'));
let { step, chain } = (from ?? { step: 0, chain: '' }) as { step: number; chain: string };

let isStopped = false;
let onStop = (): void => {};
process.on('message', (message: ToTrainer) => {
  if (message.kind === 'pace' && orders.echoPace === true) {
    void tell({ kind: 'evaluation', step, losses: [{ rank: 1, loss: message.share }] });
  }
  if (message.kind !== 'stop') return;
  isStopped = true;
  onStop();
});
process.once('disconnect', () => process.exit(0));

function nextOf(chain: string, step: number): string {
  return createHash('sha256').update(`${chain}${step}`).digest('hex');
}

async function saveCheckpoint(): Promise<void> {
  const path = join(spec.folder, `step-${step}`);
  writeFileSync(path, JSON.stringify({ step, chain }));
  await tell({ kind: 'checkpoint', step, path });
}

function dieOnce(): void {
  const { scratchDir, dieAlways = false, signal = 'SIGKILL' } = orders;
  const marker = join(scratchDir!, 'died');
  if (!dieAlways && existsSync(marker)) return;
  writeFileSync(marker, '');
  process.kill(process.pid, signal);
  for (let i = 0; i < 3; i++) existsSync(marker); // a stop takes effect at the next system call at the latest
}

async function train(): Promise<void> {
  await tell({ kind: 'started', steps, memory: { base: 1_000_000 }, kernels: 'none', kept: null });
  while (step < steps) {
    step += 1;
    chain = nextOf(chain, step);
    await tell({
      kind: 'progress',
      step,
      steps,
      loss: 1 / step,
      learningRate: 1,
      tokens: 10,
      ms: 1,
    });
    if (step === orders.holdAtStep && !isStopped) {
      await new Promise<void>((resolve) => {
        onStop = resolve;
      });
    }
    if (step === orders.computeAtStep) {
      while (!existsSync(join(orders.scratchDir!, 'go-on')));
    }
    if (isStopped) {
      await saveCheckpoint();
      await tell({ kind: 'stopped' });
      return;
    }
    if (step % checkpointEvery === 0) await saveCheckpoint();
    if (step === orders.dieAtStep) dieOnce();
  }
  const directory = join(spec.folder, 'adapter');
  mkdirSync(directory);
  writeFileSync(join(directory, 'chain'), chain);
  await tell({ kind: 'evaluation', step, losses: [{ rank: 1, loss: 0.5 }] });
  const losses = [{ rank: 1, loss: 0.5 }];
  const result = { directory, losses, baseLoss: 1, aurac: 0.5, comparison: null };
  await tell({ kind: 'result', ...result });
}

if (orders.exitCode !== undefined) process.exit(orders.exitCode);
if (orders.fail === undefined) await train();
else await tell({ kind: 'failed', ...orders.fail });
process.exit(0);
