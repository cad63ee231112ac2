// Rows of the job store ↔ jobs, events and checkpoints as the rest of the program has them.

import type { Job, JobCheckpoint, JobEvent, JobProgress, JobRequest, JobState } from './job.ts';
import { noSuchAfter } from './numbered-pages.ts';

export interface JobRow {
  readonly number: number;
  readonly id: string;
  readonly owner: string;
  readonly state: JobState;
  readonly request: string;
  readonly progress: string | null;
  readonly result: string | null;
  readonly error: string | null;
  readonly training_file: string;
  readonly validation_file: string | null;
  readonly created_s: number;
  readonly finished_s: number | null;
  readonly fence: number;
  readonly attempts: number;
}

export interface EventRow {
  readonly number: number;
  readonly created_s: number;
  readonly level: JobEvent['level'];
  readonly message: string;
  readonly metrics: string | null;
}

export interface CheckpointRow {
  readonly step: number;
  readonly created_s: number;
  readonly path: string;
  readonly progress: string;
}

const idStart = 'ftjob-';

export const jobId = (unique: string): string => `${idStart}${unique}`;

const itemId = (kind: 'ftevent' | 'ftckpt', job: string, number: number): string =>
  `${kind}-${job.slice(idStart.length)}-${number}`;

/** The number in an item's id; above all numbers when there is no item. Throws INVALID_REQUEST for another job's. */
export function numberBelow(job: string, after: string | null): number {
  if (after === null) return Number.MAX_SAFE_INTEGER;
  const [, unique, number] = /^ft(?:event|ckpt)-(.+)-(\d{1,15})$/.exec(after) ?? [];
  if (unique === undefined || jobId(unique) !== job) throw noSuchAfter();
  return Number(number);
}

export function eventOf(job: string, row: EventRow): JobEvent {
  const { number, created_s: createdS, level, message, metrics } = row;
  return { id: itemId('ftevent', job, number), createdS, level, message, metrics: parse(metrics) };
}

export function checkpointOf(job: string, row: CheckpointRow): JobCheckpoint {
  const { step, created_s: createdS, path, progress } = row;
  return { id: itemId('ftckpt', job, step), createdS, path, progress: parse(progress)! };
}

export const progressOf = (row: JobRow): JobProgress | null => parse(row.progress);

export function jobOf(row: JobRow): Job {
  return {
    id: row.id,
    owner: row.owner,
    state: row.state,
    request: parse<JobRequest>(row.request)!,
    trainingFile: row.training_file,
    validationFile: row.validation_file,
    createdS: row.created_s,
    finishedS: row.finished_s,
    attempts: row.attempts,
    progress: progressOf(row),
    result: parse(row.result),
    error: parse(row.error),
  };
}

/** What this folder wrote. */
function parse<T>(json: string | null): T | null {
  return json === null ? null : (JSON.parse(json) as T);
}
