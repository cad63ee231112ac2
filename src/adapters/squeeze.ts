// Makes an adapter hierarchical: rewrites scale·B·A of each module so that every prefix of its ranks is the best
// approximation of that size (Eckart-Young). LoRA-Squeeze (arXiv 2602.10993), post-hoc: with B = Q_B R_B, Aᵀ = Q_A R_A and
// R_B R_Aᵀ = U Σ Vᵀ, the factors are B' = Q_B U √Σ and A' = √Σ Vᵀ Q_Aᵀ, in f64. Exact, but for modules of more than 128 ranks
// of which fewer are wanted (randomized-svd.ts). With a covariance of the module's inputs, best means nearest in outputs.

import { GatewayError } from '../errors.ts';
import {
  type Columns,
  innerProducts,
  multiplyTransposed,
  qr,
  type Svd,
  scaled,
  transpose,
} from './orthogonal.ts';
import { identity, largestSvd, outputDirections } from './randomized-svd.ts';

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
  /** Singular values of scale·B·A, or of scale·B·A·C^½, descending: the square is what a rank is worth. */
  readonly sigma: Float64Array; // [rank]
}

export interface SqueezeOptions {
  /** Most ranks to keep; all by default. */
  readonly rankMax?: number;
  /** Of the random projection. */
  readonly seed?: number;
  /** C, of the module's inputs (calibration.ts). */
  readonly covariance?: Columns; // [in, in]
}

// A singular value this much below the first is what rounding left of a rank that is not there: f64 keeps 16 digits, and
// the products of the factors lose a few.
const trimRatio = 1e-12;

/** Throws INVALID_ADAPTER when a product is not finite. Borrows its input. */
export function squeezeModule(given: LoraModule, options: SqueezeOptions = {}): SqueezedModule {
  const { covariance, seed = 0 } = options;
  // Ranks that are not there must be gone first: no input tells them from ranks that its covariance does not see.
  const module = covariance === undefined ? given : loraOf(squeezeModule(given));
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
  const unit = { ...core, data: divided(core.data, maxCore) };
  const sketch = { rank: Math.min(options.rankMax ?? rank, core.rows, core.columns), seed };
  const { us, v, sigma, worth } =
    covariance === undefined
      ? withWorth(largestSvd(unit, sketch))
      : orderedByOutput(unit, projected(covariance, qrA.applyQ(identity(core.columns))), sketch);
  const kept = Math.max(1, sigma.filter((value) => value > trimRatio * largestOf(sigma)).length);
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
  const worths = worth.slice(0, kept).map((value) => value * gain);
  return { rank: kept, a: a.data, b: b.data, sigma: worths };
}

interface Ranked extends Svd {
  /** What each rank is worth, descending. */
  readonly worth: Float64Array;
}

function withWorth(parts: Svd): Ranked {
  return { ...parts, worth: parts.sigma };
}

/** Qᵀ·C·Q: the covariance as the core sees it. */
function projected(covariance: Columns, q: Columns): Columns {
  return innerProducts(q, innerProducts(covariance, q));
}

/** x = Σ u_i·(u_iᵀ·x) over the directions u_i in which it moves outputs most: of all matrices of rank k, the first k terms
 *  are nearest in outputs. */
function orderedByOutput(
  x: Columns,
  covariance: Columns,
  sketch: { readonly rank: number; readonly seed: number },
): Ranked {
  const { left, sigma: worth } = outputDirections(x, covariance, sketch);
  const rows = innerProducts(x, left); // [columns, rank]: x's row in each direction
  const lengths = Float64Array.from(worth, (_, i) =>
    Math.sqrt(
      rows.data.subarray(i * rows.rows, (i + 1) * rows.rows).reduce((s, y) => s + y * y, 0),
    ),
  );
  const v = scaled(
    rows,
    lengths.map((length) => (length === 0 ? 0 : 1 / length)),
  );
  return { us: scaled(left, lengths), v, sigma: lengths, worth };
}

/** The same for a whole matrix, of which the first `rankMax` ranks are wanted. Borrows its input. */
export function squeezeMatrix(
  x: Columns, // [out, in]
  { rankMax, seed = 0, covariance }: SqueezeOptions & { readonly rankMax: number },
): SqueezedModule {
  const sketch = { rank: Math.min(rankMax, x.rows, x.columns), seed };
  const { us, v, sigma, worth } =
    covariance === undefined
      ? withWorth(largestSvd(x, sketch))
      : orderedByOutput(x, covariance, sketch);
  const rank = Math.max(1, sigma.filter((value) => value > trimRatio * largestOf(sigma)).length);
  const roots = sigma.slice(0, rank).map(Math.sqrt);
  const b = scaled(
    us,
    roots.map((root) => (root === 0 ? 0 : 1 / root)),
  );
  const a = scaled(v, roots);
  for (let i = 0; i < rank; i++) fixSign(a, b, i);
  return { rank, a: a.data, b: b.data, sigma: worth.slice(0, rank) };
}

/** The same product as what it was squeezed from. */
export function loraOf({ rank, a, b }: SqueezedModule): LoraModule {
  const sizes = { rank, in: a.length / rank, out: b.length / rank, scale: 1 };
  return { ...sizes, a, b: transpose({ rows: sizes.out, columns: rank, data: b }).data };
}

function largestOf(values: Float64Array): number {
  let largest = 0;
  for (const value of values) largest = Math.max(largest, Math.abs(value));
  return largest;
}

function divided(values: Float64Array, divisor: number): Float64Array {
  return divisor === 0 ? values : values.map((value) => value / divisor);
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
