// Time that passes only when somebody says so: the stepper for as long as a step takes, the simulation when nothing is
// left to do before the next event. What is due runs at its own time, earliest first, then in the order of its call.

import type { EngineClock } from '../../../src/engine/clock.ts';

interface Timer {
  readonly dueMs: number;
  readonly callback: () => void;
}

export class SimulatedClock implements EngineClock {
  #nowMs = 0;
  /** Latest first. Few: the next arrival, and files that are being read. */
  readonly #timers: Timer[] = [];

  nowMs(): number {
    return this.#nowMs;
  }

  after(ms: number, callback: () => void): () => void {
    return this.at(this.#nowMs + ms, callback);
  }

  at(dueMs: number, callback: () => void): () => void {
    const timer = { dueMs, callback };
    let index = this.#timers.length;
    while (index > 0 && this.#timers[index - 1]!.dueMs <= dueMs) index -= 1;
    this.#timers.splice(index, 0, timer);
    return () => {
      const found = this.#timers.indexOf(timer);
      if (found >= 0) this.#timers.splice(found, 1);
    };
  }

  advance(ms: number): void {
    const untilMs = this.#nowMs + ms;
    while (this.#timers.length > 0 && this.#timers.at(-1)!.dueMs <= untilMs) this.#fire();
    this.#nowMs = Math.max(this.#nowMs, untilMs);
  }

  /** False when there is nothing to wait for. */
  advanceToNext(): boolean {
    if (this.#timers.length === 0) return false;
    this.#fire();
    return true;
  }

  #fire(): void {
    const { dueMs, callback } = this.#timers.pop()!;
    this.#nowMs = Math.max(this.#nowMs, dueMs);
    callback();
  }
}
