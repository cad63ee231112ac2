// When to start the engine again, and when to say that it is down: pauses double with every death until something has been
// produced; five deaths in a minute with nothing produced are a crash loop.

export interface RestartDecision {
  readonly delayMs: number;
  readonly isLoop: boolean;
}

const loopDeaths = 5;
const loopMs = 60_000;

export class RestartPolicy {
  readonly #backoffMsMin: number;
  readonly #backoffMsMax: number;
  /** Times of the deaths since the last token. */
  #deathsMs: number[] = [];

  constructor(options: { readonly backoffMsMin: number; readonly backoffMsMax: number }) {
    this.#backoffMsMin = options.backoffMsMin;
    this.#backoffMsMax = options.backoffMsMax;
  }

  produced(): void {
    this.#deathsMs = [];
  }

  died(nowMs: number): RestartDecision {
    this.#deathsMs = [...this.#deathsMs, nowMs].slice(-loopDeaths);
    const isLoop = this.#deathsMs.length === loopDeaths && nowMs - this.#deathsMs[0]! < loopMs;
    const doubled = this.#backoffMsMin * 2 ** (this.#deathsMs.length - 1);
    return { isLoop, delayMs: isLoop ? this.#backoffMsMax : Math.min(this.#backoffMsMax, doubled) };
  }
}
