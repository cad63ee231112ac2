// Makes an adapter hierarchical: rewrites scale·B·A of each module so that every prefix of its ranks is the best
// approximation of that size (Eckart-Young). LoRA-Squeeze (arXiv 2602.10993), post-hoc: with B = Q_B R_B, Aᵀ = Q_A R_A and
// R_B R_Aᵀ = U Σ Vᵀ, the factors are B' = Q_B U √Σ and A' = √Σ Vᵀ Q_Aᵀ. Exact: no random projection, everything in f64.

import { GatewayError } from '../errors.ts';
import {
  type Columns,
  jacobiSvd,
  longestFirst,
  multiplyTransposed,
  qr,
  type Svd,
  transpose,
} from './orthogonal.ts';

export interface LoraModule {
  readonly rank: number;
  readonly in: number;
  readonly out: number;
  readonly a: Float64Array; // [rank, in]
  readonly b: Float64Array; // [out, rank]
  /** alpha / r, or alpha / √r with rsLoRA. */
  readonly scale: number;
}

export interface SqueezedModule {
  /** Ranks that are left: 1 … min(rank, in, out). */
  readonly rank: number;
  /** Row i is rank i, the largest first. B'·A' = scale·B·A. */
  readonly a: Float64Array; // [rank, in]
  readonly b: Float64Array; // [rank, out]
  /** Singular values of scale·B·A, descending. */
  readonly sigma: Float64Array; // [rank]
}

// A singular value this much below the first is what rounding left of a rank that is not there: f64 keeps 16 digits, and
// the products of the factors lose a few.
const trimRatio = 1e-12;

/** Throws INVALID_ADAPTER when a product is not finite. Borrows its input. */
export function squeezeModule(module: LoraModule): SqueezedModule {
  const { rank, out } = module;
  // Squares of very large or very small entries leave f64's range, so each matrix is brought to at most 1 first.
  const maxA = largestOf(module.a);
  const maxB = largestOf(module.b);
  // [rank, in] row by row is Aᵀ column by column.
  const qrA = qr({ rows: module.in, columns: rank, data: divided(module.a, maxA) });
  const qrB = qr(transpose({ rows: rank, columns: out, data: divided(module.b, maxB) }));
  const core = multiplyTransposed(qrB.r, qrA.r);
  const maxCore = largestOf(core.data);
  const gain = Math.abs(module.scale) * maxA * maxB * maxCore;
  const { us, v, sigma } = coreSvd({ ...core, data: divided(core.data, maxCore) });
  const kept = Math.max(1, sigma.filter((value) => value > trimRatio * sigma[0]!).length);
  const sizes = sigma.slice(0, kept).map((value) => value * gain);
  if (!sizes.every(Number.isFinite)) {
    throw new GatewayError('INVALID_ADAPTER', 'scale·B·A has values that are not finite');
  }
  const roots = sizes.map(Math.sqrt);
  // us has length σ per column: √size / σ makes it U√Σ.
  const left = roots.map((root, i) =>
    root === 0 ? 0 : (Math.sign(module.scale) * root) / sigma[i]!,
  );
  const b = qrB.applyQ(scaled(us, left));
  const a = qrA.applyQ(scaled(v, roots));
  for (let i = 0; i < kept; i++) fixSign(a, b, i);
  return { rank: kept, a: a.data, b: b.data, sigma: sizes };
}

function largestOf(values: Float64Array): number {
  let largest = 0;
  for (const value of values) largest = Math.max(largest, Math.abs(value));
  return largest;
}

function divided(values: Float64Array, divisor: number): Float64Array {
  return divisor === 0 ? values : values.map((value) => value / divisor);
}

/** The SVD of a core of any shape: `us` [rows, n] with lengths σ, `v` [columns, n] orthonormal, n the smaller side. */
function coreSvd(core: Columns): Svd {
  if (core.rows >= core.columns) return tallSvd(core);
  // coreᵀ·V = U·Σ, so core = V·Σ·Uᵀ: the sides change places, and so does the length.
  const { us, v, sigma } = tallSvd(transpose(core));
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
function scaled({ rows, data }: Columns, factors: Float64Array): Columns {
  const result = data.slice(0, rows * factors.length);
  for (let i = 0; i < result.length; i++) result[i]! *= factors[Math.floor(i / rows)]!;
  return { rows, columns: factors.length, data: result };
}

/** (-b)·(-a) is the same adapter: the entry of b that is largest is made positive, so that the bytes are settled. */
function fixSign(a: Columns, b: Columns, column: number): void {
  const left = b.data.subarray(column * b.rows, (column + 1) * b.rows);
  let largest = 0;
  for (const value of left) if (Math.abs(value) > Math.abs(largest)) largest = value;
  if (largest >= 0) return;
  const right = a.data.subarray(column * a.rows, (column + 1) * a.rows);
  for (const side of [left, right]) {
    for (let i = 0; i < side.length; i++) side[i] = -side[i]!;
  }
}

/** Share of Σσ² over all modules that uniform rank k keeps, at index k-1 up to the largest rank; ends at exactly 1. */
export function rankCurve(sigmas: readonly Float64Array[]): number[] {
  const length = sigmas.reduce((most, sigma) => Math.max(most, sigma.length), 1);
  const energies = Array.from({ length }, (_, k) =>
    sigmas.reduce((sum, sigma) => sum + (sigma[k] ?? 0) ** 2, 0),
  );
  const total = energies.reduce((sum, energy) => sum + energy, 0);
  let kept = 0;
  return energies.map((energy, k) => {
    kept += energy;
    return k === length - 1 || total === 0 ? 1 : Math.min(1, kept / total);
  });
}
