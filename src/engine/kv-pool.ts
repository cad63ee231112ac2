// KV memory as blocks of 16 cells, given out as contiguous runs: a sequence's attention reads one view and a row pays
// for its own cells only (figures.md, "Attention over one pool of cells"). Best fit, free neighbours always merged.
// Invariant: runs and free ranges tile [reservedBlocks, blocks) without overlap. Not covered: sharing a block between
// two runs (prefix-cache.ts copies or adopts instead).

import { GatewayError } from '../errors.ts';

/** Cells per block: the unit of allocation and of prefix reuse. */
export const blockCells = 16;
/** Block 0 takes the stepper's writes for padding rows. */
export const reservedBlocks = 1;

/** A contiguous range of blocks. Changed only by the pool that made it. */
export interface Run {
  readonly first: number;
  readonly blocks: number;
}

interface Range {
  first: number;
  blocks: number;
}

export function blocksFor(cells: number): number {
  return Math.ceil(cells / blockCells);
}

export class KvPool {
  readonly blocks: number;
  /** Sorted by `first`, never empty, never touching. */
  readonly #free: Range[];
  readonly #runs: Set<Range> = new Set();
  #freeBlocks: number;

  constructor(cells: number) {
    this.blocks = Math.floor(cells / blockCells);
    this.#freeBlocks = this.blocks - reservedBlocks;
    if (this.#freeBlocks < 1) {
      throw new GatewayError('INVALID_REQUEST', `KV memory of ${cells} cells holds no sequence`);
    }
    this.#free = [{ first: reservedBlocks, blocks: this.#freeBlocks }];
  }

  get freeBlocks(): number {
    return this.#freeBlocks;
  }

  /** The smallest free range that fits; null when none does. */
  allocate(blocks: number): Run | null {
    checkCount(blocks);
    let best = -1;
    for (let i = 0; i < this.#free.length; i++) {
      const size = this.#free[i]!.blocks;
      if (size >= blocks && (best < 0 || size < this.#free[best]!.blocks)) best = i;
    }
    if (best < 0) return null;
    const run = { first: this.#free[best]!.first, blocks };
    this.#takeFront(best, blocks);
    this.#runs.add(run);
    return run;
  }

  /** Grows a run in place to `blocks`; false when what lies behind it is not free. */
  grow(run: Run, blocks: number): boolean {
    const range = this.#own(run);
    const more = blocks - range.blocks;
    if (more <= 0) return true;
    const behind = this.#free.findIndex((free) => free.first === range.first + range.blocks);
    if (behind < 0 || this.#free[behind]!.blocks < more) return false;
    this.#takeFront(behind, more);
    range.blocks += more;
    return true;
  }

  /** Gives back what lies behind the first `blocks` blocks of a run. */
  shrink(run: Run, blocks: number): void {
    checkCount(blocks);
    const range = this.#own(run);
    const less = range.blocks - blocks;
    if (less <= 0) return;
    range.blocks = blocks;
    this.#putBack({ first: range.first + blocks, blocks: less });
  }

  release(run: Run): void {
    const range = this.#own(run);
    this.#runs.delete(range);
    this.#putBack({ first: range.first, blocks: range.blocks });
  }

  #own(run: Run): Range {
    const range = run as Range;
    if (!this.#runs.has(range)) throw new Error(`run at block ${run.first} is not allocated`);
    return range;
  }

  #takeFront(index: number, blocks: number): void {
    const range = this.#free[index]!;
    range.first += blocks;
    range.blocks -= blocks;
    this.#freeBlocks -= blocks;
    if (range.blocks === 0) this.#free.splice(index, 1);
  }

  #putBack(range: Range): void {
    this.#freeBlocks += range.blocks;
    let at = this.#free.findIndex((free) => free.first > range.first);
    if (at < 0) at = this.#free.length;
    const before = this.#free[at - 1];
    const after = this.#free[at];
    const joinsAfter = after !== undefined && range.first + range.blocks === after.first;
    if (before !== undefined && before.first + before.blocks === range.first) {
      before.blocks += range.blocks + (joinsAfter ? after.blocks : 0);
      if (joinsAfter) this.#free.splice(at, 1);
    } else if (joinsAfter) {
      after.first = range.first;
      after.blocks += range.blocks;
    } else {
      this.#free.splice(at, 0, range);
    }
  }
}

function checkCount(blocks: number): void {
  if (!Number.isSafeInteger(blocks) || blocks < 1) throw new Error(`${blocks} blocks asked for`);
}
