// Fine-tuning jobs in SQLite. Who works on a job holds a claim: its number (the fence) grows with each, and a write under an
// older one changes nothing. A job is validating_files or running only under a lease; one that runs out puts it back in the
// queue, and three deaths in a row without a new checkpoint end it. Leases are on this process's monotonic clock: the
// database is locked, so at the start every lease is a dead process's.

import type { OwnDatabase } from '../database.ts';
import { GatewayError } from '../errors.ts';
import type {
  Job,
  JobCheckpoint,
  JobError,
  JobEvent,
  JobProgress,
  JobRequest,
  JobResult,
  JobState,
  Page,
  PageWish,
  Viewer,
} from './job.ts';
import {
  type CheckpointRow,
  checkpointOf,
  type EventRow,
  eventOf,
  type JobRow,
  jobId,
  jobOf,
  numberBelow,
  progressOf,
} from './job-rows.ts';
import { cutPage, readPage } from './numbered-pages.ts';

export interface JobStoreOptions {
  readonly db: OwnDatabase;
  /** Monotonic. */
  readonly nowMs: () => number;
  readonly unixS: () => number;
  /** Unguessable and unique, of [A-Za-z0-9-]. */
  readonly newId: () => string;
  /** How long a claim holds after its last sign of life. */
  readonly leaseMs: number;
}

/** One worker's right to a job, until another claim. */
export interface Claim {
  readonly jobId: string;
  readonly fence: number;
}

export interface Claimed extends Claim {
  readonly job: Job;
  /** The newest checkpoint's, to go on from; below the folder of all jobs. */
  readonly checkpointPath: string | null;
}

export interface NewJob {
  readonly request: JobRequest;
  readonly trainingFile: string;
  readonly validationFile: string | null;
}

export const attemptsMax = 3;
export const eventsMax = 1000;
export const checkpointsMax = 100;
/** Of one owner: jobs that have not ended, and all that are remembered. Guesses. */
export const openJobsMax = 16;
export const jobsMax = 500;
/** Before the second and the third attempt: what ended the last (a full disk, no memory) may be over. Guess. */
const retryMs = [0, 2000, 30_000];

const leased = "state IN ('validating_files', 'running')";
const ended = "state IN ('succeeded', 'failed', 'cancelled')";
const isLeased = (state: JobState): boolean => state === 'validating_files' || state === 'running';

export class JobStore {
  readonly #options: JobStoreOptions;
  readonly #db: OwnDatabase;

  constructor(options: JobStoreOptions) {
    this.#options = options;
    this.#db = options.db;
    this.#db.atomically(() => {
      for (const row of this.#all(`SELECT * FROM jobs WHERE ${leased}`)) {
        this.#requeue(row, 'the gateway ended');
      }
      this.#db.sql('UPDATE jobs SET ready_ms = 0').run();
    });
  }

  get leaseMs(): number {
    return this.#options.leaseMs;
  }

  /** Resolves when every change made so far survives a loss of power. */
  durable(): Promise<void> {
    return this.#db.durable();
  }

  /** Throws FILE_NOT_FOUND for a file that `viewer` does not see, QUOTA_EXCEEDED. */
  create(owner: string, viewer: Viewer, wanted: NewJob): Job {
    const { request, trainingFile, validationFile } = wanted;
    return this.#db.atomically(() => {
      this.#expectFile(trainingFile, viewer, 'training_file');
      if (validationFile !== null) this.#expectFile(validationFile, viewer, 'validation_file');
      this.#makeRoom(owner);
      const id = jobId(this.#options.newId());
      const files = [trainingFile, validationFile];
      const values = [id, owner, JSON.stringify(request), ...files, this.#options.unixS()];
      this.#db.sql(insertJob).run(...values);
      const row = this.#row(id)!;
      this.#tell(row, 'info', `the job waits for a trainer; its model will be ${request.adapter}`);
      return jobOf(row);
    });
  }

  /** null when there is none that `viewer` sees. */
  find(id: string, viewer: Viewer): Job | null {
    const row = this.#row(id);
    return row === undefined || (viewer !== null && row.owner !== viewer) ? null : jobOf(row);
  }

  list(viewer: Viewer, wish: PageWish): Page<Job> {
    const { items, hasMore } = readPage<JobRow>(this.#db, 'jobs', viewer, wish);
    return { items: items.map(jobOf), hasMore };
  }

  /** The newest first. */
  events({ id }: Job, after: string | null, limit: number): Page<JobEvent> {
    const rows = this.#below('events', 'number', { id, after, limit }) as EventRow[];
    return cutPage(
      rows.map((row) => eventOf(id, row)),
      limit,
    );
  }

  /** The newest first. */
  checkpoints({ id }: Job, after: string | null, limit: number): Page<JobCheckpoint> {
    const rows = this.#below('checkpoints', 'step', { id, after, limit }) as CheckpointRow[];
    return cutPage(
      rows.map((row) => checkpointOf(id, row)),
      limit,
    );
  }

  /** How many jobs there are in each state that has any. */
  counts(): ReadonlyMap<JobState, number> {
    const rows = this.#db.sql('SELECT state, count(*) AS count FROM jobs GROUP BY state').all();
    return new Map((rows as { state: JobState; count: number }[]).map((r) => [r.state, r.count]));
  }

  /** Whoever works on it finds its claim void. Throws INVALID_REQUEST when the job has ended otherwise. */
  cancel({ id }: Job): Job {
    return this.#db.atomically(() => {
      const row = this.#row(id)!;
      if (row.state === 'succeeded' || row.state === 'failed') {
        throw new GatewayError('INVALID_REQUEST', `the job has ${row.state} already`);
      }
      if (row.state !== 'cancelled') this.#end(row, 'cancelled', 'the job was cancelled');
      return jobOf(this.#row(id)!);
    });
  }

  /** The next job, which is the caller's from now on; null when none is ready. Owners take turns. */
  claim(): Claimed | null {
    return this.#db.atomically(() => {
      const nowMs = this.#options.nowMs();
      const [row] = this.#all(nextJob, nowMs);
      if (row === undefined) return null;
      const fence = row.fence + 1;
      this.#db.sql(takeJob).run(fence, nowMs + this.#options.leaseMs, row.number);
      this.#tell(row, 'info', 'a trainer has begun: it reads the files');
      const checkpointPath = this.#newestCheckpoint(row)?.path ?? null;
      return { jobId: row.id, fence, job: jobOf(this.#row(row.id)!), checkpointPath };
    });
  }

  /** Whether the claim is still the job's. */
  isHeld(claim: Claim): boolean {
    return this.#heldRow(claim) !== null;
  }

  // Every write of a trainer: true when it counted, false, with nothing changed, when the claim is void.

  renew(claim: Claim): boolean {
    return this.#write(claim, () => {});
  }

  start(claim: Claim, steps: number, message: string): boolean {
    return this.#write(claim, (row) => {
      const fresh = { step: 0, loss: null, learningRate: null, tokens: 0 };
      const progress = JSON.stringify({ ...(progressOf(row) ?? fresh), steps });
      this.#set(row, "state = 'running', progress = ?", progress);
      this.#tell(row, 'info', message);
    });
  }

  progress(claim: Claim, progress: JobProgress): boolean {
    return this.#write(claim, (row) => {
      this.#set(row, 'progress = ?', JSON.stringify(progress));
      const { step, steps, loss, learningRate, tokens } = progress;
      const metrics = { step, steps, train_loss: loss, learning_rate: learningRate, tokens };
      this.#tell(row, 'info', `step ${step} of ${steps}: loss ${loss?.toFixed(4)}`, metrics);
    });
  }

  tell(claim: Claim, message: string, metrics: JobEvent['metrics']): boolean {
    return this.#write(claim, (row) => this.#tell(row, 'info', message, metrics));
  }

  /** The job goes on from here after a crash. One that is further than all before makes its attempts count anew. */
  checkpoint(claim: Claim, path: string, progress: JobProgress): boolean {
    return this.#write(claim, (row) => {
      const json = JSON.stringify(progress);
      const isFurther = progress.step > (this.#newestCheckpoint(row)?.step ?? -1);
      const values = [row.number, progress.step, this.#options.unixS(), path, json];
      this.#db.sql('INSERT OR REPLACE INTO checkpoints VALUES (?, ?, ?, ?, ?)').run(...values);
      this.#db.sql(dropOldCheckpoints).run(row.number, row.number, checkpointsMax);
      this.#set(row, 'attempts = ?, progress = ?', isFurther ? 0 : row.attempts, json);
      this.#tell(row, 'info', `checkpoint at step ${progress.step}`);
    });
  }

  succeed(claim: Claim, result: JobResult): boolean {
    return this.#write(claim, (row) => {
      this.#set(row, 'result = ?', JSON.stringify(result));
      const { adapter } = jobOf(row).request;
      const end = result.generation === null ? 'keeps what it had' : 'can be asked for';
      this.#end(row, 'succeeded', `the model ${adapter} ${end}`);
    });
  }

  fail(claim: Claim, error: JobError): boolean {
    return this.#write(claim, (row) => this.#fail(row, error));
  }

  /** The worker died: back into the queue, or the end when it was the last attempt. */
  crash(claim: Claim, why: string): boolean {
    return this.#write(claim, (row) => this.#requeue(row, why));
  }

  /** The worker gives the job back unharmed. */
  release(claim: Claim): boolean {
    return this.#write(claim, (row) => {
      this.#queue(row, row.attempts);
      this.#tell(row, 'info', 'the gateway closes: the job goes on when it is there again');
    });
  }

  /** Takes back what gave no sign of life in time. */
  expire(): void {
    const { nowMs, leaseMs } = this.#options;
    const late = `SELECT * FROM jobs WHERE ${leased} AND lease_until_ms < ?`;
    this.#db.atomically(() => {
      for (const row of this.#all(late, nowMs())) {
        this.#requeue(row, `the trainer gave no sign of life for ${leaseMs} ms`);
      }
    });
  }

  #heldRow({ jobId: id, fence }: Claim): JobRow | null {
    const row = this.#row(id);
    return row !== undefined && row.fence === fence && isLeased(row.state) ? row : null;
  }

  #write(claim: Claim, work: (row: JobRow) => void): boolean {
    return this.#db.atomically(() => {
      const row = this.#heldRow(claim);
      if (row === null) return false;
      this.#set(row, 'lease_until_ms = ?', this.#options.nowMs() + this.#options.leaseMs);
      work(row);
      return true;
    });
  }

  #requeue(row: JobRow, why: string): void {
    const attempts = row.attempts + 1;
    this.#queue(row, attempts);
    if (attempts < attemptsMax) {
      this.#tell(row, 'warn', `${why}; attempt ${attempts + 1} of ${attemptsMax} follows`);
    } else {
      const message = `${why}: the last of ${attemptsMax} attempts without a new checkpoint`;
      this.#fail(row, { code: 'TRAINER_FAILED', message });
    }
  }

  #queue(row: JobRow, attempts: number): void {
    const progress = this.#newestCheckpoint(row)?.progress ?? null;
    const readyMs = this.#options.nowMs() + (retryMs[attempts] ?? 0);
    const change = 'lease_until_ms = NULL, attempts = ?, ready_ms = ?, progress = ?';
    this.#set(row, `state = 'queued', ${change}`, attempts, readyMs, progress);
  }

  #fail(row: JobRow, error: JobError): void {
    this.#set(row, 'error = ?', JSON.stringify(error));
    this.#end(row, 'failed', error.message);
  }

  #end(row: JobRow, state: JobState, message: string): void {
    const change = 'state = ?, lease_until_ms = NULL, finished_s = ?';
    this.#set(row, change, state, this.#options.unixS());
    this.#tell(row, state === 'failed' ? 'error' : 'info', message);
  }

  #set({ number }: JobRow, change: string, ...values: unknown[]): void {
    this.#db.sql(`UPDATE jobs SET ${change} WHERE number = ?`).run(...values, number);
  }

  #tell(
    { number }: JobRow,
    level: JobEvent['level'],
    message: string,
    metrics: JobEvent['metrics'] = null,
  ): void {
    const json = metrics === null ? null : JSON.stringify(metrics);
    const values = [this.#options.unixS(), level, message.slice(0, 1000), json];
    this.#db.sql(insertEvent).run(number, ...values, number);
    this.#db.sql(dropOldEvents).run(number, number, eventsMax);
  }

  #row(id: string): JobRow | undefined {
    return this.#db.sql('SELECT * FROM jobs WHERE id = ?').get(id) as JobRow | undefined;
  }

  #all(sql: string, ...values: unknown[]): JobRow[] {
    return this.#db.sql(sql).all(...values) as JobRow[];
  }

  /** One more than `limit`, the newest first. */
  #below(
    table: 'events' | 'checkpoints',
    number: 'number' | 'step',
    { id, after, limit }: { id: string; after: string | null; limit: number },
  ): unknown[] {
    const where = `job = ? AND ${number} < ? ORDER BY ${number} DESC LIMIT ?`;
    const select = this.#db.sql(`SELECT * FROM ${table} WHERE ${where}`);
    return select.all(this.#row(id)!.number, numberBelow(id, after), limit + 1);
  }

  #newestCheckpoint({ number }: JobRow): CheckpointRow | undefined {
    const sql = 'SELECT * FROM checkpoints WHERE job = ? ORDER BY step DESC LIMIT 1';
    return this.#db.sql(sql).get(number) as CheckpointRow | undefined;
  }

  #expectFile(id: string, viewer: Viewer, param: string): void {
    const sql = 'SELECT 1 FROM files WHERE id = ? AND (? IS NULL OR owner = ?)';
    if (this.#db.sql(sql).get(id, viewer, viewer) !== undefined) return;
    throw new GatewayError('FILE_NOT_FOUND', `${param}: there is no such file`, { param });
  }

  /** The oldest jobs that have ended are forgotten. */
  #makeRoom(owner: string): void {
    const count = (where: string): number => {
      const sql = `SELECT count(*) AS count FROM jobs WHERE owner = ? AND ${where}`;
      return (this.#db.sql(sql).get(owner) as { count: number }).count;
    };
    if (count(`NOT ${ended}`) >= openJobsMax) {
      const message = `${openJobsMax} jobs wait or run: the most at a time`;
      throw new GatewayError('QUOTA_EXCEEDED', message);
    }
    const tooMany = count('1') - jobsMax + 1;
    if (tooMany > 0) this.#db.sql(forgetJobs).run(owner, tooMany);
  }
}

const insertJob = `
  INSERT INTO jobs (id, owner, state, request, training_file, validation_file, created_s)
  VALUES (?, ?, 'queued', ?, ?, ?, ?)`;

/** Whose owner was served longest ago; among those the oldest. */
const nextJob = `
  SELECT * FROM jobs WHERE state = 'queued' AND ready_ms <= ?
  ORDER BY (SELECT max(turn) FROM jobs AS others WHERE others.owner = jobs.owner), number LIMIT 1`;

const takeJob = `
  UPDATE jobs SET state = 'validating_files', fence = ?, lease_until_ms = ?,
    turn = (SELECT max(turn) + 1 FROM jobs) WHERE number = ?`;

const insertEvent = `
  INSERT INTO events
  SELECT ?, coalesce(max(number), 0) + 1, ?, ?, ?, ? FROM events WHERE job = ?`;

const dropOldEvents =
  'DELETE FROM events WHERE job = ? AND number <= (SELECT max(number) FROM events WHERE job = ?) - ?';

const dropOldCheckpoints = `
  DELETE FROM checkpoints WHERE job = ? AND step NOT IN
  (SELECT step FROM checkpoints WHERE job = ? ORDER BY step DESC LIMIT ?)`;

const forgetJobs = `
  DELETE FROM jobs WHERE number IN
  (SELECT number FROM jobs WHERE owner = ? AND ${ended} ORDER BY number LIMIT ?)`;
