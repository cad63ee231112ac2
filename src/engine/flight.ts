// One request on the gateway's side of the channel: its stream, the tokens its reader has been given, and how often the
// engine died under it. What is here is all that a new engine needs to go on where the old one stopped.

import type { GatewayError } from '../errors.ts';
import type { EventStream } from './event-stream.ts';
import type { EngineEvent, GenerateRequest, ToEngine } from './messages.ts';

export interface FlightOptions {
  readonly request: GenerateRequest;
  /** Its name in the messages: a caller may use an id again while the last events of the first are under way. */
  readonly wireId: string;
  readonly stream: EventStream;
  readonly submittedMs: number;
  /** Called once, however it ends. */
  readonly onLand: () => void;
}

export class Flight {
  readonly request: GenerateRequest;
  readonly wireId: string;
  /** `held`: not with the engine. `sent`: waits there. `computing`: has its cells; a death now is counted. */
  state: 'held' | 'sent' | 'computing' = 'held';
  /** Deaths while computing, and those of them since its last token. */
  deaths = 0;
  strikes = 0;
  readonly #stream: EventStream;
  readonly #submittedMs: number;
  readonly #onLand: () => void;
  readonly #generated: number[] = [];
  #isStarted = false;
  #firstTokenMs: number | null = null;

  constructor(options: FlightOptions) {
    this.request = options.request;
    this.wireId = options.wireId;
    this.#stream = options.stream;
    this.#submittedMs = options.submittedMs;
    this.#onLand = options.onLand;
  }

  /** What the engine is asked: from the start, or from the tokens that were delivered, all of them with their text. */
  message(): ToEngine {
    const request = { ...this.request, id: this.wireId };
    return { kind: 'submit', request, generated: Int32Array.from(this.#generated) };
  }

  /** Passes an event on. True when it brought a token. */
  deliver(event: EngineEvent, nowMs: number): boolean {
    switch (event.kind) {
      case 'start':
        this.state = 'computing';
        if (!this.#isStarted)
          this.#stream.push(this.#isResumed() ? this.#restamp(event, nowMs) : event);
        this.#isStarted = true;
        return false;
      case 'piece':
        for (const { token } of event.tokens) this.#generated.push(token);
        if (event.tokens.length > 0) {
          this.strikes = 0;
          this.#firstTokenMs ??= nowMs;
        }
        this.#stream.push(event);
        return event.tokens.length > 0;
      case 'end':
        this.#stream.push(this.#isResumed() ? this.#restamp(event, nowMs) : event);
        this.#onLand();
        return false;
    }
  }

  fail(error: GatewayError): void {
    this.#stream.fail(error);
    this.#onLand();
  }

  #isResumed(): boolean {
    return this.deaths > 0;
  }

  /** The engine that ended it knows only its own life; the reader waited through all of them. */
  #restamp(event: EngineEvent, nowMs: number): EngineEvent {
    const totalMs = nowMs - this.#submittedMs;
    if (event.kind === 'start') return { ...event, queueMs: totalMs };
    if (event.kind === 'piece') return event;
    const ttftMs = (this.#firstTokenMs ?? nowMs) - this.#submittedMs;
    return { ...event, ttftMs, totalMs };
  }
}
