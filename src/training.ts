// Training put together: the job store, the files, and the processes that work on them, with the way of their results into the
// registry. Built by main.ts; the server sees its `Training` part.

import { randomUUID } from 'node:crypto';
import { mkdirSync } from 'node:fs';
import { open, rename } from 'node:fs/promises';
import { availableParallelism } from 'node:os';
import { join } from 'node:path';
import type { Generation } from './adapters/adapter.ts';
import { blobPath } from './adapters/blobs.ts';
import type { Importer, Registry } from './adapters/registry.ts';
import { backendEnvironment, type Config, childEnvironment } from './config.ts';
import { systemClock } from './engine/clock.ts';
import type { Engine } from './engine/engine.ts';
import { GatewayError } from './errors.ts';
import { Capture, openCaptureDatabase } from './jobs/capture.ts';
import { openJobsDatabase } from './jobs/job.ts';
import { JobStore } from './jobs/job-store.ts';
import { Refresher } from './jobs/refresher.ts';
import { TrainerSupervisor } from './jobs/trainer-supervisor.ts';
import { TrainingFiles } from './jobs/training-files.ts';
import type { ModelFile } from './model/model-source.ts';
import { entryExecArgv, entryUrl } from './model/spawn-entry.ts';
import { unloadUnused } from './server/adapters.ts';
import type { Training } from './server/deps.ts';
import { usableCores } from './usable-cores.ts';

export interface TrainingParts {
  readonly config: Config;
  readonly model: ModelFile;
  readonly engine: Engine;
  readonly registry: Registry;
  readonly importer: Importer;
  readonly cacheDirectory: string;
  readonly blobDirectory: string;
  readonly onFailure: (error: unknown) => void;
}

export interface OpenedTraining {
  readonly training: Training;
  /** Lets trainers write a last checkpoint. Idempotent. */
  close(): Promise<void>;
}

/** A trainer is alive as long as it says something or uses CPU time: between two pieces of computing, seconds of a core, it may
 *  wait for long (3 of 1027 shares of busy cores). Guess: one that hangs holds its job up for as long. */
const leaseMs = 900_000;
const stopMsMax = 10_000;

export function openTraining(parts: TrainingParts): OpenedTraining {
  const { config } = parts;
  const at = (name: string): string => join(config.dataDir, name);
  for (const name of ['files', 'jobs']) mkdirSync(at(name), { recursive: true });
  const db = openJobsDatabase(at('jobs.sqlite'));
  const unixS = (): number => Math.floor(Date.now() / 1000);
  const newId = (): string => randomUUID().replaceAll('-', '');
  const jobs = new JobStore({ db, nowMs: systemClock.nowMs, unixS, newId, leaseMs });
  const files = new TrainingFiles({
    db,
    directory: at('files'),
    unixS,
    newId,
    filesMax: config.filesMax,
    bytesMax: config.filesBytesMax,
    files: { open, rename },
  });
  const capture = openCapture(parts, at('capture.sqlite'), unixS);
  let wake = (): void => {};
  const refresher = new Refresher({
    ...{ capture, jobs, files, unixS, registry: parts.registry, settings: config.refresh },
    directory: at('refresh'),
    after: systemClock.after,
    wake: () => wake(),
    onLeft: (generation) => unloadUnused(generation, parts),
    onFailure: parts.onFailure,
  });
  const trainers = startTrainers(parts, { jobs, files, refresher, directory: at('jobs') });
  wake = () => trainers.wake();
  let closing: Promise<void> | null = null;
  return {
    training: { jobs, files, trainers, refresher },
    close() {
      closing ??= Promise.allSettled([refresher.close(), trainers.close()]).then(() => {
        capture.close();
        db.close();
      });
      return closing;
    },
  };
}

function startTrainers(
  parts: TrainingParts,
  {
    jobs,
    files,
    refresher,
    directory,
  }: Pick<Training, 'jobs' | 'files' | 'refresher'> & { directory: string },
): TrainerSupervisor {
  const { config, model, engine, registry, importer, cacheDirectory, onFailure } = parts;
  const startOf = (generation: Generation): string => {
    if (registry.stored(generation) !== null) return blobPath(parts.blobDirectory, generation);
    throw new GatewayError('ADAPTER_NOT_FOUND', 'the adapter that the job starts from is gone');
  };
  const isQuota = usableCores().count < availableParallelism();
  // One core is left to serving, where there is one.
  const threads = config.trainerThreads ?? Math.max(1, config.threads - 1);
  const backend = config.trainerBackend ?? config.backend;
  return new TrainerSupervisor({
    entry: entryUrl(import.meta.url, './trainer/trainer-process'),
    execArgv: entryExecArgv(import.meta.url),
    environment: { ...backendEnvironment(backend, threads), ...childEnvironment() },
    nice: config.trainerNice,
    after: systemClock.after,
    nowMs: systemClock.nowMs,
    store: jobs,
    directory,
    trainersMax: config.trainersMax,
    stopMsMax,
    onFailure,
    specOf: ({ trainingFile, validationFile, request: { startFrom, refresh } }) => ({
      modelPath: model.path,
      modelHash: model.sha256,
      trainingPath: files.pathOf(trainingFile),
      heldOutPath: validationFile === null ? null : files.pathOf(validationFile),
      startFrom: startFrom === null ? null : startOf(startFrom),
      compare:
        refresh === undefined
          ? null
          : { earlier: refresh.earlier === null ? null : startOf(refresh.earlier) },
      backend,
      threads,
      cacheDirectory,
    }),
    importResult: async (from) => (await importer.importPeft(from)).generation,
    judge: (job, result) => refresher.judge(job, result),
    promote(job, generation) {
      if (job.request.refresh !== undefined) return refresher.promote(job, generation);
      promote(registry, job.request.adapter, generation);
      return null;
    },
    pressure() {
      const { running, waiting, threads: now } = engine.stats();
      return { answers: running + waiting, isQuota, threads: now, threadsMax: config.threads };
    },
  });
}

function openCapture(
  { config, onFailure }: TrainingParts,
  path: string,
  unixS: () => number,
): Capture {
  const { examplesMax, bytesMax, ageS } = config.refresh;
  const db = openCaptureDatabase(path);
  const limits = { examplesMax, bytesMax, ageS };
  return new Capture({ db, limits, seed: 0n, unixS, after: systemClock.after, onFailure });
}

/** The name holds its job's id, so whatever it points at is the same job's, of an attempt that was cut off after this. */
function promote(registry: Registry, name: string, generation: Generation): void {
  const before = registry.find(name)?.generation;
  if (before === undefined) registry.create(name, generation);
  else if (before !== generation) registry.swap(name, generation, null);
  registry.durableNow(); // The job's success must not be kept without it, nor wait for it.
}
