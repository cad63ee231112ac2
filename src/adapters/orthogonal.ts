// Dense linear algebra for adapters, in f64: Householder QR (Golub & Van Loan, algorithm 5.2.1) and one-sided Jacobi SVD
// (Hestenes; de Rijk's ordering). Only + - * / and sqrt, which IEEE 754 rounds one way: the same input gives the same
// bytes on every machine. Every matrix is column-major: column j is data[j·rows … (j+1)·rows).

import { GatewayError } from '../errors.ts';

export interface Columns {
  readonly rows: number;
  readonly columns: number;
  readonly data: Float64Array;
}

export interface Qr {
  /** R [steps, columns], zero below its diagonal. */
  readonly r: Columns;
  /** Q · x for x [steps, n] → [rows, n], with Q [rows, steps] of orthonormal columns. */
  applyQ(x: Columns): Columns;
}

/** x = Q · R, with steps = min(rows, columns). Borrows `x`. */
export function qr(x: Columns): Qr {
  const { rows, columns } = x;
  const steps = Math.min(rows, columns);
  const work = Float64Array.from(x.data);
  const taus = new Float64Array(steps);
  const column = (j: number): Float64Array => work.subarray(j * rows, (j + 1) * rows);
  for (let i = 0; i < steps; i++) {
    taus[i] = reflectorOf(column(i), i);
    for (let j = i + 1; j < columns; j++) reflect(column(i), column(j), i, taus[i]!);
  }
  const r = new Float64Array(steps * columns);
  for (let j = 0; j < columns; j++) {
    r.set(work.subarray(j * rows, j * rows + Math.min(j + 1, steps)), j * steps);
  }
  return {
    r: { rows: steps, columns, data: r },
    applyQ(y) {
      const data = new Float64Array(rows * y.columns);
      for (let j = 0; j < y.columns; j++) {
        const target = data.subarray(j * rows, (j + 1) * rows);
        target.set(y.data.subarray(j * y.rows, (j + 1) * y.rows));
        for (let i = steps - 1; i >= 0; i--) reflect(column(i), target, i, taus[i]!);
      }
      return { rows, columns: y.columns, data };
    },
  };
}

/** Turns v[i…] into R's diagonal entry (at i) and the reflector's tail (its head is 1 and not stored); returns tau. */
function reflectorOf(v: Float64Array, i: number): number {
  let tail = 0;
  for (let k = i + 1; k < v.length; k++) tail += v[k]! * v[k]!;
  if (tail === 0) return 0; // Already triangular here: no reflection.
  const head = v[i]!;
  const norm = Math.sqrt(head * head + tail);
  const diagonal = head > 0 ? -norm : norm; // The sign that does not cancel.
  const divisor = head - diagonal;
  for (let k = i + 1; k < v.length; k++) v[k]! /= divisor;
  v[i] = diagonal;
  return -divisor / diagonal;
}

function reflect(v: Float64Array, y: Float64Array, i: number, tau: number): void {
  if (tau === 0) return;
  let dot = y[i]!;
  for (let k = i + 1; k < y.length; k++) dot += v[k]! * y[k]!;
  const scale = tau * dot;
  y[i]! -= scale;
  for (let k = i + 1; k < y.length; k++) y[k]! -= scale * v[k]!;
}

export interface Svd {
  /** [rows, columns]: column i has length sigma[i] and is orthogonal to the others. */
  readonly us: Columns;
  /** [columns, columns], orthogonal. */
  readonly v: Columns;
  /** Descending. */
  readonly sigma: Float64Array;
}

// Cosines below this count as orthogonal: about the rounding error of a dot product of 256 terms.
const cosineMax = 1e-14;
// Of squared lengths: singular values 1e-20 of the largest, far below what an f64 core still means.
const negligible = 1e-40;
// Converges quadratically; 4 to 9 sweeps seen at ranks 16 to 256. Needs finite entries whose squares are in range.
const sweepsMax = 60;

/** x · V = U · Σ for rows ≥ columns. Borrows `x`. Relative accuracy also for the small singular values. */
export function jacobiSvd(x: Columns): Svd {
  const { rows, columns } = x;
  const us = Float64Array.from(x.data);
  const v = new Float64Array(columns * columns);
  for (let i = 0; i < columns; i++) v[i * columns + i] = 1;
  const order = Array.from({ length: columns }, (_, i) => i);
  const norms = new Float64Array(columns);
  const matrices = { us, v, rows, columns, norms };
  for (let sweep = 0; ; sweep++) {
    for (let i = 0; i < columns; i++) norms[i] = dot(us, i * rows, i * rows, rows);
    // Longest first: the rotations then move the length forward, and fewer sweeps are needed.
    order.sort((i, j) => norms[j]! - norms[i]! || i - j);
    if (!rotateAll(matrices, order)) break;
    if (sweep === sweepsMax) throw new GatewayError('INTERNAL', 'the SVD did not converge');
  }
  const sigma = Float64Array.from(order, (i) => Math.sqrt(norms[i]!));
  return {
    us: pickColumns({ rows, columns, data: us }, order),
    v: pickColumns({ rows: columns, columns, data: v }, order),
    sigma,
  };
}

interface Matrices {
  readonly us: Float64Array;
  readonly v: Float64Array;
  readonly rows: number;
  readonly columns: number;
  /** Squared lengths of the columns of `us`. */
  readonly norms: Float64Array;
}

/** One sweep over all pairs of columns; whether any pair had to be rotated. */
function rotateAll({ us, v, rows, columns, norms }: Matrices, order: readonly number[]): boolean {
  let rotated = false;
  const longest = norms[order[0] ?? 0]!;
  for (let first = 0; first < columns; first++) {
    for (let second = first + 1; second < columns; second++) {
      const i = order[first]!;
      const j = order[second]!;
      const cross = dot(us, i * rows, j * rows, rows);
      // Beside the longest column these are nothing, and their angles are rounding: they would turn for ever.
      if (Math.min(norms[i]!, norms[j]!) <= negligible * longest) continue;
      if (!(Math.abs(cross) > cosineMax * Math.sqrt(norms[i]! * norms[j]!))) continue;
      rotated = true;
      const zeta = (norms[j]! - norms[i]!) / (2 * cross);
      const t = (zeta < 0 ? -1 : 1) / (Math.abs(zeta) + Math.sqrt(1 + zeta * zeta));
      const c = 1 / Math.sqrt(1 + t * t);
      rotate(us, { i: i * rows, j: j * rows, length: rows, c, s: c * t });
      rotate(v, { i: i * columns, j: j * columns, length: columns, c, s: c * t });
      // Good enough until the next sweep counts them again; one below 0 by rounding waits for that.
      norms[i]! -= t * cross;
      norms[j]! += t * cross;
    }
  }
  return rotated;
}

interface Rotation {
  readonly i: number;
  readonly j: number;
  readonly length: number;
  readonly c: number;
  readonly s: number;
}

function rotate(data: Float64Array, { i, j, length, c, s }: Rotation): void {
  for (let k = 0; k < length; k++) {
    const x = data[i + k]!;
    const y = data[j + k]!;
    data[i + k] = c * x - s * y;
    data[j + k] = s * x + c * y;
  }
}

function dot(data: Float64Array, i: number, j: number, length: number): number {
  let sum = 0;
  for (let k = 0; k < length; k++) sum += data[i + k]! * data[j + k]!;
  return sum;
}

function pickColumns({ rows, data }: Columns, order: readonly number[]): Columns {
  const picked = new Float64Array(rows * order.length);
  order.forEach((from, to) => {
    picked.set(data.subarray(from * rows, (from + 1) * rows), to * rows);
  });
  return { rows, columns: order.length, data: picked };
}

/** x with its columns by falling length: sorted's column i is x's column order[i]. */
function longestFirst(x: Columns): {
  readonly order: readonly number[];
  readonly sorted: Columns;
} {
  const norms = Float64Array.from({ length: x.columns }, (_, i) =>
    dot(x.data, i * x.rows, i * x.rows, x.rows),
  );
  const order = Array.from(norms.keys()).sort((i, j) => norms[j]! - norms[i]! || i - j);
  return { order, sorted: pickColumns(x, order) };
}

/** x · yᵀ for x [m, n] and y [k, n]. */
export function multiplyTransposed(x: Columns, y: Columns): Columns {
  const data = new Float64Array(x.rows * y.rows);
  for (let n = 0; n < x.columns; n++) {
    for (let k = 0; k < y.rows; k++) {
      const factor = y.data[n * y.rows + k]!;
      if (factor === 0) continue;
      for (let m = 0; m < x.rows; m++) data[k * x.rows + m]! += x.data[n * x.rows + m]! * factor;
    }
  }
  return { rows: x.rows, columns: y.rows, data };
}

export function transpose({ rows, columns, data }: Columns): Columns {
  const result = new Float64Array(data.length);
  for (let j = 0; j < columns; j++) {
    for (let i = 0; i < rows; i++) result[i * columns + j] = data[j * rows + i]!;
  }
  return { rows: columns, columns: rows, data: result };
}

/** xᵀ · y for x [n, m] and y [n, k]: dot products of columns, four of y at a time while x's column is in the first cache. */
export function innerProducts(x: Columns, y: Columns): Columns {
  const { rows, columns: height } = x;
  const data = new Float64Array(height * y.columns);
  for (let m = 0; m < height; m++) {
    const column = x.data.subarray(m * rows, (m + 1) * rows);
    for (let k = 0; k < y.columns; k += 4) {
      const [at, last] = [k * rows, y.columns - 1 - k];
      const [at1, at2, at3] = [1, 2, 3].map((i) => at + Math.min(i, last) * rows) as [
        number,
        number,
        number,
      ];
      let [sum, sum1, sum2, sum3] = [0, 0, 0, 0];
      for (let n = 0; n < rows; n++) {
        const value = column[n]!;
        sum += value * y.data[at + n]!;
        sum1 += value * y.data[at1 + n]!;
        sum2 += value * y.data[at2 + n]!;
        sum3 += value * y.data[at3 + n]!;
      }
      const to = k * height + m;
      data[to] = sum;
      if (last > 0) data[to + height] = sum1;
      if (last > 1) data[to + 2 * height] = sum2;
      if (last > 2) data[to + 3 * height] = sum3;
    }
  }
  return { rows: height, columns: y.columns, data };
}

/** x = US · Vᵀ of any shape: `us` [rows, n] with lengths σ, `v` [columns, n] orthonormal where σ > 0, n the smaller side. */
export function svd(x: Columns): Svd {
  if (x.rows >= x.columns) return tallSvd(x);
  // xᵀ·V = U·Σ, so x = V·Σ·Uᵀ: the sides change places, and so does the length.
  const { us, v, sigma } = tallSvd(transpose(x));
  return { us: scaled(v, sigma), v: scaled(us, sigma.map(inverse)), sigma };
}

/** With x·P = Q·R and Rᵀ·V = U·Σ, x = (Q·V·Σ)·(P·U)ᵀ. Longest columns first, R is graded, and Jacobi on Rᵀ needs a few
 *  sweeps where on x it needs many (Drmač and Veselić, "New fast and accurate Jacobi SVD algorithm", 2008). */
function tallSvd(x: Columns): Svd {
  const { order, sorted } = longestFirst(x);
  const { r, applyQ } = qr(sorted);
  const { us, v, sigma } = jacobiSvd(transpose(r));
  const permuted = scaled(us, sigma.map(inverse));
  const right = new Float64Array(permuted.data.length);
  order.forEach((to, from) => {
    for (let j = 0; j < permuted.columns; j++) {
      right[j * permuted.rows + to] = permuted.data[j * permuted.rows + from]!;
    }
  });
  return { us: applyQ(scaled(v, sigma)), v: { ...permuted, data: right }, sigma };
}

function inverse(value: number): number {
  return value === 0 ? 0 : 1 / value;
}

/** The first factors.length columns, each times its factor. */
export function scaled({ rows, data }: Columns, factors: Float64Array): Columns {
  const result = data.slice(0, rows * factors.length);
  for (let i = 0; i < result.length; i++) result[i]! *= factors[Math.floor(i / rows)]!;
  return { rows, columns: factors.length, data: result };
}
