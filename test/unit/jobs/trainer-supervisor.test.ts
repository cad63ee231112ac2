import { createHash } from 'node:crypto';
import { mkdirSync, mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { getPriority, tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import type { Generation } from '../../../src/adapters/adapter.ts';
import { onEvent } from '../../../src/channels.ts';
import { GatewayError } from '../../../src/errors.ts';
import type { Job } from '../../../src/jobs/job.ts';
import type { EnginePressure } from '../../../src/jobs/pace.ts';
import {
  TrainerSupervisor,
  type TrainerSupervisorOptions,
} from '../../../src/jobs/trainer-supervisor.ts';
import { entryExecArgv, entryUrl } from '../../../src/model/spawn-entry.ts';
import type { FakeTrainerOrders } from '../../support/fake-trainer.ts';
import { createTestStore, leaseMs, newJob, type TestStore } from '../../support/job-stores.ts';

// Real child processes (test/support/fake-trainer.ts) that die where they are told to, and a clock that tests move.

let directory: string;
let scratchDir: string;
let test: TestStore;
const open: TrainerSupervisor[] = [];
let imported: string[];
let promoted: Map<string, Generation>;
let failures: unknown[];

beforeEach(() => {
  directory = mkdtempSync(join(tmpdir(), 'rankgate-trainers-'));
  scratchDir = mkdtempSync(join(tmpdir(), 'rankgate-scratch-'));
  test = createTestStore();
  imported = [];
  promoted = new Map();
  failures = [];
});
afterEach(async () => {
  await Promise.all(open.splice(0).map((one) => close(one)));
  test.db.close();
  rmSync(directory, { recursive: true });
  rmSync(scratchDir, { recursive: true });
});

/** Time passes by itself while it is closed: nothing may hang on the clock that a test stopped. */
async function close(supervisor: TrainerSupervisor): Promise<void> {
  let isClosed = false;
  const closing = supervisor.close().finally(() => {
    isClosed = true;
  });
  await until(() => {
    test.clock.advance(100);
    return isClosed;
  }, 'closed');
  await closing;
}

function start(
  orders: FakeTrainerOrders,
  over: Partial<TrainerSupervisorOptions> = {},
): TrainerSupervisor {
  const supervisor = new TrainerSupervisor({
    entry: entryUrl(import.meta.url, '../../support/fake-trainer'),
    execArgv: entryExecArgv(import.meta.url),
    environment: {},
    nice: 0, // These tests may run beside others.
    after: (ms, callback) => test.clock.after(ms, callback),
    nowMs: () => test.clock.nowMs(),
    store: test.store,
    directory,
    trainersMax: 1,
    specOf: () => ({
      modelPath: '',
      modelHash: '',
      trainingPath: JSON.stringify({ scratchDir, ...orders }),
      heldOutPath: null,
      startFrom: null,
      compare: null,
      backend: 'ggml',
      threads: 1,
      cacheDirectory: '',
    }),
    importResult(from) {
      const chain = readFileSync(join(from, 'chain'), 'utf8');
      imported.push(chain);
      return Promise.resolve<Generation>(`sha256:${chain}`);
    },
    judge: () => null,
    promote({ request }, generation) {
      promoted.set(request.adapter, generation);
      return null;
    },
    pressure: () => calm,
    stopMsMax: 5000,
    onFailure: (error) => void failures.push(error),
    ...over,
  });
  open.push(supervisor);
  return supervisor;
}

async function until(condition: () => boolean, what: string): Promise<void> {
  const deadline = performance.now() + 50_000;
  while (!condition()) {
    if (performance.now() > deadline) throw new Error(`never came: ${what}`);
    await new Promise((resolve) => setTimeout(resolve, 2));
  }
}

const now = ({ id }: Job): Job => test.store.find(id, null)!;
const messages = (job: Job): string[] =>
  test.store.events(job, null, 1000).items.map(({ message }) => message);

/** Time passes only while nobody computes: the pauses before new attempts. */
async function ended(job: Job): Promise<Job> {
  await until(() => {
    if (open.every(({ pids }) => pids.length === 0)) test.clock.advance(100);
    return now(job).finishedS !== null;
  }, 'the end');
  return now(job);
}

const calm: EnginePressure = { answers: 0, isQuota: false, threads: 1, threadsMax: 1 };

/** By a signal, as /proc tells; never where there is none. */
function isStopped(pid: number): boolean {
  try {
    return / [Tt] /.test(readFileSync(`/proc/${pid}/stat`, 'utf8').replace(/.*\)/, ''));
  } catch {
    return false;
  }
}

/** Of its first thread. Infinity once it has ended. */
function cpuMsOf(pid: number): number {
  try {
    return Number(readFileSync(`/proc/${pid}/schedstat`, 'utf8').split(' ')[0]) / 1e6;
  } catch {
    return Number.POSITIVE_INFINITY;
  }
}

function chainAfter(steps: number): string {
  let chain = '';
  for (let step = 1; step <= steps; step++) {
    chain = createHash('sha256').update(`${chain}${step}`).digest('hex');
  }
  return chain;
}

describe('trainers', () => {
  it('make a job’s adapter, and leave nothing behind', async () => {
    const ends: unknown[] = [];
    const stopListening = onEvent('job-end', (end) => void ends.push(end));
    const supervisor = start({ steps: 5 });
    const job = test.store.create('', null, newJob());
    supervisor.wake();
    const generation = `sha256:${chainAfter(5)}`;
    expect(await ended(job)).toMatchObject({
      state: 'succeeded',
      progress: { step: 5, steps: 5, tokens: 50 },
      result: { generation, losses: [{ rank: 1, loss: 0.5 }], baseLoss: 1, aurac: 0.5 },
    });
    expect(promoted).toEqual(new Map([['ft.tiny.1', generation]]));
    expect(readdirSync(directory)).toEqual([]);
    expect(messages(job)).toContain('training has begun: 5 steps, 1 MB, on none');
    expect(messages(job)).toContain('step 5: held-out loss 0.5000 at rank 1');
    expect([ends, failures]).toEqual([[{ state: 'succeeded', code: null }], []]);
    stopListening();
  });

  it('run at their priority from the first moment, one at a time', () => {
    const supervisor = start({ steps: 5 }, { nice: 19 });
    const jobs = [test.store.create('', null, newJob()), test.store.create('', null, newJob())];
    supervisor.wake();
    supervisor.wake();
    expect(supervisor.pids).toHaveLength(1);
    const pid = supervisor.pids[0]!;
    expect(getPriority(pid)).toBe(19);
    if (process.platform === 'linux') {
      expect(readFileSync(`/proc/${pid}/oom_score_adj`, 'utf8')).toBe('1000\n');
    }
    expect(jobs.map((job) => now(job).state)).toEqual(['validating_files', 'queued']);
  });

  it('that are killed go on from the last checkpoint, to the same bytes', async () => {
    const supervisor = start({ steps: 7, dieAtStep: 5 });
    const job = test.store.create('', null, newJob());
    supervisor.wake();
    const { state, progress, attempts } = await ended(job);
    expect({ state, attempts }).toEqual({ state: 'succeeded', attempts: 0 });
    expect(progress).toMatchObject({ step: 7, tokens: 70 });
    expect(imported).toEqual([chainAfter(7)]);
    expect(messages(job)).toContain('the trainer ended (signal SIGKILL); attempt 2 of 3 follows');
  });

  it('that always die end their job after three attempts', async () => {
    const supervisor = start({ steps: 7, dieAtStep: 1, dieAlways: true });
    const job = test.store.create('', null, newJob());
    supervisor.wake();
    const { state, attempts, error } = await ended(job);
    expect({ state, attempts, code: error!.code }).toEqual({
      state: 'failed',
      attempts: 3,
      code: 'TRAINER_FAILED',
    });
    expect(readdirSync(directory)).toEqual([]);
  });

  it('that stop for longer than their lease lose their job, and what they do later counts for nothing', async () => {
    const supervisor = start({ steps: 7, dieAtStep: 3, signal: 'SIGSTOP' });
    const job = test.store.create('', null, newJob());
    supervisor.wake();
    await until(() => now(job).progress?.step === 2, 'its checkpoint');
    const [first] = supervisor.pids;
    await until(() => {
      test.clock.advance(leaseMs / 4);
      return supervisor.pids[0] !== first && supervisor.pids.length === 1;
    }, 'another trainer');
    expect(() => process.kill(first!, 0)).toThrow();
    expect(await ended(job)).toMatchObject({ state: 'succeeded' });
    expect(imported).toEqual([chainAfter(7)]);
  });

  it.runIf(process.platform === 'linux')(
    'that compute for longer than their lease keep their job, but not for more than a lease of CPU time',
    async () => {
      const supervisor = start({ steps: 4, computeAtStep: 3 });
      const job = test.store.create('', null, newJob());
      supervisor.wake();
      await until(() => now(job).progress?.step === 2, 'its checkpoint');
      const [pid] = supervisor.pids;
      const startMs = cpuMsOf(pid!);
      /** A quarter of the lease for 25 ms of its time. */
      const starve = async (): Promise<number> => {
        const beforeMs = cpuMsOf(pid!);
        await until(() => cpuMsOf(pid!) >= beforeMs + 25, 'CPU time');
        test.clock.advance(leaseMs / 4);
        return beforeMs - startMs;
      };
      for (let i = 0; i < 20; i++) await starve();
      expect(supervisor.pids).toEqual([pid]);
      expect(now(job).attempts).toBe(0);
      let spentMs = 0;
      while (now(job).attempts === 0) spentMs = await starve();
      expect(spentMs).toBeGreaterThan(leaseMs - 100);
      writeFileSync(join(scratchDir, 'go-on'), '');
      expect(await ended(job)).toMatchObject({ state: 'succeeded' });
      expect(imported).toEqual([chainAfter(4)]);
    },
  );

  it('whose failure is the job’s own end it at once', async () => {
    const supervisor = start({
      steps: 1,
      fail: { code: 'INVALID_REQUEST', message: 'training diverged', retry: false },
    });
    const job = test.store.create('', null, newJob());
    supervisor.wake();
    expect(await ended(job)).toMatchObject({
      state: 'failed',
      attempts: 0,
      error: { code: 'INVALID_REQUEST', message: 'training diverged' },
    });
  });

  it('whose failure may pass are tried again', async () => {
    const fail = { code: 'DISK_FULL', message: 'no room', retry: true } as const;
    const supervisor = start({ steps: 1, fail });
    const job = test.store.create('', null, newJob());
    supervisor.wake();
    expect(await ended(job)).toMatchObject({ state: 'failed', attempts: 3 });
    expect(now(job).error!.message).toContain('no room (disk_full)');
  });

  it('that cannot even start end their job, not the gateway', async () => {
    const supervisor = start({ steps: 1, exitCode: 3 });
    const job = test.store.create('', null, newJob());
    supervisor.wake();
    expect((await ended(job)).error!.message).toContain('exit code 3');
  });

  it('are killed when their job is cancelled, and the next job starts', async () => {
    const supervisor = start({ steps: 5, holdAtStep: 1 });
    const [one, two] = [
      test.store.create('', null, newJob()),
      test.store.create('', null, newJob()),
    ];
    supervisor.wake();
    await until(() => now(one).state === 'running', 'running');
    const [pid] = supervisor.pids;
    test.store.cancel(one);
    supervisor.wake();
    await until(() => now(two).state === 'running', 'the next');
    expect(() => process.kill(pid!, 0)).toThrow();
    expect(now(one).state).toBe('cancelled');
    expect(readdirSync(directory)).toEqual([two.id]);
  });

  it('write a checkpoint when the gateway closes, and the next gateway goes on from it', async () => {
    const first = start({ steps: 7, holdAtStep: 3 });
    const job = test.store.create('', null, newJob());
    first.wake();
    await until(() => now(job).progress?.step === 2, 'its checkpoint');
    await first.close();
    expect(now(job)).toMatchObject({ state: 'queued', attempts: 0 });
    start({ steps: 7 }, { store: test.reopen() });
    expect(await ended(job)).toMatchObject({ state: 'succeeded' });
    expect(imported).toEqual([chainAfter(7)]);
  });

  it('that do not close in time are killed, and their job is not blamed', async () => {
    const supervisor = start({ steps: 5, dieAtStep: 2, signal: 'SIGSTOP' });
    const job = test.store.create('', null, newJob());
    supervisor.wake();
    await until(() => now(job).progress?.step === 2, 'its checkpoint');
    await close(supervisor);
    expect(now(job)).toMatchObject({ state: 'queued', attempts: 0 });
  });

  it('of a job that is cancelled during the import give nothing a name', async () => {
    let finish = (_: Generation): void => {};
    const importResult = () =>
      new Promise<Generation>((resolve) => {
        finish = resolve;
      });
    let hasBegun = false;
    const supervisor = start(
      { steps: 2 },
      {
        importResult() {
          hasBegun = true;
          return importResult();
        },
      },
    );
    const job = test.store.create('', null, newJob());
    supervisor.wake();
    await until(() => hasBegun, 'the import');
    // However long it takes: the gateway itself holds the job.
    for (let i = 0; i < 20; i++) test.clock.advance(leaseMs / 4);
    expect(now(job).state).toBe('running');
    test.store.cancel(job);
    finish(`sha256:${'a'.repeat(64)}`);
    await until(() => readdirSync(directory).length === 0, 'the end');
    expect(promoted.size).toBe(0);
    expect(now(job).state).toBe('cancelled');
  });

  it('are not even started for a job that cannot be done any more', async () => {
    const specOf = (): never => {
      throw new GatewayError('ADAPTER_NOT_FOUND', 'the adapter that the job starts from is gone');
    };
    const supervisor = start({ steps: 1 }, { specOf });
    const job = test.store.create('', null, newJob());
    supervisor.wake();
    expect(supervisor.pids).toEqual([]);
    expect(now(job)).toMatchObject({ state: 'failed', error: { code: 'ADAPTER_NOT_FOUND' } });
  });

  it('make an adapter that is refused: the job says why', async () => {
    const supervisor = start(
      { steps: 2 },
      { importResult: () => Promise.reject(new GatewayError('INVALID_ADAPTER', 'not finite')) },
    );
    const job = test.store.create('', null, newJob());
    supervisor.wake();
    expect(await ended(job)).toMatchObject({
      state: 'failed',
      error: { code: 'INVALID_ADAPTER', message: 'not finite' },
    });
  });

  it('sweep what a crash left of jobs that are over, and keep what is needed', async () => {
    const job = test.store.create('', null, newJob());
    for (const name of [job.id, 'ftjob-unknown'])
      mkdirSync(join(directory, name, '1'), { recursive: true });
    start({ steps: 1 }, { trainersMax: 0 });
    await until(() => readdirSync(directory).length === 1, 'the sweep');
    expect(readdirSync(directory)).toEqual([job.id]);
  });

  it('remove what a job had only when its end survives a loss of power', async () => {
    let sync = (): void => {};
    const synced = new Promise<void>((resolve) => {
      sync = resolve;
    });
    test.store.durable = () => synced;
    const supervisor = start({ steps: 3 });
    const job = test.store.create('', null, newJob());
    supervisor.wake();
    await ended(job);
    await until(() => supervisor.pids.length === 0, 'its process gone');
    expect(readdirSync(directory)).toEqual([job.id]);
    sync();
    await until(() => readdirSync(directory).length === 0, 'its folder gone');
  });

  it('go on when the store cannot be written, and say so', async () => {
    const supervisor = start({ steps: 3, holdAtStep: 1 });
    const job = test.store.create('', null, newJob());
    supervisor.wake();
    await until(() => now(job).state === 'running', 'running');
    const { db } = test;
    const real = db.atomically.bind(db);
    db.atomically = () => {
      throw new GatewayError('DISK_FULL', 'the job store could not be written');
    };
    await until(() => {
      test.clock.advance(leaseMs);
      return failures.length > 0;
    }, 'a failure');
    db.atomically = real; // the disk has room again
    await until(() => {
      test.clock.advance(leaseMs);
      return now(job).attempts > 0;
    }, 'the job taken back');
  });

  it('are told how much they may compute as the engine’s load changes', async () => {
    let pressure: EnginePressure = { ...calm, answers: 1 };
    const orders = { steps: 2, holdAtStep: 1, echoPace: true };
    const supervisor = start(orders, { pressure: () => pressure });
    const job = test.store.create('', null, newJob());
    supervisor.wake();
    const [pid] = supervisor.pids;
    const shares = (): string[] =>
      messages(job).flatMap((message) => /held-out loss (\S+) at/.exec(message)?.[1] ?? []);
    /** A trainer that is held hears it in its turn. */
    const heard = (count: number): Promise<void> =>
      until(() => {
        if (isStopped(pid!)) test.clock.advance(20);
        return shares().length === count;
      }, `share ${count}`);
    await heard(1);
    pressure = { ...pressure, threads: 0 };
    test.clock.advance(20);
    await heard(2);
    pressure = calm;
    test.clock.advance(20);
    await heard(3);
    expect(shares().reverse()).toEqual(['1.0000', '0.0000', '1.0000']);
  });

  describe.runIf(process.platform === 'linux')('that answers leave nothing', () => {
    let isFull: boolean;
    let supervisor: TrainerSupervisor;
    let job: Job;
    let pid: number;
    beforeEach(async () => {
      isFull = false;
      const pressure = (): EnginePressure => ({ ...calm, answers: 1, isQuota: isFull });
      supervisor = start({ steps: 5, computeAtStep: 3, holdAtStep: 4 }, { pressure });
      job = test.store.create('', null, newJob());
      supervisor.wake();
      [pid] = supervisor.pids as [number];
      await until(() => now(job).progress?.step === 2, 'its checkpoint');
      isFull = true;
      test.clock.advance(20);
      await until(() => isStopped(pid), 'held');
    });

    it('are held where they are, go on in their turns, and then for good', async () => {
      let turns = 0;
      for (let look = 0; look < 150; look++) {
        test.clock.advance(20);
        const usedMs = cpuMsOf(pid);
        await until(() => isStopped(pid) || cpuMsOf(pid) > usedMs + 15, 'held or computing');
        if (!isStopped(pid)) turns += 1;
      }
      expect(turns).toBe(3);
      expect(now(job).attempts).toBe(0);
      isFull = false;
      for (let look = 0; look < 60; look++) {
        test.clock.advance(20);
        const usedMs = cpuMsOf(pid);
        await until(() => cpuMsOf(pid) > usedMs + 1, 'computing');
      }
      expect(supervisor.pids).toEqual([pid]);
    });

    it('are gone when their job is cancelled', async () => {
      test.store.cancel(job);
      supervisor.wake();
      await until(() => supervisor.pids.length === 0, 'its end');
      expect(() => process.kill(pid, 0)).toThrow();
    });

    it('write a checkpoint when the gateway closes', async () => {
      writeFileSync(join(scratchDir, 'go-on'), '');
      await supervisor.close();
      expect(now(job)).toMatchObject({ state: 'queued', attempts: 0, progress: { step: 4 } });
    });
  });
});
