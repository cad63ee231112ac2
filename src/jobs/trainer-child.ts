// One trainer process: one claim of one job, at a low priority. Knows nothing of the job store.

import { type ChildProcess, fork } from 'node:child_process';
import { writeFileSync } from 'node:fs';
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

  constructor(options: TrainerChildOptions, spec: TrainerSpec, listener: TrainerListener) {
    this.#process = fork(fileURLToPath(options.entry), [JSON.stringify(spec)], {
      serialization: 'advanced',
      execArgv: [...options.execArgv],
      env: { ...options.environment },
      stdio: ['ignore', 'inherit', 'inherit', 'ipc'],
    });
    standBack(this.#process.pid, options.nice);
    this.#process.on('message', (message) => listener.onMessage(message as FromTrainer));
    onChildEnd(this.#process, options.after, listener.onEnd);
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
