// The share of time that a trainer may compute, kept by resting after each piece of it. Rests end early when the share changes
// or the trainer is told to stop. However small the share: a job comes to its end, because it always has `leastShare` of one
// core. That is counted in CPU time: serving is then so busy that a piece waits for the cores most of the time it takes.

export interface PacerClock {
  /** Monotonic. */
  nowMs(): number;
  /** Of all threads of this process. */
  cpuMs(): number;
  /** Calls back once after `ms`; the returned function cancels it. */
  after(ms: number, callback: () => void): () => void;
}

/** A guess: serving loses no more, and a job takes at most fifty times its CPU time, as far as the system gives it that. */
export const leastShare = 0.02;
const restMsMax = 60_000;

export class Pacer {
  readonly #clock: PacerClock;
  #share = 1;
  #isStopped = false;
  /** When the piece that is being computed began, by both clocks. */
  #sinceMs: number;
  #sinceCpuMs: number;
  #endRest: () => void = () => {};

  constructor(clock: PacerClock) {
    this.#clock = clock;
    this.#sinceMs = clock.nowMs();
    this.#sinceCpuMs = clock.cpuMs();
  }

  /** 0…1. */
  setShare(share: number): void {
    this.#share = share;
    this.#endRest();
  }

  stop(): void {
    this.#isStopped = true;
    this.#endRest();
  }

  /** After a piece of computing: resolves when the next one may begin, or must not. */
  async breathe(): Promise<'go' | 'stop'> {
    const computedMs = this.#clock.nowMs() - this.#sinceMs;
    const cpuMs = this.#clock.cpuMs() - this.#sinceCpuMs;
    await this.#rest(0); // Messages are read between two turns of the event loop.
    while (!this.#isStopped) {
      // By the present share: it may have changed during the rest.
      const wholeMs = this.#share === 0 ? Infinity : computedMs / this.#share;
      const dueMs = this.#sinceMs + Math.min(wholeMs, cpuMs / leastShare);
      const leftMs = dueMs - this.#clock.nowMs();
      if (leftMs <= 0) break;
      await this.#rest(Math.min(leftMs, restMsMax));
    }
    this.#sinceMs = this.#clock.nowMs();
    this.#sinceCpuMs = this.#clock.cpuMs();
    return this.#isStopped ? 'stop' : 'go';
  }

  #rest(ms: number): Promise<void> {
    return new Promise((resolve) => {
      const cancel = this.#clock.after(ms, resolve);
      this.#endRest = () => {
        cancel();
        resolve();
      };
    });
  }
}
