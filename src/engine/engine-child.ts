// One life of the engine process: started, ready, and dead exactly once, for whatever reason. Watches that it becomes
// ready and that it gives a sign of life while it has work; kills it when not. Knows nothing of requests.

import { type ChildProcess, fork } from 'node:child_process';
import { fileURLToPath } from 'node:url';
import { onChildEnd } from '../model/child-end.ts';
import type { EngineClock } from './clock.ts';
import type { FromEngine, ToEngine } from './messages.ts';

export interface ChildOptions {
  readonly entry: URL;
  readonly execArgv: readonly string[];
  /** The process's configuration, its only argument. */
  readonly argument: string;
  /** The child's whole environment: the gateway's own may hold secrets. */
  readonly environment: Readonly<Record<string, string>>;
  readonly clock: EngineClock;
  readonly readyMsMax: number;
  /** Longest silence of a busy engine. */
  readonly silenceMsMax: number;
}

export interface ChildListener {
  readonly onMessage: (message: FromEngine) => void;
  /** Once, after the last message. */
  readonly onDeath: (why: string) => void;
}

/** How long a step may still take after `shutdown`. Guess. */
const endMsMax = 5000;

export class EngineChild {
  readonly #options: ChildOptions;
  readonly #listener: ChildListener;
  readonly #process: ChildProcess;
  #why = '';
  #isEnding = false;
  #isBusy = false;
  #isDead = false;
  #lastSignMs: number;
  #cancelTimer: () => void;
  #onEnd: () => void = () => {};

  constructor(options: ChildOptions, listener: ChildListener) {
    this.#options = options;
    this.#listener = listener;
    this.#lastSignMs = options.clock.nowMs();
    this.#process = fork(fileURLToPath(options.entry), [options.argument], {
      serialization: 'advanced',
      execArgv: [...options.execArgv],
      env: { ...options.environment },
      stdio: ['ignore', 'inherit', 'inherit', 'ipc'],
    });
    this.#cancelTimer = options.clock.after(options.readyMsMax, () =>
      this.kill(`not ready within ${options.readyMsMax} ms`),
    );
    this.#process.on('message', (message) => this.#hear(message as FromEngine));
    onChildEnd(
      this.#process,
      (ms, callback) => options.clock.after(ms, callback),
      (why) => this.#die(why),
    );
  }

  get pid(): number | undefined {
    return this.#process.pid;
  }

  send(message: ToEngine): void {
    // The callback swallows the error of a channel that closes meanwhile: the death that follows is what counts.
    if (this.#process.connected) this.#process.send(message, () => {});
  }

  /** Whether silence is suspicious from now on. */
  expectSigns(isBusy: boolean): void {
    if (isBusy && !this.#isBusy) this.#lastSignMs = this.#options.clock.nowMs();
    this.#isBusy = isBusy;
  }

  kill(why: string): void {
    if (this.#process.exitCode === null && this.#process.signalCode === null) this.#why = why;
    this.#process.kill('SIGKILL'); // also ends a stopped process, which no other signal does
  }

  /** Asks it to end, and makes it end. Resolves when it has. */
  end(): Promise<void> {
    return new Promise((resolve) => {
      if (this.#isDead) {
        resolve();
        return;
      }
      this.#onEnd = resolve;
      this.#isEnding = true;
      this.send({ kind: 'shutdown' });
      this.#cancelTimer();
      this.#cancelTimer = this.#options.clock.after(endMsMax, () =>
        this.kill('shutdown took too long'),
      );
    });
  }

  #hear(message: FromEngine): void {
    if (this.#isDead) return;
    this.#lastSignMs = this.#options.clock.nowMs();
    // The timer of an end must stay: an engine that became ready meanwhile and then stops would never end.
    if (message.kind === 'ready' && !this.#isEnding) {
      this.#cancelTimer();
      this.#watchSilence(this.#options.silenceMsMax);
    }
    this.#listener.onMessage(message);
  }

  /** One timer that looks again when the last sign of life will have grown too old, instead of one per message. */
  #watchSilence(delayMs: number): void {
    const { clock, silenceMsMax } = this.#options;
    this.#cancelTimer = clock.after(delayMs, () => {
      const silenceMs = this.#isBusy ? clock.nowMs() - this.#lastSignMs : 0;
      if (silenceMs >= silenceMsMax) this.kill(`silent for ${Math.round(silenceMs)} ms`);
      else this.#watchSilence(silenceMsMax - silenceMs);
    });
  }

  #die(why: string): void {
    this.#isDead = true;
    this.#cancelTimer();
    this.#listener.onDeath(this.#why === '' ? why : this.#why);
    this.#onEnd();
  }
}
