// Brings generations into adapter memory between steps: one at a time, a bounded number of bytes a tick, so that a load
// never stops the streams that run (sglang#8162). A finished load keeps a use of its pages until the sequence it was made
// for has its own, else the next load could evict them first and two waiting sequences would load against each other
// for ever. Loads asked for ahead (tickets) and loads that sequences wait for take turns, so that neither starves.

import type { Generation } from '../adapters/adapter.ts';
import type { AdapterLoad, LoadProgress, Residency, ResidentUse } from '../adapters/residency.ts';
import { asGatewayError, GatewayError } from '../errors.ts';

export interface LoadListener {
  /** A file has been read: a tick of the loop would move the load on. */
  readonly wake: () => void;
  /** Whether a sequence waits for the generation. */
  readonly isAwaited: (generation: Generation) => boolean;
  readonly onFailed: (generation: Generation, error: GatewayError) => void;
  /** The answer to a ticket; null: loaded. */
  readonly onTicket: (ticket: number, error: GatewayError | null) => void;
}

interface Ticket {
  readonly generation: Generation;
  readonly ticket: number;
}

type Phase =
  | { readonly kind: 'idle' }
  | { readonly kind: 'loading'; readonly load: AdapterLoad; progress: LoadProgress }
  | { readonly kind: 'held'; readonly use: ResidentUse };

/** Bytes written between two steps. Guess: about a millisecond of memcpy. */
const bytesPerTick = 4 * 1024 * 1024;
const ticketsMax = 1000;

export class AdapterLoader {
  readonly #residency: Residency;
  readonly #listener: LoadListener;
  readonly #tickets: Ticket[] = [];
  #phase: Phase = { kind: 'idle' };
  #isTicketTurn = false;
  /** No load was under way when this tick's admission began. */
  #wasFree = true;

  constructor(residency: Residency, listener: LoadListener) {
    this.#residency = residency;
    this.#listener = listener;
  }

  /** Read, and waiting until sequences that end give pages back. */
  get isBlocked(): boolean {
    return this.#phase.kind === 'loading' && this.#phase.progress === 'no-room';
  }

  /** Waits for a file and will wake the loop itself. */
  get isReading(): boolean {
    return this.#phase.kind === 'loading' && this.#phase.progress === 'reading';
  }

  /** Another tick moves it on whatever else happens. */
  get needsTick(): boolean {
    const { kind } = this.#phase;
    return kind === 'idle' ? this.#tickets.length > 0 : kind === 'loading' && this.#isWriting();
  }

  /** Asks for a generation ahead; answered by onTicket. */
  ask(generation: Generation, ticket: number): void {
    if (this.#tickets.length < ticketsMax) this.#tickets.push({ generation, ticket });
    else this.#listener.onTicket(ticket, new GatewayError('CONTENDED', 'too many loads wait'));
  }

  /** A tick's share of the work, before its admission. */
  beginTick(): void {
    this.#advance();
    this.letGo();
    if (this.#isTicketTurn) this.#wantForTicket();
    this.#wasFree = this.#phase.kind === 'idle';
  }

  /** Starts a load unless one is under way. Admission asks again each tick, most urgent first. */
  want(generation: Generation): void {
    if (this.#phase.kind !== 'idle') return;
    const load = this.#residency.beginLoad(generation, this.#listener.wake);
    this.#phase = { kind: 'loading', load, progress: 'reading' };
    this.#advance();
  }

  /** After admission. */
  endTick(): void {
    if (this.#wasFree && this.#phase.kind !== 'idle') this.#isTicketTurn = true; // a sequence's load came first
    this.#wantForTicket();
    this.letGo();
  }

  /** Frees what nobody waits for any more: a load that no sequence and no ticket wants, and a finished one (its tickets
   *  are settled) that no sequence wants. */
  letGo(): void {
    const phase = this.#phase;
    if (phase.kind === 'held') {
      if (this.#listener.isAwaited(phase.use.generation)) return;
      phase.use.release();
    } else if (phase.kind === 'loading') {
      const { generation } = phase.load;
      const isAsked = this.#tickets.some((one) => one.generation === generation);
      if (isAsked || this.#listener.isAwaited(generation)) return;
      phase.load.abandon();
    }
    this.#phase = { kind: 'idle' };
  }

  #isWriting(): boolean {
    return this.#phase.kind === 'loading' && this.#phase.progress === 'more';
  }

  #wantForTicket(): void {
    const next = this.#tickets[0];
    if (next === undefined || this.#phase.kind !== 'idle') return;
    this.#isTicketTurn = false;
    this.want(next.generation);
  }

  #advance(): void {
    const phase = this.#phase;
    if (phase.kind !== 'loading') return;
    const { generation } = phase.load;
    try {
      phase.progress = phase.load.advance(bytesPerTick);
      if (phase.progress !== 'done') return;
      const use = this.#residency.acquire(generation);
      if (use === null) throw new GatewayError('INTERNAL', 'a loaded adapter is not resident');
      this.#phase = { kind: 'held', use };
      this.#settle(generation, null);
    } catch (error) {
      this.#phase = { kind: 'idle' };
      const failure = asGatewayError(error);
      this.#listener.onFailed(generation, failure);
      this.#settle(generation, failure);
    }
  }

  #settle(generation: Generation, error: GatewayError | null): void {
    const settled = this.#tickets.filter((one) => one.generation === generation);
    const rest = this.#tickets.filter((one) => one.generation !== generation);
    this.#tickets.splice(0, this.#tickets.length, ...rest);
    for (const { ticket } of settled) this.#listener.onTicket(ticket, error);
  }
}
