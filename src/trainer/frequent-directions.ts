// Frequent Directions (Liberty, "Simple and deterministic matrix sketching", KDD 2013), with twice the rows as a buffer: rows
// come one after another, and l of them stand for all. For every k < l, ‖XᵀX − SᵀS‖₂ ≤ ‖X − X_k‖²_F / (l − k).

import { type Columns, scaled, svd } from '../adapters/orthogonal.ts';

export interface Sketch {
  /** l. */
  readonly size: number;
  readonly width: number;
  /** Rows one after another; those from `filled` on are no part of it. */
  readonly data: Float64Array; // [2·l, width]
  /** In an array, so that data and this are all its state. */
  readonly filled: Int32Array; // [1]
}

export function createSketch(size: number, width: number): Sketch {
  return { size, width, data: new Float64Array(2 * size * width), filled: new Int32Array(1) };
}

export function addRow(sketch: Sketch, row: ArrayLike<number>): void {
  if (sketch.filled[0] === 2 * sketch.size) shrink(sketch);
  sketch.data.set(row, sketch.filled[0]! * sketch.width);
  sketch.filled[0]! += 1;
}

/** Its rows, a column each and at most l. Borrowed until the next row. */
export function sketchOf(sketch: Sketch): Columns {
  if (sketch.filled[0]! > sketch.size) shrink(sketch);
  return filledRows(sketch);
}

function filledRows({ width, filled, data }: Sketch): Columns {
  const columns = filled[0]!;
  return { rows: width, columns, data: data.subarray(0, columns * width) };
}

/** All directions lose as much energy as the l-th has: fewer than l are left. */
function shrink(sketch: Sketch): void {
  const { size, data } = sketch;
  const { us, sigma } = svd(filledRows(sketch));
  const taken = (sigma[size - 1] ?? 0) ** 2;
  const left = sigma.slice(0, size - 1).filter((value) => value * value > taken);
  const kept = left.map((value) => Math.sqrt(value * value - taken) / value);
  data.set(scaled(us, kept).data);
  sketch.filled[0] = kept.length;
}
