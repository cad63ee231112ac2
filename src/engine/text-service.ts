// TextService on a worker thread. Exactly one task is with the thread at a time, so that a template that does not end,
// or a task that kills the thread, costs its own request only: the thread is replaced and the queue goes on.

import { once } from 'node:events';
import { Worker } from 'node:worker_threads';
import { asGatewayError, GatewayError } from '../errors.ts';
import { workerUrl } from '../model/spawn-entry.ts';
import type { EncodedChat, TextService } from './text.ts';
import type {
  FromTextWorker,
  PlainError,
  TextResult,
  TextTask,
  TextWorkerData,
} from './text-worker.ts';

export interface TextServiceOptions {
  readonly modelPath: string;
  /** Longest prompt in tokens; longer texts are refused. */
  readonly contextMax: number;
  /** Tasks that may wait; beyond it CONTENDED. */
  readonly waitingMax?: number;
  /** UTF-16 units of all tasks that may wait; beyond it CONTENDED. */
  readonly waitingCharactersMax?: number;
  /** Longest run of one task before the thread is terminated under it. */
  readonly taskMsMax?: number;
  /** Heap of the thread: a template that fills memory ends the thread, not the gateway. */
  readonly heapMbMax?: number;
}

// Guesses: the longest measured task, 660,000 characters of one letter, takes 0.3 s (tokenizer.test.ts states it).
const defaults = {
  waitingMax: 1024,
  waitingCharactersMax: 2 ** 26,
  taskMsMax: 10_000,
  heapMbMax: 512,
};

interface Job {
  readonly task: TextTask;
  readonly characters: number;
  resolve(result: TextResult): void;
  reject(error: GatewayError): void;
}

/** Throws what the model file is refused for. */
export async function createTextService(options: TextServiceOptions): Promise<TextService> {
  const queue = new TaskQueue({ ...defaults, ...options });
  await queue.open();
  return {
    async encodeChat(messages, { templateArguments = {} } = {}) {
      // Every turn costs a token at least; many empty ones would cost the template time and no characters.
      if (messages.length > options.contextMax) {
        throw exceeded(`${messages.length} messages`, options.contextMax, 'messages');
      }
      const characters = messages.reduce((sum, message) => sum + message.content.length, 0);
      const task: TextTask = { kind: 'encode-chat', messages, templateArguments };
      return (await queue.run(task, characters)) as EncodedChat;
    },
    encode: async (text) => (await queue.run({ kind: 'encode', text }, text.length)) as Int32Array,
    async decode(tokens) {
      if (tokens.length > options.contextMax) {
        throw exceeded(`${tokens.length} tokens`, options.contextMax, 'tokens');
      }
      return (await queue.run({ kind: 'decode', tokens }, tokens.length)) as string;
    },
    close: async () => queue.close(),
  };
}

class TaskQueue {
  readonly #options: Required<TextServiceOptions>;
  readonly #waiting: Job[] = [];
  #waitingCharacters = 0;
  #isServing = false;
  #worker: Worker | null = null;
  /** Ends the wait for the thread's next message, and the thread with it. */
  #interrupt: (reason: GatewayError) => void = () => {};
  #charactersMax = 0;
  #isClosed = false;

  constructor(options: Required<TextServiceOptions>) {
    this.#options = options;
  }

  async run(task: TextTask, characters: number): Promise<TextResult> {
    const { waitingMax, waitingCharactersMax } = this.#options;
    if (this.#isClosed) throw closing();
    if (characters > this.#charactersMax) {
      throw exceeded(`${characters} characters`, this.#charactersMax, paramOf(task));
    }
    if (
      this.#waiting.length >= waitingMax ||
      this.#waitingCharacters + characters > waitingCharactersMax
    ) {
      throw new GatewayError('CONTENDED', `${this.#waiting.length} texts wait to be tokenised`, {
        retryAfterS: 1,
      });
    }
    const result = new Promise<TextResult>((resolve, reject) => {
      this.#waiting.push({ task, characters, resolve, reject });
    });
    this.#waitingCharacters += characters;
    if (!this.#isServing) void this.#serve();
    return result;
  }

  async close(): Promise<void> {
    this.#isClosed = true;
    this.#interrupt(closing());
    this.#rejectWaiting(closing());
    await this.#worker?.terminate();
  }

  /** The thread, started when there is none. Throws the reason when it cannot be. */
  async open(): Promise<Worker> {
    if (this.#worker !== null) return this.#worker;
    const { modelPath, contextMax, heapMbMax } = this.#options;
    const data: TextWorkerData = { modelPath, contextMax };
    const worker = new Worker(workerUrl(import.meta.url, './text-worker'), {
      workerData: data,
      resourceLimits: { maxOldGenerationSizeMb: heapMbMax },
    });
    this.#worker = worker;
    worker.on('error', () => {}); // whoever waits for a message is told; unheard it would end the gateway
    worker.once('exit', () => {
      if (this.#worker === worker) this.#worker = null;
    });
    const message = await this.#nextMessage(worker, null);
    if (message.kind === 'ready') {
      this.#charactersMax = message.charactersMax;
      return worker;
    }
    this.#worker = null; // it ends by itself
    throw message.kind === 'done' ? new Error('done before ready') : errorOf(message);
  }

  async #serve(): Promise<void> {
    this.#isServing = true;
    for (let job = this.#waiting.shift(); job !== undefined; job = this.#waiting.shift()) {
      this.#waitingCharacters -= job.characters;
      try {
        job.resolve(await this.#work(job.task));
      } catch (error) {
        job.reject(asGatewayError(error));
      }
    }
    this.#isServing = false;
  }

  async #work(task: TextTask): Promise<TextResult> {
    const worker = await this.open().catch((cause: unknown) => {
      if (this.#isClosed) throw closing();
      const error = new GatewayError('NO_CAPACITY', 'the text thread cannot start', { cause });
      this.#rejectWaiting(error); // the next request pays for another try
      throw error;
    });
    worker.postMessage(task);
    const message = await this.#nextMessage(worker, this.#options.taskMsMax);
    if (message.kind === 'done') return message.result;
    throw message.kind === 'failed' ? errorOf(message, paramOf(task)) : new Error('ready again');
  }

  /** When something else comes first, an error, the time limit or the end, the thread is given up. */
  async #nextMessage(worker: Worker, msMax: number | null): Promise<FromTextWorker> {
    const stop = new AbortController();
    this.#interrupt = (reason) => stop.abort(reason);
    if (this.#isClosed) stop.abort(closing());
    const timer =
      msMax === null
        ? undefined
        : setTimeout(() => {
            stop.abort(new GatewayError('INTERNAL', `the text thread took more than ${msMax} ms`));
          }, msMax);
    try {
      const [message] = await once(worker, 'message', { signal: stop.signal });
      return message as FromTextWorker;
    } catch (cause) {
      if (this.#worker === worker) this.#worker = null;
      void worker.terminate();
      stop.signal.throwIfAborted();
      throw new GatewayError('INTERNAL', 'the text thread failed', { cause });
    } finally {
      clearTimeout(timer);
    }
  }

  #rejectWaiting(error: GatewayError): void {
    for (const job of this.#waiting.splice(0)) job.reject(error);
    this.#waitingCharacters = 0;
  }
}

function closing(): GatewayError {
  return new GatewayError('NO_CAPACITY', 'the gateway is closing');
}

function errorOf({ code, message, param }: PlainError, paramWhenNone?: string): GatewayError {
  const named = param ?? paramWhenNone;
  return new GatewayError(code, message, named === undefined ? {} : { param: named });
}

function exceeded(got: string, max: number, param: string): GatewayError {
  const message = `${got}, the context holds at most ${max}`;
  return new GatewayError('CONTEXT_LENGTH_EXCEEDED', message, { param });
}

function paramOf(task: TextTask): string {
  switch (task.kind) {
    case 'encode-chat':
      return 'messages';
    case 'encode':
      return 'prompt';
    case 'decode':
      return 'tokens';
  }
}
