// Imports and exports one at a time, each on a thread of its own (import-worker.ts): the thread writes the blob, this side
// registers it. A job that hangs or runs out of memory ends its thread and nothing else.

import { Worker } from 'node:worker_threads';
import { GatewayError } from '../errors.ts';
import { workerUrl } from '../model/spawn-entry.ts';
import { type Generation, isGeneration } from './adapter.ts';
import type { BlobStore } from './blobs.ts';
import type { ImportAnswer, ImportJob } from './import-worker.ts';
import type { SqueezeTarget } from './pack-pairs.ts';
import type { AdapterBase } from './peft.ts';
import type {
  ExportedFiles,
  ImportedAdapter,
  Importer,
  ImportOptions,
  Registry,
} from './registry.ts';

export interface ImporterOptions {
  readonly base: AdapterBase;
  readonly registry: Registry;
  readonly blobs: BlobStore;
  /** The directory of `blobs`: the thread opens it too. */
  readonly blobDirectory: string;
  /** The base's file: without it, adapters in their family's own numbers are refused. */
  readonly modelPath?: string;
  /** Jobs that may wait beside the one that runs; beyond, CONTENDED. */
  readonly waitingMax?: number;
  readonly jobMsMax?: number;
}

const waitingMaxDefault = 8;
// One core on all of SmolLM2-135M takes 12 s at rank 64 (measured); rank 256, from one block, about 2.5 min.
const jobMsMaxDefault = 15 * 60 * 1000;
const heapMbMax = 512; // Objects only; the weights' buffers are bounded by their file's size.
const attemptsMax = 3;

export function createImporter(options: ImporterOptions): Importer {
  return new ThreadedImporter(options);
}

class ThreadedImporter implements Importer {
  readonly #options: ImporterOptions;
  readonly #jobMsMax: number;
  readonly #waitingMax: number;
  readonly #closing = new AbortController();
  /** Settles, never rejects, when the last job that was queued has ended. */
  #last: Promise<unknown> = Promise.resolve();
  #jobs = 0;

  constructor(options: ImporterOptions) {
    this.#options = options;
    this.#jobMsMax = options.jobMsMax ?? jobMsMaxDefault;
    this.#waitingMax = options.waitingMax ?? waitingMaxDefault;
  }

  async importPeft(directory: string, options: ImportOptions = {}): Promise<ImportedAdapter> {
    const { base, blobDirectory, modelPath = null } = this.#options;
    const { acceptBaseName = null, levels = 'energy' } = options;
    const own = { kind: 'import', directory, blobDirectory, base, acceptBaseName, levels } as const;
    return this.#queue(() =>
      this.#importAndRegister({ ...own, modelPath, bases: this.#knownBases() }),
    );
  }

  async exportPeft(generation: Generation, rank: number): Promise<ExportedFiles> {
    const { base, blobDirectory } = this.#options;
    if (!isGeneration(generation)) {
      throw new GatewayError('ADAPTER_NOT_FOUND', 'not a generation');
    }
    const job = { kind: 'export', blobDirectory, generation, rank, base: base.config } as const;
    const answer = await this.#queue(() => this.#run(job));
    if (answer.kind !== 'exported') throw new GatewayError('INTERNAL', `got ${answer.kind}`);
    return answer.files;
  }

  async squeeze(generation: Generation, target: SqueezeTarget): Promise<ImportedAdapter> {
    const { blobDirectory } = this.#options;
    const job = { kind: 'squeeze', blobDirectory, generation, target } as const;
    return this.#queue(() => this.#importAndRegister(job));
  }

  async close(): Promise<void> {
    this.#closing.abort();
    await this.#last;
  }

  async #importAndRegister(job: ImportJob): Promise<ImportedAdapter> {
    const { blobs, registry } = this.#options;
    for (let attempt = 1; ; attempt++) {
      const answer = await this.#run(job);
      if (answer.kind !== 'imported') throw new GatewayError('INTERNAL', `got ${answer.kind}`);
      const { adapter, shared } = answer;
      // The same generation may have been removed while the thread's message was under way. From here to `store` nothing
      // can come between.
      const stored = shared === null ? [adapter] : [shared, adapter];
      const isThere = stored.every(({ generation }) => blobs.has(generation));
      if (isThere || attempt === attemptsMax) {
        for (const { generation, manifest, bytes } of stored) {
          registry.store(generation, manifest, bytes);
        }
        return adapter;
      }
    }
  }

  /** What svfit adapters are served with already: the next one may need no basis of its own. */
  #knownBases(): readonly Generation[] {
    const needs = this.#options.registry.list().map(({ manifest }) => manifest);
    return [...new Set(needs.flatMap((m) => (m.kind === 'svfit' ? (m.options.needs ?? []) : [])))];
  }

  async #queue<T>(work: () => Promise<T>): Promise<T> {
    if (this.#jobs > this.#waitingMax) {
      const message = `${this.#jobs} imports and exports are under way or waiting`;
      throw new GatewayError('CONTENDED', message, { retryAfterS: 5 });
    }
    this.#jobs += 1;
    const job = this.#last.then(() => {
      if (this.#closing.signal.aborted) throw closed();
      return work();
    });
    this.#last = job.catch(() => {});
    try {
      return await job;
    } finally {
      this.#jobs -= 1;
    }
  }

  /** What the thread answers; throws what it failed with. */
  async #run(job: ImportJob): Promise<Exclude<ImportAnswer, { kind: 'failed' }>> {
    const worker = new Worker(workerUrl(import.meta.url, './import-worker'), {
      workerData: job,
      resourceLimits: { maxOldGenerationSizeMb: heapMbMax },
    });
    const answer = await answerOf(worker, this.#jobMsMax, this.#closing.signal);
    if (answer.kind !== 'failed') return answer;
    const { code, message, param, stack } = answer;
    throw new GatewayError(code, message, {
      ...(param === undefined ? {} : { param }),
      ...(stack === undefined ? {} : { cause: new Error(stack) }),
    });
  }
}

function closed(): GatewayError {
  return new GatewayError('CANCELLED', 'the importer was closed');
}

/** The first message, after the thread has ended: what it held open is closed then. */
async function answerOf(
  worker: Worker,
  msMax: number,
  closing: AbortSignal,
): Promise<ImportAnswer> {
  let answer: ImportAnswer | null = null;
  let failure: GatewayError | null = null;
  const stop = (error: GatewayError): void => {
    failure ??= error;
    worker.terminate().catch(() => {}); // It ends by 'exit' in any case.
  };
  const onClose = (): void => stop(closed());
  const timer = setTimeout(() => {
    stop(new GatewayError('INVALID_ADAPTER', `the adapter took longer than ${msMax} ms`));
  }, msMax);
  closing.addEventListener('abort', onClose);
  if (closing.aborted) onClose();
  try {
    await new Promise<void>((resolve) => {
      worker.on('message', (message: ImportAnswer) => {
        answer = message;
      });
      worker.on('error', (error) => {
        failure ??= threadError(error);
      });
      worker.on('exit', () => resolve());
    });
  } finally {
    clearTimeout(timer);
    closing.removeEventListener('abort', onClose);
  }
  if (answer !== null) return answer;
  throw failure ?? new GatewayError('INTERNAL', 'the import thread ended without an answer');
}

function threadError(error: Error): GatewayError {
  const code = (error as NodeJS.ErrnoException).code;
  if (code === 'ERR_WORKER_OUT_OF_MEMORY') {
    return new GatewayError('INVALID_ADAPTER', 'the adapter needs too much memory to be read');
  }
  return new GatewayError('INTERNAL', 'the import thread failed', { cause: error });
}
