// KV memory as blocks of 16 cells, given out as contiguous runs: a sequence's attention reads one view and a row pays
// for its own cells only (figures.md, "Attention over one pool of cells"). Best fit.
// Invariant: runs lie in [reservedBlocks, blocks) and do not overlap. Not covered: sharing a block between
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
  readonly first: number;
  blocks: number;
}

export function blocksFor(cells: number): number {
  return Math.ceil(cells / blockCells);
}

/** Longest prompt + answer of a model in a pool of so many cells. */
export function contextMaxOf(contextLength: number, cells: number): number {
  return Math.min(contextLength, (Math.floor(cells / blockCells) - reservedBlocks) * blockCells);
}

export class KvPool {
  readonly blocks: number;
  /** Sorted by `first`: what lies between two of them is free. */
  readonly #runs: Range[] = [];

  constructor(cells: number) {
    this.blocks = Math.floor(cells / blockCells);
    if (this.freeBlocks < 1) {
      throw new GatewayError('INVALID_REQUEST', `KV memory of ${cells} cells holds no sequence`);
    }
  }

  get freeBlocks(): number {
    return this.#runs.reduce((left, run) => left - run.blocks, this.blocks - reservedBlocks);
  }

  /** The smallest free range that fits; null when none does. */
  allocate(blocks: number): Run | null {
    checkCount(blocks);
    const fitting = this.#gaps().filter((gap) => gap.blocks >= blocks);
    const [best] = fitting.sort((a, b) => a.blocks - b.blocks);
    if (best === undefined) return null;
    const run = { first: best.first, blocks };
    const behind = this.#runs.findIndex((one) => one.first > run.first);
    this.#runs.splice(behind < 0 ? this.#runs.length : behind, 0, run);
    return run;
  }

  /** The longest free range, were the runs of `gone` released. */
  longestFree(gone: ReadonlySet<Run>): number {
    return this.#gaps(gone).reduce((longest, gap) => Math.max(longest, gap.blocks), 0);
  }

  /** Grows a run in place to `blocks`; false when what lies behind it is not free. */
  grow(run: Run, blocks: number): boolean {
    const at = this.#indexOf(run);
    const end = this.#runs[at + 1]?.first ?? this.blocks;
    if (run.first + blocks > end) return false;
    this.#runs[at]!.blocks = Math.max(run.blocks, blocks);
    return true;
  }

  /** Gives back what lies behind the first `blocks` blocks of a run. */
  shrink(run: Run, blocks: number): void {
    checkCount(blocks);
    this.#runs[this.#indexOf(run)]!.blocks = Math.min(run.blocks, blocks);
  }

  release(run: Run): void {
    this.#runs.splice(this.#indexOf(run), 1);
  }

  #indexOf(run: Run): number {
    const at = this.#runs.indexOf(run);
    if (at < 0) throw new Error(`run at block ${run.first} is not allocated`);
    return at;
  }

  #gaps(gone?: ReadonlySet<Run>): Range[] {
    const gaps: Range[] = [];
    let first = reservedBlocks;
    for (const run of [...this.#runs, { first: this.blocks, blocks: 0 }]) {
      if (gone?.has(run)) continue;
      if (run.first > first) gaps.push({ first, blocks: run.first - first });
      first = run.first + run.blocks;
    }
    return gaps;
  }
}

function checkCount(blocks: number): void {
  if (!Number.isSafeInteger(blocks) || blocks < 1) throw new Error(`${blocks} blocks asked for`);
}
