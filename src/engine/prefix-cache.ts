// Who owns which cells, and which cells can be used again. A run belongs to one sequence; when the sequence ends its full
// blocks stay as an idle run until somebody needs the room. Identity of a block (design.md section 6): a SHA-256 chain over
// base, adapter use, tenant and tokens, each part length-prefixed; names and page numbers never enter.
// Reuse is by copy (memcpy speed, no compute) or, for an idle run that is wholly a prefix of the prompt, in place.

import { createHash } from 'node:crypto';
import { blockCells, blocksFor, type KvPool, type Run } from './kv-pool.ts';
import type { AdapterUse } from './messages.ts';

/** Everything but the tokens that decides what a cell holds. */
export interface CellIdentity {
  readonly baseHash: string;
  /** null for the base model, which is also what rank 0 of any adapter is. */
  readonly use: AdapterUse | null;
  readonly tenant: string;
}

/** One sequence's cells. `run` may move in meaning only through the cache: grown at admission, shrunk at retirement. */
export interface CellHold {
  readonly run: Run;
  readonly tenant: string;
}

export interface CellAdmission {
  readonly hold: CellHold;
  /** First cell of the run. */
  readonly cellBase: number;
  /** Leading prompt tokens whose cells need no compute; less than the prompt. */
  readonly cachedTokens: number;
  /** First cell of the run to copy `cachedTokens` cells from, before anything else happens; null: they lie in place. */
  readonly copyFrom: number | null;
}

interface Entry extends CellHold {
  /** Keys of the leading full blocks whose cells are computed. */
  keys: string[];
  rootKey: string;
  isIdle: boolean;
  /** Order of last use. */
  tick: number;
}

export interface PrefixCacheOptions {
  readonly pool: KvPool;
  /** Share of the pool that one tenant's idle runs may hold: a flood by one must not empty the others' (B75). */
  readonly tenantShareMax: number;
}

export interface PrefixCounters {
  readonly tokensQueried: number;
  readonly tokensHit: number;
}

export class PrefixCache {
  readonly #pool: KvPool;
  readonly #tenantBlocksMax: number;
  readonly #entries: Set<Entry> = new Set();
  /** Key → entries whose block at that depth is the one named. Chained, so depth and all earlier blocks agree. */
  readonly #index: Map<string, Set<Entry>> = new Map();
  #tick = 0;
  #tokensQueried = 0;
  #tokensHit = 0;

  constructor(options: PrefixCacheOptions) {
    this.#pool = options.pool;
    this.#tenantBlocksMax = Math.floor(options.tenantShareMax * options.pool.blocks);
  }

  counters(): PrefixCounters {
    return { tokensQueried: this.#tokensQueried, tokensHit: this.#tokensHit };
  }

  /** Cells of live sequences; idle runs are free for the taking and do not count. */
  cellsUsed(): number {
    return this.#cells((entry) => !entry.isIdle);
  }

  /** Cells kept for reuse only. */
  cellsIdle(tenant?: string): number {
    return this.#cells((one) => one.isIdle && (tenant === undefined || one.tenant === tenant));
  }

  /** A run of `cells` cells for a sequence that starts with `tokens`; null when there is no room now. Copy before the
   *  next call: the source may go at any later admission. */
  admit(identity: CellIdentity, tokens: Int32Array, cells: number): CellAdmission | null {
    const blocks = blocksFor(cells);
    // First, because it is cheap: whoever waits asks again each step, and hashing its whole prompt each time would hold
    // the loop up for as long as the step itself.
    if (!this.#hasRoom(blocks, null)) return null;
    const rootKey = rootKeyOf(identity);
    const { keys, sources } = this.#find(rootKey, tokens);
    const admission = this.#place({ blocks, rootKey, keys, sources, tenant: identity.tenant });
    if (admission === null) return null;
    this.#tokensQueried += tokens.length;
    this.#tokensHit += admission.cachedTokens;
    return admission;
  }

  /** Whether there would be room for so many cells, were what these hold given back. */
  hasRoom(cells: number, gone: readonly CellHold[]): boolean {
    const runs = gone.map(({ run }) => run);
    return this.#hasRoom(blocksFor(cells), null, runs);
  }

  /** The first `count` cells of the hold are computed from `tokens`: their full blocks can be found from now on. */
  fill(hold: CellHold, tokens: Int32Array, count: number): void {
    const entry = this.#own(hold);
    for (let i = entry.keys.length; (i + 1) * blockCells <= count; i++) {
      const previous = entry.keys.at(-1) ?? entry.rootKey;
      this.#addKey(entry, chainKey(previous, tokens, i));
    }
  }

  /** The sequence has ended; its full blocks stay findable. */
  retire(hold: CellHold): void {
    const entry = this.#own(hold);
    const last = entry.keys.at(-1);
    // Another run with the same last key holds all of this one's blocks already.
    if (last === undefined || this.#index.get(last)!.size > 1) {
      this.drop(hold);
      return;
    }
    this.#pool.shrink(entry.run, entry.keys.length);
    entry.isIdle = true;
    this.#touch(entry);
    this.#evictContained(entry);
    while (this.cellsIdle(entry.tenant) > this.#tenantBlocksMax * blockCells) {
      this.drop(this.#oldestIdle((one) => one.tenant === entry.tenant)!);
    }
  }

  /** Frees the cells at once: nothing in them is to be trusted, or somebody needs the room. */
  drop(hold: CellHold): void {
    const entry = this.#own(hold);
    this.#truncate(entry, 0);
    this.#entries.delete(entry);
    this.#pool.release(entry.run);
  }

  #find(rootKey: string, tokens: Int32Array): { keys: string[]; sources: ReadonlySet<Entry> } {
    const keys: string[] = [];
    let sources: ReadonlySet<Entry> = new Set();
    // The last prompt token is always computed: its logits are what the answer starts from.
    for (let i = 0; (i + 1) * blockCells < tokens.length; i++) {
      const key = chainKey(keys.at(-1) ?? rootKey, tokens, i);
      const found = this.#index.get(key);
      if (found === undefined) break;
      keys.push(key);
      sources = found;
    }
    return { keys, sources };
  }

  /** Only for a want that #hasRoom. */
  #place(want: Want): CellAdmission | null {
    const { blocks, keys, sources } = want;
    if (keys.length === 0) return this.#placeFresh(want, null);
    const whole = [...sources].find((one) => one.isIdle && one.keys.length === keys.length);
    if (whole !== undefined && this.#pool.grow(whole.run, blocks)) return this.#adopt(whole, want);
    // An idle source can still be adopted when a copy finds no room.
    const source = whole ?? [...sources].find((one) => one.isIdle) ?? [...sources][0]!;
    this.#touch(source);
    const copied = this.#placeFresh(want, source);
    if (copied !== null) return copied;
    if (this.#makeRoomBehind(source, blocks)) return this.#adopt(source, want);
    return this.#placeFresh({ ...want, keys: [] }, null);
  }

  /** Whether evicting every idle run, `source` excepted, would make room beside those that are given back. */
  #hasRoom(blocks: number, source: Entry | null, back: readonly Run[] = []): boolean {
    const gone = new Set<Run>(back);
    for (const one of this.#entries) if (one.isIdle && one !== source) gone.add(one.run);
    return this.#pool.longestFree(gone) >= blocks;
  }

  /** Allocates, evicting idle runs oldest first, `source` excepted. Evicts nothing when it could not succeed. */
  #placeFresh(want: Want, source: Entry | null): CellAdmission | null {
    let run = this.#pool.allocate(want.blocks);
    if (run === null && !this.#hasRoom(want.blocks, source)) return null;
    while (run === null) {
      this.drop(this.#oldestIdle((entry) => entry !== source)!);
      run = this.#pool.allocate(want.blocks);
    }
    const { rootKey, tenant } = want;
    const entry: Entry = { run, tenant, keys: [], rootKey, isIdle: false, tick: 0 };
    this.#entries.add(entry);
    if (source !== null) for (const key of want.keys) this.#addKey(entry, key);
    return this.#handOut(entry, source);
  }

  #adopt(entry: Entry, want: Want): CellAdmission {
    this.#truncate(entry, want.keys.length);
    entry.isIdle = false;
    return this.#handOut(entry, null);
  }

  #handOut(entry: Entry, source: Entry | null): CellAdmission {
    this.#touch(entry);
    return {
      hold: entry,
      cellBase: entry.run.first * blockCells,
      cachedTokens: entry.keys.length * blockCells,
      copyFrom: source === null ? null : source.run.first * blockCells,
    };
  }

  /** Evicts the idle runs that stand between `entry` and a length of `blocks`; none when something live does. */
  #makeRoomBehind(entry: Entry, blocks: number): boolean {
    const end = entry.run.first + blocks;
    const behind = [...this.#entries].filter(
      (one) => one.run.first > entry.run.first && one.run.first < end,
    );
    if (end > this.#pool.blocks || behind.some((one) => !one.isIdle)) return false;
    for (const one of behind) this.drop(one);
    return this.#pool.grow(entry.run, blocks);
  }

  /** Idle runs that `entry` begins with say nothing that it does not. */
  #evictContained(entry: Entry): void {
    entry.keys.forEach((key, i) => {
      for (const other of [...this.#index.get(key)!]) {
        if (other !== entry && other.isIdle && other.keys.length === i + 1) this.drop(other);
      }
    });
  }

  #oldestIdle(matches: (entry: Entry) => boolean): Entry | undefined {
    let oldest: Entry | undefined;
    for (const entry of this.#entries) {
      if (!entry.isIdle || !matches(entry)) continue;
      if (oldest === undefined || entry.tick < oldest.tick) oldest = entry;
    }
    return oldest;
  }

  #own(hold: CellHold): Entry {
    const entry = hold as Entry;
    if (!this.#entries.has(entry)) throw new Error(`run at block ${hold.run.first} is not held`);
    return entry;
  }

  #touch(entry: Entry): void {
    this.#tick += 1;
    entry.tick = this.#tick;
  }

  #addKey(entry: Entry, key: string): void {
    entry.keys.push(key);
    const found = this.#index.get(key);
    if (found === undefined) this.#index.set(key, new Set([entry]));
    else found.add(entry);
  }

  #truncate(entry: Entry, count: number): void {
    for (const key of entry.keys.splice(count)) {
      const found = this.#index.get(key)!;
      found.delete(entry);
      if (found.size === 0) this.#index.delete(key);
    }
  }

  #cells(matches: (entry: Entry) => boolean): number {
    let blocks = 0;
    for (const entry of this.#entries) if (matches(entry)) blocks += entry.run.blocks;
    return blocks * blockCells;
  }
}

interface Want {
  readonly blocks: number;
  readonly rootKey: string;
  readonly keys: readonly string[];
  readonly sources: ReadonlySet<Entry>;
  readonly tenant: string;
}

/** The same for equal uses only: fields in a fixed order, numbers as JSON has them. */
function useText(use: AdapterUse | null): string {
  if (use === null) return '';
  const { parts, merge, density, flyTopK, prior, system } = use;
  const texts = [...parts, system].map((part) => part && [part.generation, part.rank, part.weight]);
  return JSON.stringify([texts, merge, density, flyTopK, prior?.strength, prior?.tokens]);
}

/** Everything but the tokens, hashed once; each block's key chains from it. */
function rootKeyOf(identity: CellIdentity): string {
  const hash = createHash('sha256');
  for (const part of [identity.baseHash, useText(identity.use), identity.tenant]) {
    const bytes = Buffer.from(part, 'utf8');
    const length = Buffer.alloc(8);
    length.writeBigUInt64LE(BigInt(bytes.length));
    hash.update(length).update(bytes);
  }
  return hash.digest('base64');
}

function chainKey(previous: string, tokens: Int32Array, block: number): string {
  const part = tokens.subarray(block * blockCells, (block + 1) * blockCells);
  // Both parts have a fixed length: 44 characters of base64, 16 tokens of 4 bytes.
  return createHash('sha256')
    .update(previous)
    .update(new Uint8Array(part.buffer, part.byteOffset, part.byteLength))
    .digest('base64');
}
