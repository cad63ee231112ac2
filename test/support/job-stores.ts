import type { OwnDatabase } from '../../src/database.ts';
import { type JobProgress, openJobsDatabase } from '../../src/jobs/job.ts';
import { JobStore, type NewJob } from '../../src/jobs/job-store.ts';
import { parseRecipe } from '../../src/jobs/recipe.ts';
import { createManualClock, type ManualClock } from './manual-clock.ts';

export const leaseMs = 1000;

export interface TestStore {
  readonly db: OwnDatabase;
  readonly store: JobStore;
  readonly clock: ManualClock;
  /** The store as the next process finds it. */
  reopen(): JobStore;
}

/** In memory, with a file `file-1` of the operator's and `file-acme` of a tenant's. */
export function createTestStore(): TestStore {
  const db = openJobsDatabase(':memory:');
  const clock = createManualClock();
  let ids = 0;
  const options = {
    db,
    leaseMs,
    nowMs: () => clock.nowMs(),
    unixS: () => Math.floor(clock.unixMs() / 1000),
    newId: () => `id${++ids}`,
  };
  const insert = db.sql(
    "INSERT INTO files (id, owner, filename, bytes, examples, sha256, created_s) VALUES (?, ?, 'f', 1, 1, 'x', 0)",
  );
  insert.run('file-1', '');
  insert.run('file-acme', 'acme');
  return { db, clock, store: new JobStore(options), reopen: () => new JobStore(options) };
}

export function newJob(trainingFile: string = 'file-1'): NewJob {
  const recipe = parseRecipe({}, 'recipe');
  const request = { model: 'tiny', startFrom: null, suffix: null, recipe, adapter: 'ft.tiny.1' };
  return { request, trainingFile, validationFile: null };
}

export function progressAt(step: number): JobProgress {
  return { step, steps: 100, loss: 1 / (step + 1), learningRate: 1e-3, tokens: step * 10 };
}
