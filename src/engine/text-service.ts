// TextService on a worker thread. Exactly one task is with the thread at a time, so that a template that does not end,
// or a task that kills the thread, costs its own request only: the thread is replaced and the queue goes on.

import { Worker } from 'node:worker_threads';
import { asGatewayError, GatewayError } from '../errors.ts';
import { workerUrl } from '../model/spawn-entry.ts';
import type { EncodedChat, TextService } from './text.ts';
import type {
  FromTextWorker,
  TextAnswer,
  TextResult,
  TextTask,
  TextWorkerData,
  ToTextWorker,
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
  await queue.start();
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
  #running: { readonly ticket: number; readonly job: Job; readonly timer: NodeJS.Timeout } | null =
    null;
  #worker: Worker | null = null;
  #state: 'absent' | 'starting' | 'ready' | 'ending' = 'absent';
  #charactersMax = 0;
  #ticket = 0;
  #isClosed = false;

  constructor(options: Required<TextServiceOptions>) {
    this.#options = options;
  }

  /** Resolves when the thread can work; rejects with the reason when it cannot. */
  async start(): Promise<void> {
    const { modelPath, contextMax, heapMbMax } = this.#options;
    const data: TextWorkerData = { modelPath, contextMax };
    const worker = new Worker(workerUrl(import.meta.url, './text-worker'), {
      workerData: data,
      resourceLimits: { maxOldGenerationSizeMb: heapMbMax },
    });
    this.#worker = worker;
    this.#state = 'starting';
    await new Promise<void>((resolve, reject) => {
      let reason = new GatewayError('INTERNAL', 'the text thread ended');
      worker.on('message', (message: FromTextWorker) => {
        if (message.kind === 'ready') {
          this.#state = 'ready';
          this.#charactersMax = message.charactersMax;
          resolve();
          this.#pump();
        } else if (message.kind === 'refused') {
          reason = new GatewayError(message.code, message.message);
        } else {
          this.#settle(message);
        }
      });
      worker.on('error', (cause) => {
        reason = new GatewayError('INTERNAL', 'the text thread failed', { cause });
      });
      worker.on('exit', () => {
        reject(reason);
        this.#endThread(reason);
      });
    });
  }

  async run(task: TextTask, characters: number): Promise<TextResult> {
    const { waitingMax, waitingCharactersMax } = this.#options;
    if (this.#isClosed) throw new GatewayError('NO_CAPACITY', 'the gateway is closing');
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
    // Nobody to start it again: the last start failed. This request pays for another try.
    if (this.#state === 'absent') this.#restart();
    this.#pump();
    return result;
  }

  async close(): Promise<void> {
    this.#isClosed = true;
    const closing = new GatewayError('NO_CAPACITY', 'the gateway is closing');
    this.#rejectRunning(closing);
    this.#rejectWaiting(closing);
    await this.#worker?.terminate();
  }

  #pump(): void {
    while (this.#state === 'ready' && this.#running === null) {
      const job = this.#waiting.shift();
      if (job === undefined) return;
      this.#waitingCharacters -= job.characters;
      this.#ticket += 1;
      const message: ToTextWorker = { ticket: this.#ticket, task: job.task };
      try {
        this.#worker?.postMessage(message);
      } catch (cause) {
        // A function or symbol among the template arguments: it cannot be copied to the thread.
        const param = 'chat_template_kwargs';
        const text = 'the template arguments are not plain data';
        job.reject(new GatewayError('INVALID_REQUEST', text, { param, cause }));
        continue;
      }
      const timer = setTimeout(() => this.#giveUp(), this.#options.taskMsMax);
      this.#running = { ticket: this.#ticket, job, timer };
    }
  }

  #settle(message: TextAnswer): void {
    const running = this.#running;
    if (running === null || running.ticket !== message.ticket) return;
    clearTimeout(running.timer);
    this.#running = null;
    if (message.kind === 'done') {
      running.job.resolve(message.result);
    } else {
      const param = message.param ?? paramOf(running.job.task);
      running.job.reject(new GatewayError(message.code, message.message, { param }));
    }
    this.#pump();
  }

  #giveUp(): void {
    const ms = this.#options.taskMsMax;
    this.#rejectRunning(new GatewayError('INTERNAL', `the text thread took more than ${ms} ms`));
    // Takes no more tasks; #endThread follows when it is gone.
    this.#state = 'ending';
    this.#worker?.terminate().catch(() => undefined);
  }

  #endThread(reason: GatewayError): void {
    const wasStarting = this.#state === 'starting';
    this.#worker = null;
    this.#state = 'absent';
    this.#rejectRunning(reason);
    // A thread that ended before it was ready is not tried again by itself: the next request does (run).
    if (!wasStarting && !this.#isClosed) this.#restart();
  }

  #restart(): void {
    this.start().catch((error: unknown) => {
      this.#rejectWaiting(
        new GatewayError('NO_CAPACITY', 'the text thread cannot start', {
          cause: asGatewayError(error),
        }),
      );
    });
  }

  #rejectRunning(error: GatewayError): void {
    if (this.#running === null) return;
    clearTimeout(this.#running.timer);
    this.#running.job.reject(error);
    this.#running = null;
  }

  #rejectWaiting(error: GatewayError): void {
    for (const job of this.#waiting.splice(0)) job.reject(error);
    this.#waitingCharacters = 0;
  }
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
