// Trained Rank Pruning (arXiv 1910.04576) of dW = s·B·A instead of W: every few steps the product is cut to the ranks that
// hold most of its energy, and between them its nuclear norm is held down. Both go through the R × R core of its factors'
// QR (squeeze.ts), so nothing of the product's size is made. Factors are rank-major: as columns A is [in, R] and B [out, R].

import { times } from '../adapters/families/matrices.ts';
import {
  type Columns,
  innerProducts,
  multiplyTransposed,
  type Qr,
  qr,
  scaled,
  svd,
} from '../adapters/orthogonal.ts';
import type { Parameter } from './optimizers/optimizer.ts';

export interface LowRankPair {
  readonly a: Parameter; // [R, in]
  readonly b: Parameter; // [R, out]
}

interface Core {
  readonly ofA: Qr;
  readonly ofB: Qr;
  /** Left and right singular vectors of R_B·R_Aᵀ, orthonormal where sigma is not nothing. */
  readonly u: Columns; // [R, R]
  readonly v: Columns; // [R, R]
  readonly sigma: Float64Array; // [R]
}

function coreOf({ a, b }: LowRankPair): Core {
  const ofA = qr(columnsOf(a));
  const ofB = qr(columnsOf(b));
  const { us, v, sigma } = svd(multiplyTransposed(ofB.r, ofA.r));
  const u = scaled(
    us,
    sigma.map((size) => (size === 0 ? 0 : 1 / size)),
  );
  return { ofA, ofB, u, v, sigma };
}

function columnsOf({ values, rows, columns }: Parameter): Columns {
  return { rows: columns, columns: rows, data: Float64Array.from(values) };
}

function first({ rows, data }: Columns, count: number): Columns {
  return { rows, columns: count, data: data.subarray(0, rows * count) };
}

/** The fewest ranks that hold this share of Σσ²; all of them for 1. */
export function ranksOfEnergy(sigma: Float64Array, energy: number): number {
  if (energy >= 1) return sigma.length;
  const total = sigma.reduce((sum, size) => sum + size * size, 0);
  let held = 0;
  const last = sigma.findIndex((size) => {
    held += size * size;
    return held >= energy * total;
  });
  return last + 1;
}

/** Cuts B·A to the nearest product of the fewest ranks that hold this energy; returns how many. Only B changes, to what of
 *  it lies in the kept directions: the rows stay what an optimiser's moments are about, and pruned ranks can grow again. */
export function truncateProduct(pair: LowRankPair, energy: number): number {
  if (energy >= 1) return pair.a.rows;
  const { ofB, u, sigma } = coreOf(pair);
  const rank = ranksOfEnergy(sigma, energy);
  const kept = first(u, rank);
  pair.b.values.set(ofB.applyQ(times(kept, innerProducts(kept, ofB.r))).data);
  return rank;
}

// Of the largest singular value: below it, what f32 factors left of a direction that is not there.
const negligible = 1e-7;

/** Adds weight·∂‖s·B·A‖_*: for the product that is U·Vᵀ over the singular vectors it has. */
export function addNuclearGradient(
  pair: LowRankPair,
  { weight, scale }: { readonly weight: number; readonly scale: number },
): void {
  if (weight === 0) return;
  const { ofA, ofB, u, v, sigma } = coreOf(pair);
  const rank = sigma.filter((size) => size > negligible * sigma[0]!).length;
  const [left, right] = [first(u, rank), first(v, rank)];
  const factor = weight * Math.abs(scale);
  const toA = ofA.applyQ(times(right, innerProducts(left, ofB.r))); // [in, R]
  const toB = ofB.applyQ(times(left, innerProducts(right, ofA.r))); // [out, R]
  for (const [{ gradient }, { data }] of [
    [pair.a, toA],
    [pair.b, toB],
  ] as const) {
    for (let i = 0; i < gradient.length; i++) gradient[i]! += factor * data[i]!;
  }
}
