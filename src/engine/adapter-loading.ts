// Brings the generations that sequences wait for into adapter memory: one at a time, a bounded number of bytes a tick, so
// that a load never stops the streams that run (sglang#8162). A finished load keeps a use of its pages until the sequence
// it was made for has its own, else the next load could evict them first and two waiting sequences would load against
// each other for ever.

import type { Generation } from '../adapters/adapter.ts';
import type { AdapterLoad, LoadProgress, Residency, ResidentUse } from '../adapters/residency.ts';
import { asGatewayError, GatewayError } from '../errors.ts';

export interface LoadListener {
  /** A file has been read: a tick of the loop would move the load on. */
  readonly wake: () => void;
  /** Whether a sequence waits for the generation. */
  readonly isAwaited: (generation: Generation) => boolean;
  readonly onFailed: (generation: Generation, error: GatewayError) => void;
}

type Phase =
  | { readonly kind: 'idle' }
  | { readonly kind: 'loading'; readonly load: AdapterLoad; progress: LoadProgress }
  | { readonly kind: 'held'; readonly use: ResidentUse };

/** Bytes written between two steps: 3 ms (measured 0.25 ms per MB), and rank 16 of the default model (9.8 MB) at once, so
 *  that its load takes one step: the one during which it is read. */
const bytesPerTick = 12 * 1024 * 1024;

export class AdapterLoader {
  readonly #residency: Residency;
  readonly #listener: LoadListener;
  #phase: Phase = { kind: 'idle' };

  constructor(residency: Residency, listener: LoadListener) {
    this.#residency = residency;
    this.#listener = listener;
  }

  /** Where the load under way stands. `reading`: it will wake the loop itself; `more`: another tick moves it on;
   *  `no-room`: only sequences that end do. */
  get progress(): LoadProgress | null {
    return this.#phase.kind === 'loading' ? this.#phase.progress : null;
  }

  /** Starts a load unless one is under way. Admission asks again each tick, most urgent first. */
  want(generation: Generation): void {
    if (this.#phase.kind !== 'idle') return;
    const load = this.#residency.beginLoad(generation, this.#listener.wake);
    this.#phase = { kind: 'loading', load, progress: 'reading' };
    this.advance();
  }

  /** A tick's share of the work, before its admission. */
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
    } catch (error) {
      this.#phase = { kind: 'idle' };
      this.#listener.onFailed(generation, asGatewayError(error));
    }
  }

  /** Frees what no sequence waits for any more: after admission, and when one is cancelled. Whether it did: the next load
   *  can start. */
  letGo(): boolean {
    const phase = this.#phase;
    if (phase.kind === 'idle') return false;
    const { generation } = phase.kind === 'held' ? phase.use : phase.load;
    if (this.#listener.isAwaited(generation)) return false;
    if (phase.kind === 'held') phase.use.release();
    else phase.load.abandon();
    this.#phase = { kind: 'idle' };
    return true;
  }
}
