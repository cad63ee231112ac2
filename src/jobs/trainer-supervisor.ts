// Jobs → trainer processes, a few at a time: claims, spawns, hears, renews, kills, and publishes what they make. A trainer
// counts for nothing but its messages: each is written under its claim, and one whose claim is void is killed. Failures of a
// job, of its process and of the disk stay the job's: nothing here throws into the gateway.

import { mkdirSync, readdirSync, rmSync } from 'node:fs';
import { join, relative } from 'node:path';
import type { Generation } from '../adapters/adapter.ts';
import { publish } from '../channels.ts';
import { asGatewayError } from '../errors.ts';
import type { Job, JobError, JobProgress, JobResult } from './job.ts';
import type { Claim, Claimed, JobStore } from './job-store.ts';
import {
  type FromTrainer,
  passingCodes,
  type TrainerSpec,
  type TrainingResult,
} from './messages.ts';
import { type EnginePressure, paceOf } from './pace.ts';
import type { Verdict } from './refresh-gate.ts';
import { TrainerChild, type TrainerChildOptions } from './trainer-child.ts';

export interface TrainerSupervisorOptions extends TrainerChildOptions {
  readonly store: JobStore;
  /** Of all jobs, exists; nothing else lies in it. */
  readonly directory: string;
  readonly trainersMax: number;
  /** Monotonic. */
  readonly nowMs: () => number;
  /** What a trainer is told besides what the claim says. Throws when the job cannot be done any more. */
  readonly specOf: (
    job: Job,
  ) => Pick<
    TrainerSpec,
    | ('modelPath' | 'modelHash' | 'backend' | 'threads' | 'cacheDirectory')
    | ('trainingPath' | 'heldOutPath' | 'startFrom' | 'compare')
  >;
  /** Stores the packed adapter of a directory. */
  readonly importResult: (directory: string) => Promise<Generation>;
  /** Whether a refresh may take effect; null: the job is none. */
  readonly judge: (job: Job, result: TrainingResult) => Verdict | null;
  /** Points a job's name at it, or says why not. Again is as once: the gateway may die before the job has succeeded. */
  readonly promote: (job: Job, generation: Generation) => string | null;
  readonly pressure: () => EnginePressure;
  /** How long `close` waits for last checkpoints. */
  readonly stopMsMax: number;
  /** What no job is to blame for: a store that cannot be written, say. */
  readonly onFailure: (error: unknown) => void;
}

interface Run {
  readonly claim: Claimed;
  readonly folder: string;
  /** null once it has ended, while its result is published. */
  child: TrainerChild | null;
  progress: JobProgress;
  /** Of the last write that a message caused. */
  writtenMs: number;
  outcome: Extract<FromTrainer, { kind: 'result' | 'failed' | 'stopped' }> | null;
  hasSwept: boolean;
}

const tickMs = 1000;
/** From one look at the engine to the next, and how many it takes until a trainer that is held may go on for one: the least
 *  that the pacer of the trainer itself leaves it too. */
const lookMs = 20;
const looksPerTurn = 50;

export class TrainerSupervisor {
  readonly #options: TrainerSupervisorOptions;
  readonly #runs: Map<string, Run> = new Map();
  #cancelTick: () => void = () => {};
  /** null: nobody looks, there is no trainer. */
  #cancelLook: (() => void) | null = null;
  #looks = 0;
  #share = 1;
  #isClosing = false;
  #onIdle: () => void = () => {};

  constructor(options: TrainerSupervisorOptions) {
    this.#options = options;
    this.#sweepJobs();
    this.#tick();
    this.wake();
  }

  /** Process ids of the trainers; for tests. */
  get pids(): readonly number[] {
    return [...this.#runs.values()].flatMap(({ child }) => child?.pid ?? []);
  }

  /** A job was created or cancelled: starts what may start, ends what has lost its claim. */
  wake(): void {
    this.#safely(() => {
      const { store, trainersMax } = this.#options;
      for (const { claim, child } of this.#runs.values()) {
        if (!store.isHeld(claim)) child?.kill();
      }
      while (!this.#isClosing && this.#runs.size < trainersMax) {
        const claimed = store.claim();
        if (claimed === null) break;
        this.#start(claimed);
      }
    });
  }

  /** Lets every trainer write a checkpoint, for a while, and gives its job back. */
  async close(): Promise<void> {
    this.#isClosing = true;
    this.#cancelTick();
    this.#cancelLook?.();
    if (this.#runs.size === 0) return;
    const idle = new Promise<void>((resolve) => {
      this.#onIdle = resolve;
    });
    for (const { child } of this.#runs.values()) {
      child?.hold(false);
      child?.send({ kind: 'stop' });
    }
    const cancel = this.#options.after(this.#options.stopMsMax, () => {
      for (const run of this.#runs.values()) {
        if (run.child !== null) run.child.kill();
        else this.#end(run, () => this.#options.store.release(run.claim)); // The importer ends its own work.
      }
    });
    await idle;
    cancel();
  }

  #tick(): void {
    this.#cancelTick = this.#options.after(tickMs, () => {
      this.#tick();
      this.#safely(() => {
        for (const run of this.#runs.values()) this.#renewSilent(run);
        this.#options.store.expire();
      });
      this.wake();
    });
  }

  /** Nobody else gives signs of life of a result that is being published, and of a piece of computing that takes long. */
  #renewSilent(run: Run): void {
    const { store } = this.#options;
    if (!this.#isDue(run, this.#renewMs)) return;
    if (run.child === null || run.child.hasComputed(store.leaseMs)) store.renew(run.claim);
  }

  #look(): void {
    const isLast = this.#runs.size === 0;
    this.#cancelLook = isLast ? null : this.#options.after(lookMs, () => this.#look());
    const share = paceOf(this.#options.pressure());
    this.#looks += 1;
    const isHeld = share === 0 && this.#looks % looksPerTurn !== 0;
    for (const { child } of this.#runs.values()) {
      if (share !== this.#share) child?.send({ kind: 'pace', share });
      child?.hold(isHeld);
    }
    this.#share = share;
  }

  #start(claim: Claimed): void {
    const { directory, specOf, nowMs } = this.#options;
    const { jobId, fence, job, checkpointPath } = claim;
    const folder = join(directory, jobId, String(fence));
    let given: ReturnType<typeof specOf>;
    try {
      mkdirSync(folder, { recursive: true });
      given = specOf(job);
    } catch (thrown) {
      const error = asGatewayError(thrown);
      this.#fail(claim, error, passingCodes.includes(error.code));
      return;
    }
    const fresh = { step: 0, steps: 0, loss: null, learningRate: null, tokens: 0 };
    const run: Run = {
      claim,
      folder,
      child: null,
      progress: job.progress ?? fresh,
      writtenMs: nowMs(),
      outcome: null,
      hasSwept: false,
    };
    const resumeFrom = checkpointPath === null ? null : join(directory, checkpointPath);
    const own = { jobId, fence, recipe: job.request.recipe, resumeFrom, folder };
    run.child = new TrainerChild(
      this.#options,
      { ...given, ...own },
      {
        onMessage: (message) => this.#hear(run, message),
        onEnd: (why) => void this.#settle(run, why),
      },
    );
    this.#runs.set(jobId, run);
    run.child.send({ kind: 'pace', share: this.#share });
    if (this.#cancelLook === null) this.#look();
  }

  #hear(run: Run, message: FromTrainer): void {
    let isHeld = false;
    this.#safely(() => {
      isHeld = this.#write(run, message);
    });
    if (!isHeld) run.child?.kill();
  }

  /** False when the claim is void. What comes often is written seldom. */
  #write(run: Run, message: FromTrainer): boolean {
    const { store, directory } = this.#options;
    const { claim } = run;
    switch (message.kind) {
      case 'alive':
        return !this.#isDue(run, this.#renewMs) || store.renew(claim);
      case 'started':
        run.progress = { ...run.progress, steps: message.steps };
        return store.start(claim, message.steps, startMessage(message));
      case 'progress': {
        const { step, steps, loss, learningRate } = message;
        const tokens = run.progress.tokens + message.tokens;
        run.progress = { step, steps, loss, learningRate, tokens };
        const isWanted = this.#isDue(run, tickMs) || step === steps;
        return !isWanted || store.progress(claim, run.progress);
      }
      case 'evaluation': {
        const { step, losses } = message;
        const shown = losses.map(({ rank, loss }) => `${loss.toFixed(4)} at rank ${rank}`);
        const text = `step ${step}: held-out loss ${shown.join(', ') || 'unknown'}`;
        return store.tell(claim, text, { step, valid_losses: losses });
      }
      case 'checkpoint': {
        const isKept = store.checkpoint(claim, relative(directory, message.path), {
          ...run.progress,
          step: message.step,
        });
        if (isKept) this.#sweepClaims(run);
        return isKept;
      }
      case 'result':
      case 'failed':
      case 'stopped':
        run.outcome = message;
        return store.renew(claim);
    }
  }

  /** The process has ended. */
  async #settle(run: Run, why: string): Promise<void> {
    const { claim, outcome } = run;
    const { store } = this.#options;
    run.child = null;
    if (outcome?.kind === 'result') return this.#publish(run, outcome);
    this.#end(run, () => {
      if (outcome?.kind === 'failed') this.#fail(claim, outcome, outcome.retry);
      else if (this.#isClosing || outcome?.kind === 'stopped') store.release(claim);
      else store.crash(claim, `the trainer ended (${why})`);
    });
  }

  async #publish(run: Run, result: TrainingResult): Promise<void> {
    const { store, importResult, judge, promote } = this.#options;
    const { claim } = run;
    const { job } = claim;
    const { directory, losses, baseLoss, aurac } = result;
    try {
      const verdict = store.isHeld(claim) ? judge(job, result) : null;
      const about = { losses, baseLoss, aurac, ...(verdict === null ? {} : { verdict }) };
      if (verdict !== null && !verdict.isPromoted) this.#discard(claim, about, verdict.reasons);
      else {
        const generation = await importResult(directory);
        // Cancelled meanwhile, it gets no name. Nothing comes between the three.
        if (store.isHeld(claim)) {
          const why = promote(job, generation);
          if (why === null) store.succeed(claim, { generation, ...about });
          else this.#discard(claim, about, [why]);
        }
      }
      this.#end(run, () => {});
    } catch (thrown) {
      const error = asGatewayError(thrown);
      this.#end(run, () => {
        if (this.#isClosing) store.release(claim);
        else this.#fail(claim, error, passingCodes.includes(error.code));
      });
    }
  }

  #discard(claim: Claim, about: Omit<JobResult, 'generation'>, reasons: readonly string[]): void {
    const { store } = this.#options;
    store.tell(claim, `discarded: ${reasons.join('; ')}`, null);
    store.succeed(claim, { generation: null, ...about });
  }

  #fail(claim: Claim, { code, message }: JobError, retry: boolean): void {
    const { store } = this.#options;
    if (retry) store.crash(claim, `${message} (${code.toLowerCase()})`);
    else store.fail(claim, { code, message });
  }

  #end(run: Run, work: () => void): void {
    const { jobId } = run.claim;
    if (this.#runs.get(jobId) !== run) return; // given back by close() already
    this.#safely(work);
    this.#runs.delete(jobId);
    this.#safely(() => this.#forget(jobId));
    if (this.#runs.size === 0) this.#onIdle();
    this.wake();
  }

  /** What lies of a job that has ended. */
  #forget(jobId: string): void {
    const job = this.#options.store.find(jobId, null);
    if (job?.finishedS === null) return;
    this.#remove([join(this.#options.directory, jobId)]);
    if (job !== null) publish('job-end', { state: job.state, code: job.error?.code ?? null });
  }

  /** Folders of earlier claims, once this one has a checkpoint of its own. */
  #sweepClaims(run: Run): void {
    if (run.hasSwept) return;
    run.hasSwept = true;
    const all = join(run.folder, '..');
    const older = readdirSync(all).filter((name) => Number(name) < run.claim.fence);
    this.#remove(older.map((name) => join(all, name)));
  }

  /** What a crash left of jobs that have ended. */
  #sweepJobs(): void {
    const { directory, store } = this.#options;
    const left = readdirSync(directory).filter(
      (name) => store.find(name, null)?.finishedS !== null,
    );
    this.#remove(left.map((name) => join(directory, name)));
  }

  /** Once the store's reason for it survives a loss of power: what it names is there. */
  #remove(folders: readonly string[]): void {
    const gone = this.#options.store.durable().then(() => {
      for (const folder of folders) rmSync(folder, { recursive: true, force: true });
    });
    gone.catch((error: unknown) => this.#options.onFailure(error));
  }

  get #renewMs(): number {
    return this.#options.store.leaseMs / 4;
  }

  #isDue(run: Run, everyMs: number): boolean {
    const nowMs = this.#options.nowMs();
    if (nowMs - run.writtenMs < everyMs) return false;
    run.writtenMs = nowMs;
    return true;
  }

  /** A store that cannot be written now (a full disk) is written later: leases run out, and the job is taken up again. */
  #safely(work: () => void): void {
    try {
      work();
    } catch (error) {
      this.#options.onFailure(error);
    }
  }
}

function startMessage(message: Extract<FromTrainer, { kind: 'started' }>): string {
  const { steps, memory, kernels, kept } = message;
  const bytes = Object.values(memory).reduce((sum, part) => sum + part, 0);
  const keeps = kept === null ? '' : `, ${kept} directions of older data are kept`;
  return `training has begun: ${steps} steps, ${(bytes / 1e6).toFixed(0)} MB, on ${kernels}${keeps}`;
}
