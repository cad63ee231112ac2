// Which adapters are in the engine's memory: pages of a Stepper handed to generations, use counts, eviction of the unused.
// Pure bookkeeping apart from the Stepper's memory; the engine's loop owns it and calls it between steps only.
//
// A resident has the pages of its first ranks, as many as were asked for; asked for more, it grows while it is in use.
// svfit's adapters have no pages: they are numbers beside the pages of their basis, which is a resident of its own.
//
// Invariants (faults.md section 2): a page with a use is never reassigned (I2); uses are zero when nobody holds one (I3);
// ranks are handed out only when every module of their pages was written, zeroes included; page 0 is nobody's.

import { LRUCache } from 'lru-cache';
import { GatewayError } from '../errors.ts';
import { projections } from '../model/decoder-config.ts';
import type { AdapterRows, AtomBank, Stepper } from '../model/stepper.ts';
import { type Generation, type PackedKind, pageRanks } from './adapter.ts';
import { Load, type LoadHost } from './adapter-load.ts';
import { type BlendKey, isBlendKey } from './blend-key.ts';
import type { Floats, PackedAdapter } from './pack.ts';
import { atomBankOf, beginsWith, type PageMemory } from './page-writing.ts';
import type { RowMaker, RowsSource } from './rows.ts';

/** What can be resident: a packed file, or what is made of several when it is asked for. */
export type ResidentKey = Generation | BlendKey;

/** Why a generation left the memory: room was needed, it was unloaded, what it needs left, or its load ended early. */
export type DisposalReason =
  | 'evicted'
  | 'unloaded'
  | 'basis-evicted'
  | 'bank-replaced'
  | 'load-abandoned'
  | 'load-failed';

/** The right to use a generation's rows until `release`, which is idempotent. */
export interface ResidentUse extends RowsSource, Disposable {
  readonly generation: ResidentKey;
  readonly kind: PackedKind;
  readonly rankMax: number;
  /** Share of energy kept at rank k (index k-1). */
  readonly rankCurve: readonly number[];
  /** queryable: [K, width], the token embeddings' mean of each atom's label. */
  readonly labels: Floats | null;
  /** The same object for the same rank while it is kept. Throws INTERNAL for a rank that is not loaded. */
  rows(rank: number): AdapterRows;
  /** What was acquired is; more may be. */
  isLoaded(rank: number): boolean;
  release(): void;
}

/** `reading`: the file is not in memory yet (`onProgress` tells when to come back). `no-room`: every page is in use or
 *  being loaded, or another atom bank is in use; come back after a release. `more`: written in part. `done`: resident,
 *  acquire it now. */
export type LoadProgress = 'reading' | 'no-room' | 'more' | 'done';

export interface AdapterLoad {
  readonly generation: ResidentKey;
  /** Writes modules until `bytesMax` is reached, one at least. Throws ADAPTER_NOT_FOUND, ADAPTER_CORRUPT, BASE_MISMATCH,
   *  UNSUPPORTED (more pages than the engine has; a bank beside a pinned one) or NO_CAPACITY (all that is left is pinned);
   *  the load is over then and a later beginLoad starts afresh. */
  advance(bytesMax: number): LoadProgress;
  /** Ends the load for everyone who waits for it and frees its pages. No effect once it is done. */
  abandon(): void;
}

export interface ResidentState {
  readonly generation: ResidentKey;
  /** Ranks that are loaded. */
  readonly rank: number;
  readonly bytes: number;
  readonly uses: number;
}

export interface Residency {
  readonly pagesMax: number;
  readonly pagesFree: number;
  /** Pages that are free, or held by what is neither in use, nor pinned, nor to be kept. */
  pagesSpare(keep: ReadonlySet<ResidentKey>): number;
  /** null when the first `rank` ranks (all, when absent) are not resident: never, evicted, still loading. */
  acquire(generation: ResidentKey, rank?: number): ResidentUse | null;
  /** One load per generation: a second call returns the first's, which goes on to the larger rank. What is resident
   *  answers `done` at once, and is kept although it was to be unloaded. `onProgress` is called when the file has been
   *  read or failed to be. Throws CONTENDED for a blend beyond those that may be there. */
  beginLoad(generation: ResidentKey, onProgress: () => void, rank?: number): AdapterLoad;
  /** Forgets a resident generation at its last use, at once when there is none. One that is loading is forgotten after
   *  the use that it is loaded for. */
  unload(generation: ResidentKey): void;
  /** These are not evicted from now on, and no others are kept. */
  pin(generations: readonly Generation[]): void;
  /** Every resident generation, least recently used first. */
  list(): readonly ResidentState[];
}

export interface ResidencyOptions {
  readonly stepper: PageMemory & Pick<Stepper, 'setAtomBank'>;
  /** SHA-256 of the base model file, hex: an adapter that was checked against another is refused. */
  readonly baseHash: string;
  /** Reads and verifies a packed file (pack.ts, readPacked), or makes a blend. */
  readonly open: (generation: ResidentKey) => Promise<PackedAdapter<ResidentKey>>;
  /** Merged blends that are resident at once. */
  readonly blendsMax?: number;
  /** Of what residents keep outside the pages. */
  readonly floatBytesMax?: number;
  readonly onDispose?: (generation: ResidentKey, reason: DisposalReason) => void;
}

export interface Resident {
  readonly key: ResidentKey;
  readonly maker: RowMaker;
  /** Its own, as far as it is loaded. */
  readonly pages: number[];
  /** svfit's basis, whose pages it uses. */
  readonly basis: Resident | null;
  readonly labels: Floats | null;
  readonly rows: LRUCache<number, AdapterRows>;
  uses: number;
  unloadAtLastUse: boolean;
  /** More of its pages are being written: it stays. */
  isGrowing: boolean;
}

/** `covers` gains a bank when it is found to be the beginning of this one. */
type GrowingBank = AtomBank & { readonly covers: Set<string> };

/** Guess: 1,000 svfit adapters of rank 64 of the default model, with their rows, take 108 MB. */
const floatBytesMaxDefault = 256 * 1024 * 1024;
/** Guess. */
const blendsMaxDefault = 32;
/** Ranks whose rows are kept per resident; a sequence keeps its own. */
const rowsKept = 8;

export function createResidency(options: ResidencyOptions): Residency {
  return new PagedResidency(options);
}

class PagedResidency implements Residency, LoadHost {
  readonly pagesMax: number;
  readonly options: ResidencyOptions;
  readonly #free: number[] = [];
  /** Insertion order is the order of last use: a touched entry is deleted and set again. */
  readonly residents: Map<ResidentKey, Resident> = new Map();
  readonly loading: Map<ResidentKey, Load> = new Map();
  #pinned: ReadonlySet<ResidentKey> = new Set();
  #bank: GrowingBank | null = null;

  constructor(options: ResidencyOptions) {
    this.options = options;
    this.pagesMax = options.stepper.pages - 1;
    for (let page = options.stepper.pages - 1; page >= 1; page--) this.#free.push(page);
  }

  get pagesFree(): number {
    return this.#free.length;
  }

  pagesSpare(keep: ReadonlySet<ResidentKey>): number {
    const all = [...this.residents.values()];
    const kept = new Set(all.filter(({ key }) => keep.has(key)).flatMap((one) => [one, one.basis]));
    const others = all.filter((one) => !kept.has(one) && this.#isEvictable(one));
    return this.#free.length + pageCount(others);
  }

  acquire(generation: ResidentKey, rank = Number.POSITIVE_INFINITY): ResidentUse | null {
    const resident = this.residents.get(generation);
    if (resident === undefined || !this.has(resident, rank)) return null;
    const { basis, maker, labels } = resident;
    for (const one of [resident, basis]) {
      if (one === null) continue;
      one.uses += 1;
      this.#touch(one);
    }
    let open = true;
    const release = (): void => {
      if (!open) return;
      open = false;
      for (const one of [resident, basis]) {
        if (one === null) continue;
        one.uses -= 1;
        this.#touch(one);
        this.#unloadIfDue(one);
      }
    };
    return {
      generation,
      kind: maker.manifest.kind,
      rankMax: maker.manifest.rankMax,
      rankCurve: maker.manifest.rankCurve,
      labels,
      moduleCount: this.options.stepper.config.blocks * projections.length,
      rows: (wanted) => rowsOf(resident, wanted),
      isLoaded: (wanted) => this.has(resident, wanted),
      release,
      [Symbol.dispose]: release,
    };
  }

  beginLoad(
    generation: ResidentKey,
    onProgress: () => void,
    rank = Number.POSITIVE_INFINITY,
  ): AdapterLoad {
    const resident = this.residents.get(generation);
    if (resident !== undefined) {
      resident.unloadAtLastUse = false;
      if (this.has(resident, rank)) {
        return { generation, advance: () => 'done', abandon: () => {} };
      }
    }
    const running = this.loading.get(generation);
    if (running !== undefined) {
      running.want(rank, onProgress);
      return running;
    }
    if (isBlendKey(generation)) this.makeBlendRoom(0); // before seconds are spent on merging it
    const load = new Load(this, generation);
    this.loading.set(generation, load);
    load.want(rank, onProgress);
    return load;
  }

  unload(generation: ResidentKey): void {
    const load = this.loading.get(generation);
    if (load !== undefined) load.unloadAtLastUse = true;
    const resident = this.residents.get(generation);
    if (resident === undefined) return;
    resident.unloadAtLastUse = true;
    this.#unloadIfDue(resident);
  }

  pin(generations: readonly Generation[]): void {
    this.#pinned = new Set(generations);
  }

  list(): readonly ResidentState[] {
    return [...this.residents.values()].map((resident) => {
      const { key, uses, maker, pages, basis } = resident;
      return {
        generation: key,
        rank: Math.min(maker.manifest.rankMax, pageRanks * (basis ?? resident).pages.length),
        bytes: pages.length * this.options.stepper.pageBytes + floatBytes(resident),
        uses,
      };
    });
  }

  has({ maker, pages, basis }: Resident, rank: number): boolean {
    const wanted = Math.min(rank, maker.manifest.rankMax);
    return maker.pagesFor(wanted) <= (basis?.pages ?? pages).length;
  }

  /** Evicts the least recently used only when that makes enough room: nothing is thrown away in vain. */
  takePages(count: number, owner: Resident | null): readonly number[] | null {
    const total = count + (owner?.pages.length ?? 0);
    if (total > this.pagesMax) {
      const got = `the adapter has ${total * pageRanks} ranks`;
      const room = `the engine has room for ${this.pagesMax * pageRanks}`;
      throw new GatewayError('UNSUPPORTED', `${got}, ${room}`);
    }
    const others = [...this.residents.values()].filter(
      (resident) => resident !== owner && resident.pages.length > 0,
    );
    const pinned = pageCount(others.filter((resident) => this.#isPinned(resident)));
    if (total > this.pagesMax - pinned) {
      const message = `pinned adapters leave room for ${(this.pagesMax - pinned) * pageRanks} ranks`;
      throw new GatewayError('NO_CAPACITY', message);
    }
    const unused = others.filter((resident) => this.#isEvictable(resident));
    if (this.#free.length + pageCount(unused) < count) return null;
    for (const resident of unused) {
      if (this.#free.length >= count) break;
      this.dispose(resident, 'evicted');
    }
    return this.#free.splice(this.#free.length - count, count).reverse();
  }

  /** What requests merge they think up, without end: blends have a number and, unless there is but one, half of the pages,
   *  and put each other out. Throws CONTENDED while as many as there may be are in use. */
  makeBlendRoom(pages: number): boolean {
    const { blendsMax = blendsMaxDefault } = this.options;
    const left = [...this.residents.values()].filter(({ key }) => isBlendKey(key));
    const unused = left.filter((one) => this.#isEvictable(one));
    const used = left.length - unused.length;
    if (used >= blendsMax) {
      const message = `${used} merged blends are in use, no more are served at once`;
      throw new GatewayError('CONTENDED', message);
    }
    const pagesMax = Math.ceil(this.pagesMax / 2);
    const fits = (): boolean =>
      left.length === 0 || (left.length < blendsMax && pageCount(left) + pages <= pagesMax);
    const gone: Resident[] = [];
    for (const one of unused) {
      if (fits()) break;
      left.splice(left.indexOf(one), 1);
      gone.push(one);
    }
    if (!fits()) return false;
    for (const one of gone) this.dispose(one, 'evicted');
    return true;
  }

  givePages(pages: readonly number[]): void {
    this.#free.push(...pages);
  }

  add(resident: Resident): void {
    this.residents.set(resident.key, resident);
    let bytes = 0;
    for (const one of this.residents.values()) bytes += floatBytes(one);
    for (const one of this.residents.values()) {
      if (bytes <= (this.options.floatBytesMax ?? floatBytesMaxDefault)) break;
      if (one === resident || !this.#isEvictable(one) || floatBytes(one) === 0) continue;
      bytes -= floatBytes(one);
      this.dispose(one, 'evicted');
    }
  }

  /** A load of it has ended. */
  settle(resident: Resident): void {
    resident.isGrowing = false;
    this.#unloadIfDue(resident);
  }

  /** Makes this bank, or the one there that begins with it, the one of the stepper. A bank that is there may grow under
   *  those who use it. null while sequences use an unrelated one. Throws UNSUPPORTED while one of that is pinned. */
  useBank(packed: PackedAdapter<ResidentKey>): AtomBank | null {
    const now = this.#bank;
    if (now !== null && (now.id === packed.generation || now.covers.has(packed.generation))) {
      return now;
    }
    const bank = { ...atomBankOf(packed), covers: new Set<string>() };
    if (now !== null && beginsWith(now, bank)) {
      now.covers.add(bank.id);
      return now;
    }
    if (now !== null && beginsWith(bank, now)) {
      for (const id of [now.id, ...now.covers]) bank.covers.add(id);
    } else if (!this.#dropBankUsers()) {
      return null;
    }
    this.options.stepper.setAtomBank(bank);
    this.#bank = bank;
    return bank;
  }

  /** False: some are in use. */
  #dropBankUsers(): boolean {
    const old = [...this.residents.values()].filter(
      ({ maker }) => maker.manifest.kind === 'queryable',
    );
    if (old.some((resident) => this.#isPinned(resident))) {
      throw new GatewayError('UNSUPPORTED', 'an adapter of another atom bank is pinned');
    }
    if (old.some((resident) => !this.#isEvictable(resident))) return false;
    for (const resident of old) this.dispose(resident, 'bank-replaced');
    return true;
  }

  dispose(resident: Resident, reason: DisposalReason): void {
    this.residents.delete(resident.key);
    this.givePages(resident.pages);
    this.options.onDispose?.(resident.key, reason);
    // None of them is in use: a use of theirs is a use of the basis.
    for (const one of [...this.residents.values()]) {
      if (one.basis === resident) this.dispose(one, 'basis-evicted');
    }
  }

  #touch(resident: Resident): void {
    if (!this.residents.delete(resident.key)) return;
    this.residents.set(resident.key, resident);
  }

  #unloadIfDue(resident: Resident): void {
    const { uses, unloadAtLastUse, isGrowing } = resident;
    if (uses === 0 && unloadAtLastUse && !isGrowing) this.dispose(resident, 'unloaded');
  }

  #isEvictable(resident: Resident): boolean {
    return resident.uses === 0 && !resident.isGrowing && !this.#isPinned(resident);
  }

  #isPinned(resident: Resident): boolean {
    if (this.#pinned.has(resident.key)) return true;
    if (resident.maker.manifest.kind !== 'basis') return false;
    return [...this.residents.values()].some(
      (one) => one.basis === resident && this.#pinned.has(one.key),
    );
  }
}

function pageCount(residents: readonly Resident[]): number {
  return residents.reduce((sum, { pages }) => sum + pages.length, 0);
}

/** Numbers of its own beside pages, and the rows that were made of them. */
function floatBytes({ maker, rows }: Resident): number {
  return maker.bytes + rows.calculatedSize;
}

function rowsOf(resident: Resident, rank: number): AdapterRows {
  const known = resident.rows.get(rank);
  if (known !== undefined) return known;
  const { maker, basis, pages: own } = resident;
  const count = maker.pagesFor(rank);
  const pages = (basis?.pages ?? own).slice(0, count);
  if (!(rank >= 1 && rank <= maker.manifest.rankMax) || pages.length < count) {
    throw new GatewayError('INTERNAL', `rank ${rank} of ${resident.key} is not resident`);
  }
  const rows = maker.make(rank, pages);
  resident.rows.set(rank, rows);
  return rows;
}

export function createResident(
  key: ResidentKey,
  parts: Pick<Resident, 'maker' | 'basis' | 'labels'>,
): Resident {
  const sizeCalculation = ({ gates, routing }: AdapterRows): number =>
    1 + (gates?.byteLength ?? 0) + (routing?.bias.byteLength ?? 0);
  const rows = new LRUCache<number, AdapterRows>({
    max: rowsKept,
    maxSize: 2 ** 30,
    sizeCalculation,
  });
  return { key, ...parts, rows, pages: [], uses: 0, unloadAtLastUse: false, isGrowing: false };
}
