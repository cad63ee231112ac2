// A low-rank pair that is to become a given matrix, ‖s·Bᵀ·A·X − Y‖²/2 with X the identity unless given: what the trainer's
// pure parts are tried on, because the best answer is known.

import type { Columns } from '../../src/adapters/orthogonal.ts';
import type { Parameter } from '../../src/trainer/optimizers/optimizer.ts';
import { createRng, normals } from './random.ts';

export function parameterOf(name: string, rows: number, values: Float32Array): Parameter {
  const columns = values.length / rows;
  return { name, rows, columns, values, gradient: new Float32Array(values.length) };
}

export interface Pair {
  readonly a: Parameter; // [R, in]
  readonly b: Parameter; // [R, out]
}

/** s·Bᵀ·A, [out, in] row after row. */
export function productOf({ a, b }: Pair, scale = 1): Float64Array {
  const [width, height] = [a.columns, b.columns];
  const product = new Float64Array(height * width);
  for (let r = 0; r < a.rows; r++) {
    for (let o = 0; o < height; o++) {
      const left = scale * b.values[r * height + o]!;
      for (let i = 0; i < width; i++) product[o * width + i]! += left * a.values[r * width + i]!;
    }
  }
  return product;
}

/** Writes both gradients where that of the product is `full` [out, in]. */
export function backward({ a, b }: Pair, full: Float64Array, scale = 1): void {
  const [width, height] = [a.columns, b.columns];
  for (let r = 0; r < a.rows; r++) {
    const ofA = new Float64Array(width);
    for (let o = 0; o < height; o++) {
      let sum = 0;
      for (let i = 0; i < width; i++) {
        const g = scale * full[o * width + i]!;
        ofA[i]! += g * b.values[r * height + o]!;
        sum += g * a.values[r * width + i]!;
      }
      b.gradient[r * height + o] = sum;
    }
    a.gradient.set(ofA, r * width);
  }
}

/** ‖x − y‖². */
export function squaredDistance(x: ArrayLike<number>, y: ArrayLike<number>): number {
  let sum = 0;
  for (let i = 0; i < x.length; i++) sum += (x[i]! - y[i]!) ** 2;
  return sum;
}

/** A matrix of that rank with noise added, [out, in]; its singular values are alike. */
export function planted(
  out: number,
  width: number,
  { rank, noise, seed }: { readonly rank: number; readonly noise: number; readonly seed: number },
): { readonly clean: Float64Array; readonly noisy: Float64Array } {
  const rng = createRng(seed);
  const [left, right] = [normals(rng, out * rank), normals(rng, width * rank)];
  const clean = new Float64Array(out * width);
  for (let o = 0; o < out; o++) {
    for (let i = 0; i < width; i++) {
      for (let r = 0; r < rank; r++) {
        clean[o * width + i]! += (left[o * rank + r]! * right[i * rank + r]!) / Math.sqrt(rank);
      }
    }
  }
  return { clean, noisy: clean.map((x) => x + noise * rng.normal()) };
}

/** A row-major matrix as its columns. */
export function columnsOf(x: ArrayLike<number>, rows: number): Columns {
  const columns = x.length / rows;
  const data = new Float64Array(x.length);
  for (let at = 0; at < x.length; at++) {
    data[(at % columns) * rows + Math.floor(at / columns)] = x[at]!;
  }
  return { rows, columns, data };
}
