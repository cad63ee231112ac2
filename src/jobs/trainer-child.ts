// One trainer process: one claim of one job, at a low priority. Knows nothing of the job store.

import { type ChildProcess, fork } from 'node:child_process';
import { readFileSync, writeFileSync } from 'node:fs';
import { setPriority } from 'node:os';
import { fileURLToPath } from 'node:url';
import { onChildEnd } from '../model/child-end.ts';
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

export class TrainerChild {
  readonly #process: ChildProcess;
  /** Of CPU time: when it was last looked at, and at the first look since its last message. */
  #seenMs = 0;
  #silentSinceMs: number | null = null;
  #hasSpoken = false;
  #isHeld = false;

  constructor(options: TrainerChildOptions, spec: TrainerSpec, listener: TrainerListener) {
    this.#process = fork(fileURLToPath(options.entry), [JSON.stringify(spec)], {
      serialization: 'advanced',
      execArgv: [...options.execArgv],
      env: { ...options.environment },
      stdio: ['ignore', 'inherit', 'inherit', 'ipc'],
    });
    standBack(this.#process.pid, options.nice);
    this.#process.on('message', (message) => {
      this.#silentSinceMs = null;
      this.#hasSpoken = true;
      listener.onMessage(message as FromTrainer);
    });
    onChildEnd(this.#process, options.after, listener.onEnd);
  }

  get pid(): number | undefined {
    return this.#process.pid;
  }

  /** Whether it had CPU time since it was last asked, and, without a message, at most so much. In the middle of a piece of
   *  computing it says nothing, however long the system lets it wait for the cores. */
  hasComputed(cpuMsMax: number): boolean {
    const cpuMs = cpuMsOf(this.#process.pid);
    const isMore = cpuMs > this.#seenMs;
    this.#seenMs = cpuMs;
    this.#silentSinceMs ??= cpuMs;
    return isMore && cpuMs - this.#silentSinceMs <= cpuMsMax;
  }

  send(message: ToTrainer): void {
    // The callback swallows the error of a channel that closes meanwhile: the end that follows is what counts.
    if (this.#process.connected) this.#process.send(message, () => {});
  }

  /** Stops all its threads where they are, or lets them go on. Only once it is sure to end with its gateway, which is when it
   *  speaks (trainer/background.ts), and where there is that. */
  hold(isHeld: boolean): void {
    if (isHeld === this.#isHeld || !this.#hasSpoken || process.platform !== 'linux') return;
    this.#isHeld = isHeld;
    this.#process.kill(isHeld ? 'SIGSTOP' : 'SIGCONT');
  }

  /** Also ends a stopped process, which no other signal does. */
  kill(): void {
    this.#process.kill('SIGKILL');
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

/** Of all its threads, in steps of 10 ms; 0 where the system does not tell. */
function cpuMsOf(pid: number | undefined): number {
  try {
    // proc_pid_stat(5): behind the command in brackets, user and system time in hundredths of a second are the 12th and 13th.
    const [, rest = ''] = /.*\) (.*)/.exec(readFileSync(`/proc/${pid}/stat`, 'utf8')) ?? [];
    const fields = rest.split(' ');
    return 10 * (Number(fields[11]) + Number(fields[12]));
  } catch {
    return 0;
  }
}
