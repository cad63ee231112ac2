// One adapter's way into the engine's memory: its file is read, what it needs beside it comes first (svfit's basis,
// queryable's bank), then pages are written a bounded number of bytes at a time, and it is resident. The same way again
// for more of its ranks.

import { GatewayError } from '../errors.ts';
import type { AtomBank } from '../model/stepper.ts';
import { isBlendKey } from './blend-key.ts';
import type { PackedAdapter } from './pack.ts';
import { checkBase, checkBasis, writePages } from './page-writing.ts';
import {
  type AdapterLoad,
  createResident,
  type DisposalReason,
  type LoadProgress,
  type ResidencyOptions,
  type Resident,
  type ResidentKey,
} from './residency.ts';
import { createRowMaker } from './rows.ts';

/** What a load does to the residency that it belongs to. */
export interface LoadHost {
  readonly options: ResidencyOptions;
  readonly residents: ReadonlyMap<ResidentKey, Resident>;
  readonly loading: Map<ResidentKey, Load>;
  beginLoad(key: ResidentKey, onProgress: () => void, rank: number): AdapterLoad;
  has(resident: Resident, rank: number): boolean;
  /** Whether another blend may have so many pages now. Throws CONTENDED when there are as many as there may be. */
  makeBlendRoom(pages: number): boolean;
  /** null: no room now. */
  takePages(count: number, owner: Resident | null): readonly number[] | null;
  givePages(pages: readonly number[]): void;
  add(resident: Resident): void;
  settle(resident: Resident): void;
  /** null: another is in use. */
  useBank(packed: PackedAdapter<ResidentKey>): AtomBank | null;
}

interface Files {
  readonly packed: PackedAdapter<ResidentKey>;
  readonly bank: PackedAdapter<ResidentKey> | null;
}

type LoadState =
  | { readonly kind: 'reading' }
  | { readonly kind: 'read'; readonly files: Files }
  | { readonly kind: 'needing'; readonly files: Files; readonly basis: AdapterLoad }
  | Writing
  | { readonly kind: 'failed'; readonly error: unknown }
  | { readonly kind: 'done' };

interface Writing {
  readonly kind: 'writing';
  readonly files: Files;
  readonly resident: Resident;
  readonly pages: readonly number[];
  /** Yields the bytes of the file that each module's page took. */
  readonly plan: Iterator<number>;
}

export class Load implements AdapterLoad {
  readonly generation: ResidentKey;
  unloadAtLastUse = false;
  readonly #host: LoadHost;
  readonly #listeners: Array<() => void> = [];
  #rank = 0;
  #state: LoadState = { kind: 'reading' };

  constructor(host: LoadHost, key: ResidentKey) {
    this.#host = host;
    this.generation = key;
    this.#open().then(
      (files) => this.#settle({ kind: 'read', files }),
      (error: unknown) => this.#settle({ kind: 'failed', error }),
    );
  }

  /** One more who waits for it. */
  want(rank: number, onProgress: () => void): void {
    this.#rank = Math.max(this.#rank, rank);
    this.unloadAtLastUse = false;
    this.#listeners.push(onProgress);
  }

  advance(bytesMax: number): LoadProgress {
    try {
      const progress = this.#advance(bytesMax);
      if (progress === 'done') this.#end();
      return progress;
    } catch (error) {
      this.#end('load-failed');
      this.#state = { kind: 'failed', error };
      throw error;
    }
  }

  abandon(): void {
    if (this.#state.kind === 'done' || this.#state.kind === 'failed') return;
    const basis = this.#state.kind === 'needing' ? this.#state.basis : null;
    this.#end('load-abandoned');
    const error = new GatewayError('CANCELLED', `the load of ${this.generation} was abandoned`);
    this.#state = { kind: 'failed', error };
    // Others may wait for the same basis.
    if (basis === null || [...this.#host.loading.values()].some((load) => load.#needs(basis)))
      return;
    basis.abandon();
  }

  #needs(basis: AdapterLoad): boolean {
    return this.#state.kind === 'needing' && this.#state.basis === basis;
  }

  async #open(): Promise<Files> {
    const { open } = this.#host.options;
    const packed = await open(this.generation);
    const { kind, options } = packed.manifest;
    const bank = kind === 'queryable' ? await open(options.needs!) : null;
    return { packed, bank };
  }

  #settle(state: LoadState): void {
    if (this.#state.kind !== 'reading') return; // Abandoned while the file was being read.
    this.#state = state;
    this.#wake();
  }

  #wake(): void {
    for (const listener of this.#listeners) listener();
  }

  #advance(bytesMax: number): LoadProgress {
    if (this.#state.kind === 'read') this.#start(this.#state.files);
    const state = this.#state;
    switch (state.kind) {
      case 'failed':
        throw state.error;
      case 'reading':
      case 'done':
        return state.kind;
      case 'read':
        return 'no-room';
      case 'needing': {
        const progress = state.basis.advance(bytesMax);
        return progress === 'done' ? this.#finishTenant(state.files) : progress;
      }
      case 'writing':
        return this.#write(state, bytesMax);
    }
  }

  /** Leaves the state as it is when there is no room. */
  #start(files: Files): void {
    const { packed, bank } = files;
    const { stepper, baseHash } = this.#host.options;
    for (const one of [packed, bank]) if (one !== null) checkBase(one.manifest, stepper, baseHash);
    const { kind, options, rankMax } = packed.manifest;
    const rank = Math.min(this.#rank, rankMax);
    if (kind === 'bank') throw new GatewayError('ADAPTER_CORRUPT', 'a bank is not an adapter');
    if (kind === 'svfit') {
      const basis = this.#host.beginLoad(options.needs!, () => this.#wake(), rank);
      this.#state = { kind: 'needing', files, basis };
      return;
    }
    if (bank !== null && this.#host.useBank(bank) === null) return;
    const known = this.#host.residents.get(this.generation) ?? null;
    const resident = known ?? createResident(this.generation, this.#partsOf(files));
    const from = resident.pages.length;
    const count = resident.maker.pagesFor(rank) - from;
    const mayTake = !isBlendKey(this.generation) || this.#host.makeBlendRoom(count);
    const pages = mayTake ? this.#host.takePages(count, known) : null;
    if (pages === null) return;
    resident.isGrowing = true;
    const plan = writePages(stepper, packed, from, pages);
    this.#state = { kind: 'writing', files, resident, pages, plan };
  }

  #partsOf({ packed, bank }: Files): Pick<Resident, 'maker' | 'basis' | 'labels'> {
    const used = bank === null ? null : this.#host.useBank(bank);
    if (used !== null && used.r !== packed.manifest.rankMax) {
      const message = `${packed.manifest.rankMax} ranks beside a bank of ${used.r}`;
      throw new GatewayError('ADAPTER_CORRUPT', message);
    }
    const atoms = bank?.floats.get('atoms'); // as many as its own bank has, whatever that has grown to
    const sizes = used === null ? null : { K: atoms!.shape[0]!, dq: used.dq };
    const maker = createRowMaker(packed, this.#host.options.stepper.config.blocks, sizes);
    return { maker, basis: null, labels: packed.floats.get('labels') ?? null };
  }

  #write(state: Writing, bytesMax: number): LoadProgress {
    let bytes = 0;
    while (bytes < bytesMax || bytes === 0) {
      const next = state.plan.next();
      if (next.done !== true) {
        bytes += next.value;
        continue;
      }
      const { resident, files } = state;
      // The bank may have been replaced while pages were written.
      if (files.bank !== null && this.#host.useBank(files.bank) === null) return 'no-room';
      resident.pages.push(...state.pages);
      if (!this.#host.residents.has(this.generation)) this.#host.add(resident);
      resident.isGrowing = false;
      this.#state = { kind: 'read', files };
      if (!this.#host.has(resident, this.#rank)) return 'more'; // More was asked for meanwhile.
      resident.unloadAtLastUse ||= this.unloadAtLastUse;
      this.#state = { kind: 'done' };
      return 'done';
    }
    return 'more';
  }

  #finishTenant(files: Files): LoadProgress {
    const { packed } = files;
    const basis = this.#host.residents.get(packed.manifest.options.needs!);
    const rank = Math.min(this.#rank, packed.manifest.rankMax);
    if (basis === undefined || !this.#host.has(basis, rank)) {
      // Another brought it in, and it left again; or more ranks were asked for meanwhile.
      this.#state = { kind: 'read', files };
      return 'more';
    }
    checkBasis(packed.manifest, basis.maker.manifest);
    const maker = createRowMaker(packed, this.#host.options.stepper.config.blocks);
    const resident =
      this.#host.residents.get(this.generation) ??
      createResident(this.generation, { maker, basis, labels: null });
    resident.unloadAtLastUse ||= this.unloadAtLastUse;
    this.#host.add(resident);
    this.#state = { kind: 'done' };
    return 'done';
  }

  /** Frees what it had taken, when it did not come to its end. */
  #end(reason?: DisposalReason): void {
    if (this.#host.loading.get(this.generation) !== this) return;
    this.#host.loading.delete(this.generation);
    if (reason === undefined) return;
    this.#host.options.onDispose?.(this.generation, reason);
    if (this.#state.kind !== 'writing') return;
    this.#host.givePages(this.#state.pages);
    this.#host.settle(this.#state.resident);
  }
}
