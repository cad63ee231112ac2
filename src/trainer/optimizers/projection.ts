// A matrix seen through a few orthonormal directions of one of its sides: into their coordinates and back.

/** Element (i along the directions' side, j along the other) of a flat matrix is at i·step + j·otherStep. */
export interface Side {
  readonly length: number;
  readonly step: number;
  readonly others: number;
  readonly otherStep: number;
}

/** The side along which a row of a row-major [rows, columns] runs, or that of its columns. */
export function sideOf(rows: number, columns: number, along: 'row' | 'column'): Side {
  return along === 'row'
    ? { length: columns, step: 1, others: rows, otherStep: columns }
    : { length: rows, step: columns, others: columns, otherStep: 1 };
}

/** out[d, j] = Σᵢ directions[d, i]·x(i, j), for directions [D, length]; `out` is [D, others]. */
export function project(
  x: Float32Array,
  { length, step, others, otherStep }: Side,
  directions: Float64Array,
  out: Float32Array | Float64Array,
): void {
  for (let d = 0; d < out.length / others; d++) {
    for (let j = 0; j < others; j++) {
      let sum = 0;
      for (let i = 0; i < length; i++) {
        sum += directions[d * length + i]! * x[i * step + j * otherStep]!;
      }
      out[d * others + j] = sum;
    }
  }
}

/** x(i, j) ← kept·x(i, j) + Σ_d directions[d, i]·y[d, j]. */
export function addBack(
  x: Float32Array,
  { length, step, others, otherStep }: Side,
  directions: Float64Array,
  { y, kept }: { readonly y: Float32Array | Float64Array; readonly kept: number },
): void {
  const count = y.length / others;
  for (let j = 0; j < others; j++) {
    for (let i = 0; i < length; i++) {
      let sum = 0;
      for (let d = 0; d < count; d++) sum += directions[d * length + i]! * y[d * others + j]!;
      const at = i * step + j * otherStep;
      x[at] = x[at]! * kept + sum;
    }
  }
}
