// The share of time that a trainer may compute, kept by resting after each piece of it. Rests end early when the share changes
// or the trainer is told to stop; a share of 0 rests until then.

export interface PacerClock {
  /** Monotonic. */
  nowMs(): number;
  /** Calls back once after `ms`; the returned function cancels it. */
  after(ms: number, callback: () => void): () => void;
}

const restMsMax = 60_000;

export class Pacer {
  readonly #clock: PacerClock;
  #share = 1;
  #isStopped = false;
  /** When the piece that is being computed began. */
  #sinceMs: number;
  #endRest: () => void = () => {};

  constructor(clock: PacerClock) {
    this.#clock = clock;
    this.#sinceMs = clock.nowMs();
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
    const endMs = this.#clock.nowMs();
    const computedMs = endMs - this.#sinceMs;
    await this.#rest(0); // Messages are read between two turns of the event loop.
    while (!this.#isStopped) {
      // By the present share: it may have changed during the rest.
      const restMs = this.#share === 0 ? Infinity : computedMs * (1 / this.#share - 1);
      const leftMs = endMs + restMs - this.#clock.nowMs();
      if (leftMs <= 0) break;
      await this.#rest(Math.min(leftMs, restMsMax));
    }
    this.#sinceMs = this.#clock.nowMs();
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
