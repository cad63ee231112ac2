// One side in a child process of its own, as the parent sees it. All sides are Node processes of the same program
// (child.ts), so that start-up, garbage collector and timers are the same; only one of them works at a time.

import { type ChildProcess, fork } from 'node:child_process';
import { join } from 'node:path';
import type { Job, JobResult, SideOptions } from './job.ts';

export type SideName = 'llamacpp' | 'node-llama-cpp' | 'rankgate' | 'engine';

export type ToChild =
  | { readonly kind: 'open'; readonly side: SideName; readonly options: SideOptions }
  | { readonly kind: 'run'; readonly job: Job }
  | { readonly kind: 'close' };

export type FromChild =
  | { readonly kind: 'opened'; readonly description: string }
  | { readonly kind: 'result'; readonly result: JobResult }
  | { readonly kind: 'failed'; readonly message: string };

/** Longest that one job or opening may take before the benchmark gives up. */
const answerMsMax = 600_000;

export class SideProcess {
  readonly name: SideName;
  description = '';
  readonly #child: ChildProcess;

  private constructor(name: SideName) {
    this.name = name;
    this.#child = fork(join(import.meta.dirname, 'child.ts'), {
      execArgv: ['--import', 'tsx'],
      // node-llama-cpp's postinstall is off; nothing else reads the environment.
      stdio: ['ignore', 'ignore', 'inherit', 'ipc'],
    });
  }

  static async open(name: SideName, options: SideOptions): Promise<SideProcess> {
    const side = new SideProcess(name);
    try {
      const answer = await side.#ask({ kind: 'open', side: name, options });
      if (answer.kind === 'opened') side.description = answer.description;
      return side;
    } catch (error) {
      side.#child.kill('SIGKILL'); // its channel would keep this process alive
      throw error;
    }
  }

  async run(job: Job): Promise<JobResult> {
    const answer = await this.#ask({ kind: 'run', job });
    if (answer.kind !== 'result') throw new Error(`${this.name}: ${answer.kind} is no result`);
    return answer.result;
  }

  #ask(message: ToChild): Promise<FromChild> {
    const child = this.#child;
    return new Promise((resolve, reject) => {
      const settle = (end: () => void): void => {
        clearTimeout(timer);
        child.off('message', onMessage);
        child.off('exit', onExit);
        end();
      };
      const onMessage = (answer: FromChild): void => {
        settle(() =>
          answer.kind === 'failed'
            ? reject(new Error(`${this.name}: ${answer.message}`))
            : resolve(answer),
        );
      };
      const onExit = (code: number | null, signal: string | null): void =>
        settle(() => reject(new Error(`${this.name}: ended with ${code ?? signal}`)));
      const timer = setTimeout(() => {
        child.kill('SIGKILL');
      }, answerMsMax);
      child.on('message', onMessage);
      child.once('exit', onExit);
      child.send(message);
    });
  }

  async close(): Promise<void> {
    if (this.#child.exitCode !== null || this.#child.signalCode !== null) return;
    const ended = new Promise<void>((resolve) => {
      this.#child.once('exit', () => resolve());
    });
    const timer = setTimeout(() => this.#child.kill('SIGKILL'), 10_000);
    this.#child.send({ kind: 'close' } satisfies ToChild);
    await ended;
    clearTimeout(timer);
  }
}
