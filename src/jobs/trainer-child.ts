// One trainer process: one claim of one job, at a low priority. Knows nothing of the job store.

import { type ChildProcess, fork } from 'node:child_process';
import { writeFileSync } from 'node:fs';
import { setPriority } from 'node:os';
import { fileURLToPath } from 'node:url';
import type { FromTrainer, ToTrainer, TrainerSpec } from './messages.ts';

export interface TrainerChildOptions {
  readonly entry: URL;
  readonly execArgv: readonly string[];
  /** The child's whole environment: the gateway's own may hold secrets. */
  readonly environment: Readonly<Record<string, string>>;
  /** The system's: 19 gets what nobody else wants. */
  readonly nice: number;
  readonly after: (ms: number, callback: () => void) => () => void;
}

export interface TrainerListener {
  readonly onMessage: (message: FromTrainer) => void;
  /** Once, after the last message. */
  readonly onEnd: (why: string) => void;
}

/** How long the channel may stay open after the process has ended. Guess. */
const channelMsMax = 2000;

export class TrainerChild {
  readonly #process: ChildProcess;

  constructor(options: TrainerChildOptions, spec: TrainerSpec, listener: TrainerListener) {
    this.#process = fork(fileURLToPath(options.entry), [JSON.stringify(spec)], {
      serialization: 'advanced',
      execArgv: [...options.execArgv],
      env: { ...options.environment },
      stdio: ['ignore', 'inherit', 'inherit', 'ipc'],
    });
    standBack(this.#process.pid, options.nice);
    this.#process.on('message', (message) => listener.onMessage(message as FromTrainer));
    this.#watch(options.after, listener.onEnd);
  }

  get pid(): number | undefined {
    return this.#process.pid;
  }

  send(message: ToTrainer): void {
    // The callback swallows the error of a channel that closes meanwhile: the end that follows is what counts.
    if (this.#process.connected) this.#process.send(message, () => {});
  }

  /** Also ends a stopped process, which no other signal does. */
  kill(): void {
    this.#process.kill('SIGKILL');
  }

  #watch(after: TrainerChildOptions['after'], onEnd: (why: string) => void): void {
    const child = this.#process;
    let why: string | null = null;
    let cancelTimer = (): void => {};
    let hasEnded = false;
    const end = (): void => {
      if (hasEnded) return;
      hasEnded = true;
      cancelTimer();
      onEnd(why!);
    };
    child.on('error', (error) => {
      if (child.pid !== undefined) return;
      why = `it cannot be started (${(error as NodeJS.ErrnoException).code})`;
      end();
    });
    child.once('exit', (code, signal) => {
      why = signal === null ? `exit code ${code}` : `signal ${signal}`;
      // The process may end before the last of its messages has been read from the channel.
      if (child.connected) cancelTimer = after(channelMsMax, end);
      else end();
    });
    child.once('disconnect', () => {
      if (why !== null) end();
      else child.kill('SIGKILL'); // alive without a channel: nobody can talk to it any more
    });
  }
}

/** From outside and at once: priority is a thread's, and threads have that of the one that starts them. Where memory runs out
 *  Linux ends the trainer first, whose job goes on later, and not the engine. */
function standBack(pid: number | undefined, nice: number): void {
  if (pid === undefined) return;
  try {
    setPriority(pid, nice);
    writeFileSync(`/proc/${pid}/oom_score_adj`, '1000');
  } catch {
    // It has ended already, or this is no Linux.
  }
}
