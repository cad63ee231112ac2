// Which adapter, at which rank, is best for a domain within a latency: a MAP-Elites grid archive (Mouret & Clune 2015,
// algorithms.md section 34) over latency, a cell an octave, and domain. A row is an owner's domain, `owner/domain`; a cell
// keeps the candidate of the largest objective, and the elite of a cell never falls while it is current. Cells, ties and
// sums are those of pyribs 0.12's GridArchive (test/oracle/ribs-archive.py). No clock and no I/O.

import { z } from 'zod';
import {
  adapterKinds,
  type Generation,
  isGeneration,
  type PackedKind,
} from '../adapters/adapter.ts';
import { parseSaved } from './saved-state.ts';

export interface Elite {
  /** null, and kind `base`: the base model alone. */
  readonly adapter: string | null;
  readonly generation: Generation | null;
  readonly kind: PackedKind | 'base';
  readonly rank: number;
  /** How good its answers are, 0…1. */
  readonly objective: number;
  /** How long one takes, whole. */
  readonly latencyMs: number;
}

/** Whether what was measured is what one would get now. */
export type IsCurrent = (elite: Elite) => boolean;

export type OfferStatus = 'new' | 'improved' | 'not-better' | 'no-room';

export interface ArchiveRead {
  readonly elite: Elite;
  /** Of the cell it was found in. */
  readonly cell: number;
  readonly match: 'exact' | 'nearest';
}

/** Rows at a time, and of one owner: with ten cells each, 2,560 elites in half a megabyte of text. */
export const rowsMax = 256;
export const ownerRowsMax = 64;
// The grid: one octave a cell, from below one short answer on a GPU to far above a long one on two cores (figures.md).
const cellsDefault = 10;
const latencyLog2Min = 4; // 16 ms
const latencyLog2Max = 14; // 16.4 s
/** pyribs' default: keeps what lies on an edge in the upper cell in spite of rounding. */
const epsilon = 1e-6;

const savedElite: z.ZodType<Elite> = z.strictObject({
  adapter: z.string().nullable(),
  generation: z
    .custom<Generation>((value) => typeof value === 'string' && isGeneration(value))
    .nullable(),
  kind: z.enum([...adapterKinds, 'basis', 'bank', 'base']),
  rank: z.int().min(0),
  objective: z.number(),
  latencyMs: z.number().positive(),
});
const savedArchive = z.strictObject({
  format: z.literal('rankgate-archive/1'),
  cells: z.int(),
  rows: z
    .array(z.strictObject({ row: z.string(), elites: z.array(savedElite.nullable()) }))
    .max(rowsMax),
});

export type ArchiveRows = ReadonlyArray<
  readonly [row: string, elites: ReadonlyArray<Elite | null>]
>;

export class Archive {
  readonly cells: number;
  readonly #rows = new Map<string, Array<Elite | null>>();

  constructor(cells: number = cellsDefault) {
    this.cells = cells;
  }

  /** 0…cells−1, slower to the right; what lies outside counts into the outermost cells. */
  cellOf(latencyMs: number): number {
    const width = latencyLog2Max - latencyLog2Min;
    const cell = Math.trunc(
      (this.cells * (Math.log2(latencyMs) - latencyLog2Min) + epsilon) / width,
    );
    return Math.min(Math.max(cell, 0), this.cells - 1);
  }

  /** The latencies that a cell is for. */
  bounds(cell: number): readonly [msMin: number, msMax: number] {
    const octaves = (latencyLog2Max - latencyLog2Min) / this.cells;
    return [2 ** (latencyLog2Min + cell * octaves), 2 ** (latencyLog2Min + (cell + 1) * octaves)];
  }

  has(row: string): boolean {
    return this.#rows.has(row);
  }

  /** An elite that is no longer current gives way to anything. */
  offer(row: string, candidate: Elite, isCurrent: IsCurrent): OfferStatus {
    const elites = this.#rows.get(row) ?? this.#open(row);
    if (elites === null) return 'no-room';
    const cell = this.cellOf(candidate.latencyMs);
    const elite = elites[cell]!;
    if (elite !== null && isCurrent(elite) && candidate.objective <= elite.objective) {
      return 'not-better';
    }
    elites[cell] = candidate;
    return elite === null ? 'new' : 'improved';
  }

  /** null: there are as many as there may be. */
  #open(row: string): Array<Elite | null> | null {
    const owners = [...this.#rows.keys()].filter((one) => ownerOf(one) === ownerOf(row)).length;
    if (this.#rows.size >= rowsMax || owners >= ownerRowsMax) return null;
    const elites = Array.from({ length: this.cells }, () => null);
    this.#rows.set(row, elites);
    return elites;
  }

  /** The elite of the budget's cell, or of the nearest cell that has a current one: the faster of two as near. Without a
   *  budget the best of the row. null for a row with none: no other domain is nearer to it than any other. */
  read(row: string, budgetMs: number | null, isCurrent: IsCurrent): ArchiveRead | null {
    const filled = (this.#rows.get(row) ?? []).flatMap((elite, cell) =>
      elite === null ? [] : [{ elite, cell }],
    );
    const wanted = budgetMs === null ? null : this.cellOf(budgetMs);
    const order = ({ elite, cell }: { elite: Elite; cell: number }): number =>
      wanted === null ? -elite.objective : Math.abs(cell - wanted);
    // Stable: the faster of two as good or as near comes first. Only those that are tried are looked up.
    const found = filled.sort((a, b) => order(a) - order(b)).find(({ elite }) => isCurrent(elite));
    if (found === undefined) return null;
    const isExact = wanted === null || found.cell === wanted;
    return { ...found, match: isExact ? 'exact' : 'nearest' };
  }

  remove(row: string): boolean {
    return this.#rows.delete(row);
  }

  /** Every row with its cells, the oldest first. */
  rows(): ArchiveRows {
    return [...this.#rows];
  }

  save(): string {
    const rows = this.rows().map(([row, elites]) => ({ row, elites }));
    return JSON.stringify({ format: 'rankgate-archive/1', cells: this.cells, rows });
  }

  /** False, and nothing changed, for what is no archive of this grid. */
  restore(text: string): boolean {
    const saved = parseSaved(text, savedArchive);
    const isOurs = saved?.cells === this.cells;
    if (!isOurs || saved.rows.some(({ elites }) => elites.length !== this.cells)) return false;
    this.#rows.clear();
    for (const { row, elites } of saved.rows) this.#rows.set(row, elites);
    return true;
  }
}

export const ownerOf = (row: string): string => row.slice(0, Math.max(0, row.indexOf('/')));

/** How much of the map is filled, and the sum of its objectives (pyribs' `ArchiveStats`). */
export function archiveFigures(rows: ArchiveRows): {
  readonly elites: number;
  readonly coverage: number;
  readonly qdScore: number;
} {
  const cells = rows.flatMap(([, row]) => row);
  const elites = cells.filter((elite) => elite !== null);
  return {
    elites: elites.length,
    coverage: elites.length / Math.max(1, cells.length),
    qdScore: elites.reduce((sum, { objective }) => sum + objective, 0),
  };
}
