// Small pieces of matrix arithmetic for the families, over orthogonal.ts's column-major matrices. A matrix is named by what
// its columns are: `count` columns of `length` numbers.

import { type Columns, multiplyTransposed, transpose } from '../orthogonal.ts';
import type { Random } from './seeded-random.ts';

/** x · y. */
export function times(x: Columns, y: Columns): Columns {
  return multiplyTransposed(x, transpose(y));
}
/** xᵀ · y. */
export function transposedTimes(x: Columns, y: Columns): Columns {
  return multiplyTransposed(transpose(x), transpose(y));
}

export function filled(columns: number, rows: number, value: () => number): Columns {
  return { rows, columns, data: Float64Array.from({ length: rows * columns }, value) };
}
export function zeros(columns: number, rows: number): Columns {
  return { rows, columns, data: new Float64Array(rows * columns) };
}
export function scaled(x: Columns, factor: number): Columns {
  return { ...x, data: x.data.map((value) => value * factor) };
}
/** Uniform in ±bound. PEFT's A: bound = 1/√in (Kaiming with a = √5). */
export function uniform(bound: number, random: Random): () => number {
  return () => (2 * random.uniform() - 1) * bound;
}

/** The first `count` columns, and of each the first `length` numbers. */
export function corner(x: Columns, count: number, length: number = x.rows): Columns {
  const data = new Float64Array(count * length);
  for (let j = 0; j < count; j++) {
    data.set(x.data.subarray(j * x.rows, j * x.rows + length), j * length);
  }
  return { rows: length, columns: count, data };
}

/** x beside y: their columns one after another. */
export function beside(x: Columns, y: Columns): Columns {
  const data = new Float64Array(x.data.length + y.data.length);
  data.set(x.data);
  data.set(y.data, x.data.length);
  return { rows: x.rows, columns: x.columns + y.columns, data };
}

export function columnsOf(x: Columns, first: number, count: number): Columns {
  const data = x.data.slice(first * x.rows, (first + count) * x.rows);
  return { rows: x.rows, columns: count, data };
}

export function added(x: Columns, y: Columns): Columns {
  return { ...x, data: x.data.map((value, i) => value + y.data[i]!) };
}

/** The columns of these indices. */
export function picked(x: Columns, columns: readonly number[]): Columns {
  const data = new Float64Array(columns.length * x.rows);
  columns.forEach((from, to) => {
    data.set(x.data.subarray(from * x.rows, (from + 1) * x.rows), to * x.rows);
  });
  return { rows: x.rows, columns: columns.length, data };
}
