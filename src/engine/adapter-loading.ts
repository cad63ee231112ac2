// Brings the adapters that sequences wait for into adapter memory: one at a time, a bounded number of bytes a tick, so
// that a load never stops the streams that run (sglang#8162). Works for one sequence's set at a time and keeps a use of
// what it has of it until the sequence has its own: else the next load could evict the last one and two waiting sequences
// would load against each other for ever. Nobody else holds pages while waiting for more, so no two wait for each other.

import type {
  AdapterLoad,
  LoadProgress,
  Residency,
  ResidentKey,
  ResidentUse,
} from '../adapters/residency.ts';
import { asGatewayError, GatewayError } from '../errors.ts';
import type { HotAdapter } from './messages.ts';

/** What a sequence needs of one resident: its first ranks. */
export interface Want {
  readonly key: ResidentKey;
  readonly rank: number;
}

export interface LoadListener {
  /** A file has been read: a tick of the loop would move the load on. */
  readonly wake: () => void;
  /** Whether a sequence waits for just this set. */
  readonly isAwaited: (set: readonly Want[]) => boolean;
  /** Nobody who wants all of these can have them; less of one of them may be had. */
  readonly onFailed: (set: readonly Want[], error: GatewayError) => void;
}

/** Bytes written between two steps: 3 ms (measured 0.25 ms per MB), and rank 16 of the default model (9.8 MB) at once, so
 *  that its load takes one step: the one during which it is read. */
const bytesPerTick = 12 * 1024 * 1024;

export class AdapterLoader {
  /** Loads of what was hot, and those that a sequence used while they were there. */
  readonly prewarms: { made: number; used: number } = { made: 0, used: 0 };
  readonly #residency: Residency;
  readonly #listener: LoadListener;
  /** Empty: nothing is wanted. */
  #set: readonly Want[] = [];
  #uses: ResidentUse[] = [];
  #load: AdapterLoad | null = null;
  #progress: LoadProgress = 'done';
  #isAfresh = false;
  /** The set is nobody's yet: somebody is expected to want it. */
  #isWarming = false;
  #hot: readonly HotAdapter[] = [];
  /** Prewarmed, and not used yet. */
  readonly #unused: Set<ResidentKey> = new Set();
  /** Of those, the ones that were not tried yet; null: all were. */
  #toWarm: HotAdapter[] | null = null;

  constructor(residency: Residency, listener: LoadListener) {
    this.#residency = residency;
    this.#listener = listener;
  }

  /** Where the load under way stands. `reading`: it will wake the loop itself; `more`: another tick moves it on;
   *  `no-room`: only sequences that end do. */
  get progress(): LoadProgress | null {
    return this.#load === null ? null : this.#progress;
  }

  /** A set that is in, and held until one who awaits it is admitted. */
  get loaded(): readonly Want[] | null {
    return this.#load === null && this.#set.length > 0 ? this.#set : null;
  }

  /** Starts on a set unless one is under way. Admission asks again each tick, most urgent first. */
  want(set: readonly Want[]): void {
    const isOther = set.every(({ key }) => key !== this.#set[0]?.key);
    if (this.#isWarming && isOther) this.#release(); // whoever waits comes first
    if (this.#set.length > 0) return;
    this.#set = set;
    this.advance();
  }

  /** What is to be loaded before anybody wants it, the hottest first, until the next list. */
  prewarm(hot: readonly HotAdapter[]): void {
    this.#hot = hot;
    const residents = new Set(this.#residency.list().map(({ generation }) => generation));
    for (const key of this.#unused) if (!residents.has(key)) this.#unused.delete(key);
    this.#toWarm = [...hot];
    this.#touchHot();
  }

  /** What is hot counts as used just now, the hottest last: it goes last when room is needed. */
  #touchHot(): void {
    for (const { generation, rank } of this.#hot.toReversed()) {
      this.#residency.acquire(generation, rank)?.release();
    }
  }

  /** A sequence was admitted with these. */
  noteUse(set: readonly Want[]): void {
    for (const { key } of set) if (this.#unused.delete(key)) this.prewarms.used += 1;
  }

  /** After a tick's admission: starts on the next that is hot, unless a load is under way. Each is tried once. */
  warm(): void {
    while (this.#toWarm !== null && this.#set.length === 0) {
      const next = this.#toWarm.shift();
      if (next === undefined) {
        this.#toWarm = null;
        this.#touchHot(); // each was touched in its turn
        return;
      }
      const { generation: key, rank, pages } = next;
      const use = this.#residency.acquire(key, rank);
      use?.release();
      const hot = new Set(this.#hot.map((one) => one.generation));
      if (use !== null || this.#residency.pagesSpare(hot) < pages) continue;
      this.want([{ key, rank }]);
      this.#isWarming = this.#set.length > 0;
    }
  }

  /** A tick's share of the work, before its admission. */
  advance(): void {
    try {
      if (this.#load !== null) {
        this.#progress = this.#load.advance(bytesPerTick);
        if (this.#progress === 'no-room' && this.#isWarming) this.#release();
        if (this.#progress !== 'done') return;
        if (this.#isWarming) {
          this.prewarms.made += 1;
          this.#unused.add(this.#load.generation);
        }
        this.#hold();
      }
      this.#load = this.#next();
      // Not advanced at once: this tick has had its bytes. A file that is in memory already would wake nobody.
      this.#progress = 'more';
    } catch (error) {
      const failed = this.#set.slice(this.#uses.length, this.#uses.length + 1);
      this.#load = null;
      this.#release();
      this.#listener.onFailed(failed, asGatewayError(error));
    }
  }

  /** Frees what no sequence waits for any more: after admission, and when one is cancelled. Whether it did: the next load
   *  can start. */
  letGo(): boolean {
    if (this.#set.length === 0 || this.#listener.isAwaited(this.#set)) return false;
    if (this.#isWarming && this.#load !== null) return false;
    this.#release();
    return true;
  }

  /** No sequence runs, so nobody will make room. What is resident may have more ranks than the set wants, and keeps them
   *  while it is held: it is forgotten and loaded again, once. */
  refuse(): void {
    const [set, isAfresh] = [this.#set, this.#isAfresh];
    this.#release();
    if (!isAfresh) {
      for (const { key } of set) this.#residency.unload(key);
      this.want(set);
      this.#isAfresh = true;
      return;
    }
    const message = `the engine has no room for ${set.length} adapters together`;
    this.#listener.onFailed(set, new GatewayError('UNSUPPORTED', message));
  }

  /** Takes what is resident of the set, up to the first that is not: its load. */
  #next(): AdapterLoad | null {
    for (const { key, rank } of this.#set.slice(this.#uses.length)) {
      const use = this.#residency.acquire(key, rank);
      if (use === null) {
        this.#unused.delete(key); // put out, or not enough of it
        return this.#residency.beginLoad(key, this.#listener.wake, rank);
      }
      this.#uses.push(use);
    }
    return null;
  }

  #hold(): void {
    const { key, rank } = this.#set[this.#uses.length]!;
    const use = this.#residency.acquire(key, rank);
    if (use === null) throw new GatewayError('INTERNAL', 'a loaded adapter is not resident');
    this.#uses.push(use);
  }

  #release(): void {
    this.#load?.abandon();
    for (const use of this.#uses) use.release();
    this.#load = null;
    this.#uses = [];
    this.#set = [];
    this.#isAfresh = false;
    this.#isWarming = false;
  }
}

/** Equal for equal sets, in the order of Sequence.wants. */
export function keyOf(set: readonly Want[]): string {
  return set.map(({ key, rank }) => `${key}@${rank}`).join(' ');
}

/** Whether who wants `all` wants no less than `some`. */
export function isWithin(some: readonly Want[], all: readonly Want[]): boolean {
  return some.every(({ key, rank }) => all.some((one) => one.key === key && one.rank >= rank));
}
