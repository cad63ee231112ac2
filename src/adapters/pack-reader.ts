// Packed files read, hashed and parsed on a thread of its own while the engine's thread is inside a step. Done there
// instead, every await of the reading would wait for a step to end: seven steps for one file.

import { Worker } from 'node:worker_threads';
import { GatewayError } from '../errors.ts';
import { workerUrl } from '../model/spawn-entry.ts';
import type { Generation } from './adapter.ts';
import { type PackedAdapter, packedAdapter } from './pack.ts';
import type { PackAnswer, PackTask } from './pack-worker.ts';

/** Throws ADAPTER_NOT_FOUND or ADAPTER_CORRUPT, or INTERNAL when the thread ended. */
export type ReadPacked = (path: string, generation: Generation) => Promise<PackedAdapter>;

interface Reading {
  readonly generation: Generation;
  resolve(packed: PackedAdapter): void;
  reject(error: GatewayError): void;
}

/** The thread starts at once, so that the first load does not wait for it. Idle, it does not keep the process alive. */
export function createPackReader(): ReadPacked {
  let thread = startThread();
  return (path, generation) =>
    new Promise((resolve, reject) => {
      if (thread.hasEnded) thread = startThread();
      thread.readings.push({ generation, resolve, reject });
      thread.worker.ref();
      thread.worker.postMessage({ path, generation } satisfies PackTask);
    });
}

interface Thread {
  readonly worker: Worker;
  /** What it was asked for and has not answered, in order. */
  readonly readings: Reading[];
  hasEnded: boolean;
}

function startThread(): Thread {
  const worker = new Worker(workerUrl(import.meta.url, './pack-worker'));
  const thread: Thread = { worker, readings: [], hasEnded: false };
  const { readings } = thread;
  const end = (cause: unknown): void => {
    thread.hasEnded = true;
    const error = new GatewayError('INTERNAL', 'the thread that reads adapters ended', { cause });
    for (const reading of readings.splice(0)) reading.reject(error);
  };
  worker.on('message', (answer: PackAnswer) => {
    const reading = readings.shift();
    if (readings.length === 0) worker.unref();
    if (answer.kind === 'failed') reading?.reject(new GatewayError(answer.code, answer.message));
    else reading?.resolve(packedAdapter(reading.generation, answer.contents));
  });
  worker.on('error', end);
  worker.on('exit', (code) => end(`exit code ${code}`));
  worker.unref();
  return thread;
}
