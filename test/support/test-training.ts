import { mkdirSync, mkdtempSync, rmSync } from 'node:fs';
import { open, rename } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import type { OwnDatabase } from '../../src/database.ts';
import { Capture, openCaptureDatabase } from '../../src/jobs/capture.ts';
import { openJobsDatabase } from '../../src/jobs/job.ts';
import { JobStore } from '../../src/jobs/job-store.ts';
import { Refresher, type RefreshSettings } from '../../src/jobs/refresher.ts';
import { TrainingFiles, type TrainingFilesOptions } from '../../src/jobs/training-files.ts';
import { FakeRegistry } from './fake-registry.ts';
import { createManualClock, type ManualClock } from './manual-clock.ts';

/** A store and files as a gateway has them, and no trainers but the test. */
export interface TestTraining extends Disposable {
  readonly db: OwnDatabase;
  readonly jobs: JobStore;
  readonly files: TrainingFiles;
  readonly trainers: { wake(): void };
  readonly capture: Capture;
  readonly refresher: Refresher;
  /** Of capture and refreshes. */
  readonly clock: ManualClock;
  readonly registry: FakeRegistry;
  /** What refreshes and capture could not do. */
  readonly failures: readonly unknown[];
  readonly wakes: () => number;
  /** Of the files. */
  readonly directory: string;
  readonly uploadRoot: string;
  /** The files as the next process finds them. */
  reopenFiles(): TrainingFiles;
}

/** Small, and at once. */
const refreshSettings: RefreshSettings = {
  everyS: 60,
  freshMin: 4,
  trainingMin: 4,
  heldOutMin: 2,
  heldOutShare: 0.5,
  scoreMin: 0.75,
  rankNatsMax: 0.02,
  guardNatsMax: 0.1,
  errorsMin: 2,
  tournament: null,
  alpha: 0.01,
  recipe: { stepsMax: 3 },
};
const captureLimits = { examplesMax: 64, bytesMax: 100_000, ageS: 86_400 };

export function createTestTraining(
  over: Partial<TrainingFilesOptions> = {},
  registry: FakeRegistry = new FakeRegistry(),
): TestTraining {
  const root = mkdtempSync(join(tmpdir(), 'rankgate-training-'));
  const [directory, uploadRoot] = [join(root, 'files'), join(root, 'uploads')];
  for (const folder of [directory, uploadRoot]) mkdirSync(folder);
  const db = openJobsDatabase(':memory:');
  let [ids, wakes] = [0, 0];
  const newId = (): string => `id${++ids}`;
  const clock = createManualClock();
  const unixS = (): number => Math.floor(clock.unixMs() / 1000);
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
  const failures: unknown[] = [];
  const [after, onFailure] = [clock.after, (error: unknown) => void failures.push(error)];
  const capture = new Capture({
    db: openCaptureDatabase(':memory:'),
    ...{ limits: captureLimits, seed: 1n, unixS, after, onFailure },
  });
  const jobs = new JobStore({ db, nowMs: () => 0, unixS, newId, leaseMs: 1000 });
  const files = new TrainingFiles(options);
  const wake = (): void => {
    wakes += 1;
  };
  const refresher = new Refresher({
    ...{ capture, jobs, files, registry, settings: refreshSettings, unixS, after, wake, onFailure },
    directory: join(root, 'refresh'),
    onLeft: () => {},
  });
  return {
    ...{ db, jobs, files, capture, refresher, clock, registry, failures },
    trainers: { wake },
    wakes: () => wakes,
    directory,
    uploadRoot,
    reopenFiles: () => new TrainingFiles(options),
    [Symbol.dispose]() {
      void refresher.close();
      capture.close();
      db.close();
      rmSync(root, { recursive: true });
    },
  };
}
