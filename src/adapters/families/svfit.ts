// SVFit (arXiv 2409.05926): W = U·diag(s)·Vᵀ, and only the r largest s change: y += U_r·(δs ⊙ V_rᵀ·x). U_r and V_r are the base's
// own and shared by all adapters of it (the basis), so an adapter is r numbers a module.

import { type ServedModule, servedPair } from '../served.ts';
import { type Family, pairFamily, type Site, slice } from './family.ts';
import { columnsOf, zeros } from './matrices.ts';
import { singularBasis } from './singular-basis.ts';

export interface SvfitOptions {
  readonly rank: number;
}

export function svfit({ rank }: SvfitOptions): Family {
  const family: Family = pairFamily({
    kind: 'svfit',
    describe: `SVFit of the ${rank} largest singular values`,
    axes: { deltas: ['rank', 1] },
    trained: ['deltas'],
    init: (site) => ({ deltas: zeros(Math.min(rank, singularBasis(site).sigma.length), 1) }),
    pair(site, tensors, k) {
      const { deltas } = k === null ? tensors : slice(family, tensors, k);
      const { u, v } = singularBasis(site);
      const { columns, data } = deltas!;
      return {
        a: columnsOf(v, 0, columns),
        b: columnsOf(u, 0, columns),
        gates: data,
        gradient: (d) => ({ deltas: { rows: 1, columns, data: d.gates } }),
      };
    },
    fromPeft: () => "a LoRA's directions are its own, svfit's are the base's",
  });
  const serve = (
    site: Site,
    { deltas }: Readonly<Record<string, { data: Float64Array }>>,
  ): ServedModule => {
    const { block, projection, in: width, out } = site;
    const gates = Float32Array.from(deltas!.data);
    const sizes = { in: width, out, rank: gates.length };
    return { block, projection, ...sizes, a: null, b: null, gates, bias: null };
  };
  return { ...family, serve };
}

/** A module of the basis file: A = V_rᵀ, B = U_r. */
export function svfitBasis(site: Site, rank: number): ServedModule {
  const { u, v, sigma } = singularBasis(site);
  const kept = Math.min(rank, sigma.length);
  return servedPair(site, {
    rank: kept,
    a: columnsOf(v, 0, kept).data,
    b: columnsOf(u, 0, kept).data,
  });
}
