// All requests that are in flight, and which of them may be with the engine now. What a flight holds is all that a new
// engine needs to go on where the old one stopped. After a death those that were computing are suspects: they come back
// one at a time, each alone until its next token, so that a second death convicts one request and not those that only ran
// beside it.

import { GatewayError } from '../errors.ts';
import type { EventStream } from './event-stream.ts';
import type { EngineEvent, GenerateRequest, RankChange, ToEngine, Urgency } from './messages.ts';

/** Deaths without a token between after which a request is taken for their cause. */
const strikesMax = 2;
/** Deaths under one request in all: nothing is retried for ever. Guess. */
const deathsMax = 10;

export interface FlightOptions {
  readonly request: GenerateRequest;
  /** Its name in the messages: a caller may use an id again while the last events of the first are under way. */
  readonly wireId: string;
  readonly stream: EventStream;
  readonly submittedMs: number;
  /** Called once, however it ends. */
  readonly onLand: () => void;
}

/** One request on the gateway's side of the channel. */
export class Flight {
  readonly wireId: string;
  /** `held`: not with the engine. `sent`: waits there. `computing`: has its cells; a death now is counted. */
  state: 'held' | 'sent' | 'computing' = 'held';
  /** Deaths while computing, and those of them since its last token. */
  deaths = 0;
  strikes = 0;
  readonly #options: FlightOptions;
  readonly #generated: number[] = [];
  readonly #rankChanges: RankChange[] = [];
  #isStarted = false;
  #firstTokenMs: number | null = null;

  constructor(options: FlightOptions) {
    this.#options = options;
    this.wireId = options.wireId;
  }

  /** What the engine is asked: from the start, or from the tokens that were delivered, all of them with their text. */
  message(nowMs: number): ToEngine {
    const { request } = this.#options;
    return {
      kind: 'submit',
      request: { ...request, id: this.wireId, urgency: this.#urgency(nowMs) },
      generated: Int32Array.from(this.#generated),
      rankChanges: this.#rankChanges,
    };
  }

  /** Passes an event on. True when it brought a token. */
  deliver(event: EngineEvent, nowMs: number): boolean {
    const { stream, onLand } = this.#options;
    if (event.kind === 'piece') {
      for (const { token } of event.tokens) this.#generated.push(token);
      stream.push(event);
      if (event.tokens.length === 0) return false;
      this.strikes = 0;
      this.#firstTokenMs ??= nowMs;
      return true;
    }
    if (event.kind === 'rank') {
      this.#rankChanges.push({ afterTokens: this.#generated.length, rank: event.rank });
      stream.push(event);
      return false;
    }
    if (event.kind === 'end' || !this.#isStarted) stream.push(this.#restamp(event, nowMs));
    this.#isStarted = true;
    this.state = 'computing';
    if (event.kind === 'end') onLand();
    return false;
  }

  fail(error: GatewayError): void {
    this.#options.stream.fail(error);
    this.#options.onLand();
  }

  /** What is left of its times: an engine counts from when it was asked. */
  #urgency(nowMs: number): Urgency {
    const { request, submittedMs } = this.#options;
    const { deadlineMs, ttftMs, ...rest } = request.urgency;
    const left = (ms: number | null): number | null =>
      ms === null ? null : ms - (nowMs - submittedMs);
    const hasBegun = this.#firstTokenMs !== null;
    return { ...rest, deadlineMs: left(deadlineMs), ttftMs: hasBegun ? null : left(ttftMs) };
  }

  /** The engine that ended it knows only its own life; the reader waited through all of them. */
  #restamp(event: EngineEvent & { readonly kind: 'start' | 'end' }, nowMs: number): EngineEvent {
    if (this.deaths === 0) return event;
    const totalMs = nowMs - this.#options.submittedMs;
    if (event.kind === 'start') return { ...event, queueMs: totalMs };
    const ttftMs = (this.#firstTokenMs ?? nowMs) - this.#options.submittedMs;
    return { ...event, ttftMs, totalMs };
  }
}

export class FlightTable {
  readonly #flights: Map<string, Flight> = new Map();
  /** Were computing at a death and have had no token since. Only the first may be with the engine. */
  #suspects: Flight[] = [];
  #onEmpty: () => void = () => {};

  get size(): number {
    return this.#flights.size;
  }

  /** Requests that have their cells. */
  get running(): number {
    let count = 0;
    for (const flight of this.#flights.values()) if (flight.state === 'computing') count += 1;
    return count;
  }

  /** Whether the engine has anything to do. */
  get isBusy(): boolean {
    for (const flight of this.#flights.values()) if (flight.state !== 'held') return true;
    return false;
  }

  add(flight: Flight): void {
    this.#flights.set(flight.wireId, flight);
  }

  find(wireId: string): Flight | undefined {
    return this.#flights.get(wireId);
  }

  remove(flight: Flight): void {
    this.#flights.delete(flight.wireId);
    this.clear(flight);
    if (this.#flights.size === 0) this.#onEmpty();
  }

  /** It made a token: no suspect any more. */
  clear(flight: Flight): void {
    this.#suspects = this.#suspects.filter((one) => one !== flight);
  }

  /** Held requests that may go to the engine now, oldest first. */
  due(): Flight[] {
    const suspect = this.#suspects[0];
    const candidates = suspect === undefined ? [...this.#flights.values()] : [suspect];
    return candidates.filter((flight) => flight.state === 'held');
  }

  /** The engine died: everything is held again, and whom it has happened to too often is refused. */
  strike(): void {
    for (const flight of [...this.#flights.values()]) {
      const wasComputing = flight.state === 'computing';
      flight.state = 'held';
      if (!wasComputing) continue;
      flight.deaths += 1;
      flight.strikes += 1;
      if (flight.strikes >= strikesMax || flight.deaths >= deathsMax) {
        const message = `the engine died ${flight.deaths} times under this request`;
        flight.fail(new GatewayError('ENGINE_POISONED', message));
      } else if (!this.#suspects.includes(flight)) this.#suspects.push(flight);
    }
  }

  failAll(error: GatewayError): void {
    for (const flight of [...this.#flights.values()]) flight.fail(error);
  }

  /** Calls back once nothing is in flight, at once when nothing is. */
  whenEmpty(callback: () => void): void {
    this.#onEmpty = callback;
    if (this.#flights.size === 0) callback();
  }
}
