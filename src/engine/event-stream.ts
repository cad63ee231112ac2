// One sequence's events on their way to whoever reads them: a bounded queue with one writer and one reader. The writer
// never waits (a stalled reader must not hold the engine's other streams); a reader that falls too far behind loses its
// sequence instead. Ends by `end`, by `fail`, or by the reader leaving.

import { GatewayError } from '../errors.ts';
import type { EngineEvent } from './messages.ts';

interface Waiter {
  readonly resolve: (result: IteratorResult<EngineEvent, void>) => void;
  readonly reject: (error: unknown) => void;
}

const finished: IteratorResult<EngineEvent, void> = { done: true, value: undefined };

export class EventStream implements AsyncIterable<EngineEvent> {
  readonly #eventsMax: number;
  /** Called once when the reader leaves before the end, or has fallen too far behind. */
  readonly #onAbandon: () => void;
  #queue: EngineEvent[] = [];
  #waiters: Waiter[] = [];
  #failure: GatewayError | null = null;
  #isOver = false;

  constructor(eventsMax: number, onAbandon: () => void) {
    this.#eventsMax = eventsMax;
    this.#onAbandon = onAbandon;
  }

  /** True once nothing can be pushed any more. */
  get isOver(): boolean {
    return this.#isOver;
  }

  push(event: EngineEvent): void {
    if (this.#isOver) return;
    if (event.kind === 'end') this.#isOver = true;
    const waiter = this.#waiters.shift();
    if (waiter !== undefined) {
      waiter.resolve({ done: false, value: event });
    } else if (this.#queue.length < this.#eventsMax || event.kind === 'end') {
      this.#queue.push(event);
    } else {
      this.#abandon(
        new GatewayError('CANCELLED', `the reader is ${this.#queue.length} events behind`),
      );
      return;
    }
    if (this.#isOver) this.#settleWaiters();
  }

  /** Events already queued are still delivered first; then the reader gets the error. */
  fail(error: GatewayError): void {
    if (this.#isOver) return;
    this.#isOver = true;
    this.#failure = error;
    this.#settleWaiters();
  }

  /** For an aborted signal: what is queued is of no use to anybody. */
  cancel(): void {
    if (this.#isOver) return;
    this.#abandon(new GatewayError('CANCELLED', 'cancelled by the caller'));
  }

  [Symbol.asyncIterator](): AsyncIterator<EngineEvent, void> {
    return {
      next: () => this.#next(),
      return: () => {
        this.cancel();
        this.#failure = null;
        this.#queue = [];
        return Promise.resolve(finished);
      },
    };
  }

  #next(): Promise<IteratorResult<EngineEvent, void>> {
    const event = this.#queue.shift();
    if (event !== undefined) return Promise.resolve({ done: false, value: event });
    if (!this.#isOver) {
      return new Promise((resolve, reject) => this.#waiters.push({ resolve, reject }));
    }
    const failure = this.#failure;
    this.#failure = null; // told once; after that the iterator is simply done
    return failure === null ? Promise.resolve(finished) : Promise.reject(failure);
  }

  #abandon(error: GatewayError): void {
    this.#isOver = true;
    this.#failure = error;
    this.#queue = [];
    this.#onAbandon();
    this.#settleWaiters();
  }

  #settleWaiters(): void {
    for (const waiter of this.#waiters.splice(0)) {
      if (this.#failure === null) {
        waiter.resolve(finished);
      } else {
        waiter.reject(this.#failure);
        this.#failure = null;
      }
    }
  }
}
