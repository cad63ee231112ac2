// What the loop says to the outside, in order: events are gathered and leave as one message per flush; anything else
// first flushes what was said before it.

import type { GatewayError } from '../errors.ts';
import type { EngineEvent, EngineStats, FromEngine, StepReport } from './messages.ts';

export class Outbox {
  readonly #emit: (message: FromEngine) => void;
  #events: Array<{ id: string; event: EngineEvent }> = [];

  constructor(emit: (message: FromEngine) => void) {
    this.#emit = emit;
  }

  event(id: string, event: EngineEvent): void {
    this.#events.push({ id, event });
  }

  failed(id: string, { code, message }: GatewayError): void {
    this.flush();
    this.#emit({ kind: 'failed', id, code, message });
  }

  step(report: StepReport, stats: EngineStats): void {
    this.flush();
    this.#emit({ kind: 'step', report, stats });
  }

  stats(stats: EngineStats): void {
    this.flush();
    this.#emit({ kind: 'stats', stats });
  }

  flush(): void {
    if (this.#events.length === 0) return;
    const batch = this.#events;
    this.#events = [];
    this.#emit({ kind: 'events', batch });
  }
}
