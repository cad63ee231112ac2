// Packed files read, hashed, parsed and, for a blend, merged on threads of their own while the engine's thread is inside a
// step. Done there instead, every await of the reading would wait for a step to end: seven steps for one file.

import { Worker } from 'node:worker_threads';
import { GatewayError } from '../errors.ts';
import { workerUrl } from '../model/spawn-entry.ts';
import type { Generation } from './adapter.ts';
import { isBlendKey, parseBlendKey } from './blend-key.ts';
import { type PackedAdapter, packedAdapter } from './pack.ts';
import type { PackAnswer, PackTask } from './pack-worker.ts';
import type { ResidentKey } from './residency.ts';

/** Throws ADAPTER_NOT_FOUND, ADAPTER_CORRUPT or what blendContents throws, or INTERNAL when the thread ended. */
export type ReadPacked = (key: ResidentKey) => Promise<PackedAdapter<ResidentKey>>;

interface Reading {
  readonly key: ResidentKey;
  resolve(packed: PackedAdapter<ResidentKey>): void;
  reject(error: GatewayError): void;
}

/** The thread starts at once, so that the first load does not wait for it. Idle, it does not keep the process alive. Blends
 *  have a thread of their own: one takes seconds, and nobody's load waits behind it. */
export function createPackReader(pathOf: (generation: Generation) => string): ReadPacked {
  let reader = startThread();
  let merger: Thread | null = null;
  const threadFor = (key: ResidentKey): Thread => {
    if (isBlendKey(key)) {
      merger = merger === null || merger.hasEnded ? startThread() : merger;
      return merger;
    }
    if (reader.hasEnded) reader = startThread();
    return reader;
  };
  return (key) =>
    new Promise((resolve, reject) => {
      const blend = isBlendKey(key) ? key : null;
      const parts = isBlendKey(key) ? parseBlendKey(key).parts : [{ generation: key }];
      const files = parts.map(({ generation }) => ({ generation, path: pathOf(generation) }));
      const { readings, worker } = threadFor(key);
      readings.push({ key, resolve, reject });
      worker.ref();
      worker.postMessage({ blend, files } satisfies PackTask);
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
    else reading?.resolve(packedAdapter(reading.key, answer.contents));
  });
  worker.on('error', end);
  worker.on('exit', (code) => end(`exit code ${code}`));
  worker.unref();
  return thread;
}
