// Which adapters are in the engine's memory: pages of a Stepper handed to generations, use counts, eviction of the unused.
// Pure bookkeeping apart from Stepper.writePage; the engine's loop owns it and calls it between steps only.
//
// Invariants (faults.md section 2): a page with a use is never reassigned (I2); uses are zero when nobody holds one (I3);
// a generation is handed out only when every module of every page was written, zeroes included; page 0 is nobody's.

import { GatewayError } from '../errors.ts';
import { type Projection, projectionShape, projections } from '../model/decoder-config.ts';
import type { ModuleRef, Stepper } from '../model/stepper.ts';
import { type AdapterManifest, type Generation, pageRanks } from './adapter.ts';
import type { PackedAdapter } from './pack.ts';

/** Why a generation left the memory: room was needed, it was unloaded, or its load ended early. */
export type DisposalReason = 'evicted' | 'unloaded' | 'load-abandoned' | 'load-failed';

/** The right to read a generation's pages until `release`, which is idempotent. */
export interface ResidentUse extends Disposable {
  readonly generation: Generation;
  /** In rank order: page i holds ranks 8i … 8i+7. A row of rank k needs the first ceil(k / 8). */
  readonly pages: readonly number[];
  readonly rankMax: number;
  release(): void;
}

/** `reading`: the file is not in memory yet (`onProgress` tells when to come back). `no-room`: every page is in use or
 *  being loaded; come back after a release. `more`: written in part. `done`: resident, acquire it now. */
export type LoadProgress = 'reading' | 'no-room' | 'more' | 'done';

export interface AdapterLoad {
  readonly generation: Generation;
  /** Writes modules until `bytesMax` is reached, one at least. Throws ADAPTER_NOT_FOUND, ADAPTER_CORRUPT or UNSUPPORTED
   *  (more pages than the engine has); the load is over then and a later beginLoad starts afresh. */
  advance(bytesMax: number): LoadProgress;
  /** Ends the load for everyone who waits for it and frees its pages. No effect once it is done. */
  abandon(): void;
}

export interface ResidentState {
  readonly generation: Generation;
  readonly rank: number;
  readonly bytes: number;
  readonly uses: number;
}

export interface Residency {
  readonly pagesMax: number;
  readonly pagesFree: number;
  /** null when the generation is not resident (never, evicted, still loading). */
  acquire(generation: Generation): ResidentUse | null;
  /** One load per generation: a second call returns the first's. A resident generation answers `done` at once, and is
   *  kept although it was to be unloaded. `onProgress` is called when the file has been read or failed to be. */
  beginLoad(generation: Generation, onProgress: () => void): AdapterLoad;
  /** Forgets a resident generation at its last use, at once when there is none. One that is loading is forgotten after
   *  the use that it is loaded for. */
  unload(generation: Generation): void;
  /** Every resident generation, least recently used first. */
  list(): readonly ResidentState[];
}

export interface ResidencyOptions {
  readonly stepper: Pick<Stepper, 'config' | 'pages' | 'pageBytes' | 'writePage'>;
  /** SHA-256 of the base model file, hex: an adapter that was checked against another is refused. */
  readonly baseHash: string;
  /** Reads and verifies a packed file (pack.ts, readPacked). */
  readonly open: (generation: Generation) => Promise<PackedAdapter>;
  readonly onDispose?: (generation: Generation, reason: DisposalReason) => void;
}

interface Resident {
  readonly generation: Generation;
  readonly pages: readonly number[];
  readonly rankMax: number;
  uses: number;
  unloadAtLastUse: boolean;
}

interface Loading {
  readonly load: AdapterLoad;
  readonly listeners: Array<() => void>;
  unloadAtLastUse: boolean;
}

export function createResidency(options: ResidencyOptions): Residency {
  return new PagedResidency(options);
}

class PagedResidency implements Residency {
  readonly pagesMax: number;
  readonly #options: ResidencyOptions;
  readonly #free: number[] = [];
  /** Insertion order is the order of last use: a touched entry is deleted and set again. */
  readonly #residents: Map<Generation, Resident> = new Map();
  readonly #loading: Map<Generation, Loading> = new Map();

  constructor(options: ResidencyOptions) {
    this.#options = options;
    this.pagesMax = options.stepper.pages - 1;
    for (let page = options.stepper.pages - 1; page >= 1; page--) this.#free.push(page);
  }

  get pagesFree(): number {
    return this.#free.length;
  }

  acquire(generation: Generation): ResidentUse | null {
    const resident = this.#residents.get(generation);
    if (resident === undefined) return null;
    resident.uses += 1;
    this.#touch(resident);
    let open = true;
    const release = (): void => {
      if (!open) return;
      open = false;
      resident.uses -= 1;
      this.#touch(resident);
      if (resident.uses === 0 && resident.unloadAtLastUse) this.#dispose(resident, 'unloaded');
    };
    const { pages, rankMax } = resident;
    return { generation, pages, rankMax, release, [Symbol.dispose]: release };
  }

  beginLoad(generation: Generation, onProgress: () => void): AdapterLoad {
    const resident = this.#residents.get(generation);
    if (resident !== undefined) {
      resident.unloadAtLastUse = false;
      return { generation, advance: () => 'done', abandon: () => {} };
    }
    const running = this.#loading.get(generation);
    if (running !== undefined) {
      running.unloadAtLastUse = false;
      running.listeners.push(onProgress);
      return running.load;
    }
    const loading: Loading = {
      load: this.#startLoad(generation),
      listeners: [onProgress],
      unloadAtLastUse: false,
    };
    this.#loading.set(generation, loading);
    return loading.load;
  }

  unload(generation: Generation): void {
    const loading = this.#loading.get(generation);
    if (loading !== undefined) loading.unloadAtLastUse = true;
    const resident = this.#residents.get(generation);
    if (resident === undefined) return;
    if (resident.uses === 0) this.#dispose(resident, 'unloaded');
    else resident.unloadAtLastUse = true;
  }

  list(): readonly ResidentState[] {
    return [...this.#residents.values()].map(({ generation, pages, rankMax, uses }) => ({
      generation,
      rank: rankMax,
      bytes: pages.length * this.#options.stepper.pageBytes,
      uses,
    }));
  }

  #startLoad(generation: Generation): AdapterLoad {
    let state: LoadState = { kind: 'reading' };
    const settle = (next: LoadState): void => {
      if (state.kind !== 'reading') return; // Abandoned while the file was being read.
      state = next;
      for (const listener of this.#loading.get(generation)?.listeners ?? []) listener();
    };
    this.#options.open(generation).then(
      (packed) => settle({ kind: 'read', packed }),
      (error: unknown) => settle({ kind: 'failed', error }),
    );
    const advance = (bytesMax: number): LoadProgress => {
      try {
        state = this.#advance(state, bytesMax);
      } catch (error) {
        this.#endLoad(generation, state, 'load-failed');
        state = { kind: 'failed', error };
        throw error;
      }
      if (state.kind === 'writing') return 'more';
      if (state.kind === 'read') return 'no-room';
      if (state.kind === 'reading') return 'reading';
      return 'done';
    };
    const abandon = (): void => {
      if (state.kind === 'done' || state.kind === 'failed') return;
      this.#endLoad(generation, state, 'load-abandoned');
      const error = new GatewayError('CANCELLED', `the load of ${generation} was abandoned`);
      state = { kind: 'failed', error };
    };
    return { generation, advance, abandon };
  }

  /** The state after writing up to `bytesMax`; `read` again when there is no room. */
  #advance(state: LoadState, bytesMax: number): LoadState {
    if (state.kind === 'failed') throw state.error;
    if (state.kind === 'reading' || state.kind === 'done') return state;
    const writing = state.kind === 'read' ? this.#startWriting(state.packed) : state;
    if (writing === null) return state;
    let bytes = 0;
    while (bytes < bytesMax || bytes === 0) {
      const next = writing.plan.next();
      if (next.done === true) return this.#finish(writing);
      bytes += next.value;
    }
    return writing;
  }

  #startWriting(packed: PackedAdapter): Writing | null {
    checkBase(packed.manifest, this.#options);
    const pages = this.#takePages(packed.pages);
    if (pages === null) return null;
    return { kind: 'writing', packed, pages, plan: writePages(this.#options, packed, pages) };
  }

  #finish(writing: Writing): LoadState {
    const { generation, manifest } = writing.packed;
    const unloadAtLastUse = this.#loading.get(generation)?.unloadAtLastUse ?? false;
    this.#loading.delete(generation);
    this.#residents.set(generation, {
      generation,
      pages: writing.pages,
      rankMax: manifest.rankMax,
      uses: 0,
      unloadAtLastUse,
    });
    return { kind: 'done' };
  }

  /** Evicts the least recently used only when that makes enough room: nothing is thrown away in vain. */
  #takePages(count: number): readonly number[] | null {
    if (count > this.pagesMax) {
      const got = `the adapter has ${count * pageRanks} ranks`;
      throw new GatewayError(
        'UNSUPPORTED',
        `${got}, the engine has room for ${this.pagesMax * pageRanks}`,
      );
    }
    const unused = [...this.#residents.values()].filter((resident) => resident.uses === 0);
    const evictable = unused.reduce((sum, resident) => sum + resident.pages.length, 0);
    if (this.#free.length + evictable < count) return null;
    for (const resident of unused) {
      if (this.#free.length >= count) break;
      this.#dispose(resident, 'evicted');
    }
    return this.#free.splice(this.#free.length - count, count).reverse();
  }

  #touch(resident: Resident): void {
    this.#residents.delete(resident.generation);
    this.#residents.set(resident.generation, resident);
  }

  #endLoad(generation: Generation, state: LoadState, reason: DisposalReason): void {
    if (state.kind === 'writing') this.#free.push(...state.pages);
    if (this.#loading.delete(generation)) this.#options.onDispose?.(generation, reason);
  }

  #dispose(resident: Resident, reason: DisposalReason): void {
    this.#residents.delete(resident.generation);
    this.#free.push(...resident.pages);
    this.#options.onDispose?.(resident.generation, reason);
  }
}

interface Writing {
  readonly kind: 'writing';
  readonly packed: PackedAdapter;
  readonly pages: readonly number[];
  /** Yields the bytes of the file that each module's page took. */
  readonly plan: Iterator<number>;
}

type LoadState =
  | { readonly kind: 'reading' }
  | { readonly kind: 'read'; readonly packed: PackedAdapter }
  | Writing
  | { readonly kind: 'failed'; readonly error: unknown }
  | { readonly kind: 'done' };

/** Every module of the base, also those that the adapter lacks: the pages may hold another adapter's ranks. */
function* writePages(
  { stepper }: ResidencyOptions,
  packed: PackedAdapter,
  pages: readonly number[],
): Generator<number, void> {
  const bytes = moduleBytes(stepper);
  for (const [index, page] of pages.entries()) {
    for (const module of allModules(stepper)) {
      stepper.writePage(page, module, packed.page(module, index));
      yield bytes(module);
    }
  }
}

/** Shapes again, although import checked them: a wrong page would be written over a neighbour's memory. */
function checkBase(manifest: AdapterManifest, { stepper, baseHash }: ResidencyOptions): void {
  if (manifest.baseHash !== baseHash) {
    throw new GatewayError(
      'BASE_MISMATCH',
      `the adapter is for base ${manifest.baseHash}, the engine runs ${baseHash}`,
    );
  }
  for (const { block, projection, in: width, out } of manifest.modules) {
    const want = projectionShape(stepper.config, projection);
    if (block < stepper.config.blocks && width === want.in && out === want.out) continue;
    throw new GatewayError(
      'BASE_MISMATCH',
      `blk.${block}.${projection}: got ${width} → ${out}, the base has ${want.in} → ${want.out} ` +
        `and ${stepper.config.blocks} blocks`,
    );
  }
}

function allModules({ config }: Pick<Stepper, 'config'>): readonly ModuleRef[] {
  const modules: ModuleRef[] = [];
  for (let block = 0; block < config.blocks; block++) {
    for (const projection of projections) modules.push({ block, projection });
  }
  return modules;
}

function moduleBytes({ config }: Pick<Stepper, 'config'>): (module: ModuleRef) => number {
  const sizes = new Map<Projection, number>();
  for (const projection of projections) {
    const shape = projectionShape(config, projection);
    sizes.set(projection, 2 * pageRanks * (shape.in + shape.out));
  }
  return ({ projection }) => sizes.get(projection) ?? 0;
}
