// One sequence's events on their way to whoever reads them: a bounded queue with one writer and one reader. The writer
// never waits (a stalled reader must not hold the engine's other streams); a reader that falls too far behind loses its
// sequence instead. Ends by `end`, by `fail`, or by the reader leaving.

import { GatewayError } from '../errors.ts';
import type { EngineEvent } from './messages.ts';

export class EventStream implements AsyncIterable<EngineEvent> {
  readonly #eventsMax: number;
  /** Called once when the reader leaves before the end, or has fallen too far behind. */
  readonly #onAbandon: () => void;
  #queue: EngineEvent[] = [];
  #failure: GatewayError | null = null;
  #isOver = false;
  #wake: () => void = () => {};

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
    else if (this.#queue.length === this.#eventsMax) {
      this.#abandon(`the reader is ${this.#queue.length} events behind`);
      return;
    }
    this.#queue.push(event);
    this.#wake();
  }

  /** Events already queued are still delivered first; then the reader gets the error. */
  fail(error: GatewayError): void {
    if (this.#isOver) return;
    this.#isOver = true;
    this.#failure = error;
    this.#wake();
  }

  /** For an aborted signal: what is queued is of no use to anybody. */
  cancel(): void {
    if (!this.#isOver) this.#abandon('cancelled by the caller');
  }

  [Symbol.asyncIterator](): AsyncIterator<EngineEvent, void> {
    const events = this.#events();
    return {
      next: () => events.next(),
      return: () => {
        this.cancel(); // first: a generator answers return() only after the next() that waits
        this.#queue = [];
        return events.return();
      },
    };
  }

  async *#events(): AsyncGenerator<EngineEvent, void, void> {
    for (;;) {
      const event = this.#queue.shift();
      if (event !== undefined) yield event;
      else if (this.#failure !== null) throw this.#failure;
      else if (this.#isOver) return;
      else {
        await new Promise<void>((resolve) => {
          this.#wake = resolve;
        });
      }
    }
  }

  #abandon(why: string): void {
    this.#queue = [];
    this.fail(new GatewayError('CANCELLED', why));
    this.#onAbandon();
  }
}
