// What a fine-tuning job is, as the store keeps it and the API shows it, and the tables of both: jobs, their events and
// checkpoints, and the files that they learn from.

import type { Generation } from '../adapters/adapter.ts';
import { type OwnDatabase, openDatabase } from '../database.ts';
import type { ErrorCode } from '../errors.ts';
import type { RankLoss } from './messages.ts';
import type { Recipe } from './recipe.ts';
import type { Verdict } from './refresh-gate.ts';

/** OpenAI's. `validating_files` and `running` are under a lease, the last three are for ever. */
export type JobState =
  | 'queued'
  | 'validating_files'
  | 'running'
  | 'succeeded'
  | 'failed'
  | 'cancelled';

export interface JobRequest {
  /** As the caller put it: the base, or an adapter. */
  readonly model: string;
  /** What training goes on from; null: the base alone. */
  readonly startFrom: Generation | null;
  readonly suffix: string | null;
  readonly recipe: Recipe;
  /** What the result will be called. */
  readonly adapter: string;
  /** OpenAI's, as the caller put it, where the recipe's reward is made from one. */
  readonly grader?: unknown;
  /** The result is to take the place of `startFrom`, if it is better. */
  readonly refresh?: RefreshRequest;
}

export interface RefreshRequest {
  /** What `startFrom` took the place of, while it is on probation. */
  readonly earlier: Generation | null;
  /** The last so many held-out lines came since the last refresh. */
  readonly freshHeldOut: number;
}

export interface JobProgress {
  readonly step: number;
  readonly steps: number;
  readonly loss: number | null;
  readonly learningRate: number | null;
  /** Trained so far, repetitions after a crash not counted. */
  readonly tokens: number;
}

export interface JobResult {
  /** null: a refresh that was discarded. */
  readonly generation: Generation | null;
  readonly losses: readonly RankLoss[];
  readonly baseLoss: number | null;
  readonly aurac: number | null;
  /** Of a refresh. */
  readonly verdict?: Verdict;
}

export interface JobError {
  readonly code: ErrorCode;
  readonly message: string;
}

export interface Job {
  readonly id: string;
  /** A tenant's namespace, or '' for the operator. */
  readonly owner: string;
  readonly state: JobState;
  readonly request: JobRequest;
  readonly trainingFile: string;
  readonly validationFile: string | null;
  readonly createdS: number;
  readonly finishedS: number | null;
  /** Deaths in a row without a new checkpoint. */
  readonly attempts: number;
  readonly progress: JobProgress | null;
  readonly result: JobResult | null;
  readonly error: JobError | null;
}

export interface JobEvent {
  readonly id: string;
  readonly createdS: number;
  readonly level: 'info' | 'warn' | 'error';
  readonly message: string;
  /** null for a mere message. */
  readonly metrics: Readonly<Record<string, unknown>> | null;
}

export interface JobCheckpoint {
  readonly id: string;
  readonly createdS: number;
  /** Below the folder of all jobs. */
  readonly path: string;
  readonly progress: JobProgress;
}

export interface TrainingFile {
  readonly id: string;
  readonly owner: string;
  /** A label that its sender chose. */
  readonly filename: string;
  readonly bytes: number;
  readonly examples: number;
  readonly sha256: string;
  readonly createdS: number;
}

/** Whose rows are seen: a tenant's own, or all of them (null). */
export type Viewer = string | null;

export interface PageWish {
  /** The last item of the page before. */
  readonly after: string | null;
  readonly limit: number;
  readonly order: 'asc' | 'desc';
}

export interface Page<T> {
  readonly items: readonly T[];
  readonly hasMore: boolean;
}

const tables = `
  CREATE TABLE files (
    number INTEGER PRIMARY KEY AUTOINCREMENT, -- the larger, the later
    id TEXT NOT NULL UNIQUE,
    owner TEXT NOT NULL,
    filename TEXT NOT NULL,
    bytes INTEGER NOT NULL,
    examples INTEGER NOT NULL,
    sha256 TEXT NOT NULL,
    created_s INTEGER NOT NULL
  ) STRICT;
  CREATE INDEX files_by_owner ON files (owner, number);
  CREATE TABLE jobs (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    owner TEXT NOT NULL,
    state TEXT NOT NULL,
    request TEXT NOT NULL, -- JSON, as the next four
    progress TEXT,
    result TEXT,
    error TEXT,
    training_file TEXT NOT NULL, -- may be gone once the job has ended
    validation_file TEXT,
    created_s INTEGER NOT NULL,
    finished_s INTEGER,
    fence INTEGER NOT NULL DEFAULT 0, -- how often it was claimed
    turn INTEGER NOT NULL DEFAULT 0, -- the number of its last claim among all jobs' claims
    lease_until_ms REAL, -- of the clock of the process that holds the database; as the next
    ready_ms REAL NOT NULL DEFAULT 0,
    attempts INTEGER NOT NULL DEFAULT 0
  ) STRICT;
  CREATE INDEX jobs_by_owner ON jobs (owner, number);
  CREATE INDEX jobs_by_state ON jobs (state, number);
  CREATE TABLE events (
    job INTEGER NOT NULL REFERENCES jobs (number) ON DELETE CASCADE,
    number INTEGER NOT NULL,
    created_s INTEGER NOT NULL,
    level TEXT NOT NULL,
    message TEXT NOT NULL,
    metrics TEXT,
    PRIMARY KEY (job, number)
  ) STRICT, WITHOUT ROWID;
  CREATE TABLE checkpoints (
    job INTEGER NOT NULL REFERENCES jobs (number) ON DELETE CASCADE,
    step INTEGER NOT NULL,
    created_s INTEGER NOT NULL,
    path TEXT NOT NULL,
    progress TEXT NOT NULL,
    PRIMARY KEY (job, step)
  ) STRICT, WITHOUT ROWID;
`;

/** A thousand jobs of a thousand events of 300 bytes; beyond, DISK_FULL. */
const bytesMax = 2 ** 30;

/** Throws as `openDatabase` does. */
export function openJobsDatabase(path: string): OwnDatabase {
  const schema = { what: 'job store', version: 1, tables };
  return openDatabase({ path, bytesMax, schema });
}
