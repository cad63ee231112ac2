// Brings generations into adapter memory between steps: one at a time, a bounded number of bytes a tick, so that a load
// never stops the streams that run (sglang#8162). A finished load keeps a use of its pages until the sequence it was made
// for has its own, else the next load could evict them first and two waiting sequences would load against each other
// for ever.

import type { Generation } from '../adapters/adapter.ts';
import type { AdapterLoad, LoadProgress, Residency, ResidentUse } from '../adapters/residency.ts';
import { asGatewayError, GatewayError } from '../errors.ts';

export interface LoadListener {
  /** A file has been read: a tick of the loop would move the load on. */
  readonly wake: () => void;
  readonly onLoaded: (generation: Generation) => void;
  readonly onFailed: (generation: Generation, error: GatewayError) => void;
}

/** Who waits for a generation. */
export interface Wants {
  bySequence(generation: Generation): boolean;
  byTicket(generation: Generation): boolean;
}

type Phase =
  | { readonly kind: 'idle' }
  | { readonly kind: 'loading'; readonly load: AdapterLoad; progress: LoadProgress }
  | { readonly kind: 'held'; readonly use: ResidentUse };

/** Bytes written between two steps. Guess: about a millisecond of memcpy. */
const bytesPerTick = 4 * 1024 * 1024;

export class AdapterLoader {
  readonly #residency: Residency;
  readonly #listener: LoadListener;
  #phase: Phase = { kind: 'idle' };

  constructor(residency: Residency, listener: LoadListener) {
    this.#residency = residency;
    this.#listener = listener;
  }

  /** Read, and waiting until sequences that end give pages back. */
  get isBlocked(): boolean {
    return this.#phase.kind === 'loading' && this.#phase.progress === 'no-room';
  }

  /** The next tick moves it on whatever else happens. */
  get isWriting(): boolean {
    return this.#phase.kind === 'loading' && this.#phase.progress === 'more';
  }

  /** Waits for a file and will wake the loop itself. */
  get isReading(): boolean {
    return this.#phase.kind === 'loading' && this.#phase.progress === 'reading';
  }

  get isIdle(): boolean {
    return this.#phase.kind === 'idle';
  }

  /** Starts a load unless one is under way. The loop asks again each tick, in its order of admission. */
  want(generation: Generation): void {
    if (this.#phase.kind !== 'idle') return;
    const load = this.#residency.beginLoad(generation, this.#listener.wake);
    this.#phase = { kind: 'loading', load, progress: 'reading' };
    this.advance();
  }

  /** One tick's share of the work. */
  advance(): void {
    const phase = this.#phase;
    if (phase.kind !== 'loading') return;
    const { generation } = phase.load;
    try {
      phase.progress = phase.load.advance(bytesPerTick);
      if (phase.progress !== 'done') return;
      const use = this.#residency.acquire(generation);
      if (use === null) throw new GatewayError('INTERNAL', 'a loaded adapter is not resident');
      this.#phase = { kind: 'held', use };
      this.#listener.onLoaded(generation);
    } catch (error) {
      this.#phase = { kind: 'idle' };
      this.#listener.onFailed(generation, asGatewayError(error));
    }
  }

  /** Frees what nobody waits for any more: a load that no sequence and no ticket wants, and a finished one (its tickets
   *  are settled) that no sequence wants. */
  letGo(wants: Wants): void {
    const phase = this.#phase;
    if (phase.kind === 'held') {
      if (wants.bySequence(phase.use.generation)) return;
      phase.use.release();
    } else if (phase.kind === 'loading') {
      const { generation } = phase.load;
      if (wants.bySequence(generation) || wants.byTicket(generation)) return;
      phase.load.abandon();
    }
    this.#phase = { kind: 'idle' };
  }
}
