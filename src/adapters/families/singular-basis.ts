// The base's own singular vectors, W = U·diag(s)·Vᵀ (thin), which svfit and salt adapt in. By squeeze.ts's exact SVD of the product
// of W and a unit matrix; seconds for the matrices of a small model: not for an event loop.

import type { Columns } from '../orthogonal.ts';
import { squeezeModule } from '../squeeze.ts';
import type { Site } from './family.ts';

export interface SingularBasis {
  readonly u: Columns; // [out, n]
  readonly v: Columns; // [in, n]
  readonly sigma: Float64Array; // [n], descending
}

const made = new WeakMap<Site, SingularBasis>();

/** Made once for a site. n ≤ min(in, out): directions that W does not have are left out. */
export function singularBasis(site: Site): SingularBasis {
  const known = made.get(site);
  if (known !== undefined) return known;
  const rank = Math.min(site.in, site.out);
  const unit = new Float64Array(rank * rank);
  for (let i = 0; i < rank; i++) unit[i * rank + i] = 1;
  const weight = site.weight().data; // [out, in]
  const [a, b] = rank === site.in ? [unit, weight] : [weight, unit];
  const squeezed = squeezeModule({ rank, in: site.in, out: site.out, a, b, scale: 1 });
  const { sigma } = squeezed;
  const normed = (data: Float64Array, rows: number): Columns => ({
    rows,
    columns: sigma.length,
    data: data.map((value, i) => value / Math.sqrt(sigma[Math.floor(i / rows)]! || 1)),
  });
  const basis = { u: normed(squeezed.b, site.out), v: normed(squeezed.a, site.in), sigma };
  made.set(site, basis);
  return basis;
}

/** The least rank that keeps this share of Σs². */
export function rankAtEnergy(sigma: Float64Array, share: number): number {
  const total = sigma.reduce((sum, s) => sum + s * s, 0);
  let kept = 0;
  const index = sigma.findIndex((s) => {
    kept += s * s;
    return kept >= share * total;
  });
  return index < 0 ? sigma.length : index + 1;
}
