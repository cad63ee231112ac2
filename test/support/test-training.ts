import { mkdirSync, mkdtempSync, rmSync } from 'node:fs';
import { open, rename } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import type { OwnDatabase } from '../../src/database.ts';
import { openJobsDatabase } from '../../src/jobs/job.ts';
import { JobStore } from '../../src/jobs/job-store.ts';
import { TrainingFiles, type TrainingFilesOptions } from '../../src/jobs/training-files.ts';

/** A store and files as a gateway has them, and no trainers but the test. */
export interface TestTraining extends Disposable {
  readonly db: OwnDatabase;
  readonly jobs: JobStore;
  readonly files: TrainingFiles;
  readonly trainers: { wake(): void };
  readonly wakes: () => number;
  /** Of the files. */
  readonly directory: string;
  readonly uploadRoot: string;
  /** The files as the next process finds them. */
  reopenFiles(): TrainingFiles;
}

export function createTestTraining(over: Partial<TrainingFilesOptions> = {}): TestTraining {
  const root = mkdtempSync(join(tmpdir(), 'rankgate-training-'));
  const [directory, uploadRoot] = [join(root, 'files'), join(root, 'uploads')];
  for (const folder of [directory, uploadRoot]) mkdirSync(folder);
  const db = openJobsDatabase(':memory:');
  let [ids, wakes] = [0, 0];
  const newId = (): string => `id${++ids}`;
  const unixS = (): number => 1_764_000_000;
  const options: TrainingFilesOptions = {
    db,
    directory,
    unixS,
    newId,
    filesMax: 4,
    bytesMax: 100_000,
    files: { open, rename },
    ...over,
  };
  return {
    db,
    jobs: new JobStore({ db, nowMs: () => 0, unixS, newId, leaseMs: 1000 }),
    files: new TrainingFiles(options),
    trainers: {
      wake() {
        wakes += 1;
      },
    },
    wakes: () => wakes,
    directory,
    uploadRoot,
    reopenFiles: () => new TrainingFiles(options),
    [Symbol.dispose]() {
      db.close();
      rmSync(root, { recursive: true });
    },
  };
}
