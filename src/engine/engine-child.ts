// One life of the engine process: started, ready, and dead exactly once, for whatever reason. Watches that it becomes
// ready and that it gives a sign of life while it has work; kills it when not. Knows nothing of requests.

import { type ChildProcess, fork } from 'node:child_process';
import { fileURLToPath } from 'node:url';
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

/** How long the channel may stay open after the process has ended. Guess. */
const channelMsMax = 2000;
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
    this.#watch();
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
    this.#why = why;
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

  #watch(): void {
    let hasExited = false;
    let isClosed = false;
    const check = (): void => {
      // Both: the process may end before the last of its messages has been read from the channel.
      if (hasExited && isClosed) this.#die();
    };
    this.#process.on('message', (message) => this.#hear(message as FromEngine));
    this.#process.on('error', (error) => {
      this.#why = error.message;
      if (this.#process.pid === undefined) this.#die();
    });
    this.#process.once('exit', (code, signal) => {
      hasExited = true;
      if (this.#why === '') {
        this.#why = signal === null ? `exit code ${code}` : `signal ${signal}`;
      }
      if (!this.#process.connected) isClosed = true;
      else {
        this.#cancelTimer();
        this.#cancelTimer = this.#options.clock.after(channelMsMax, () => this.#die());
      }
      check();
    });
    this.#process.once('disconnect', () => {
      isClosed = true;
      if (!hasExited) this.#process.kill('SIGKILL'); // alive without a channel: nobody can talk to it any more
      check();
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

  #die(): void {
    if (this.#isDead) return;
    this.#isDead = true;
    this.#cancelTimer();
    this.#listener.onDeath(this.#why);
    this.#onEnd();
  }
}
