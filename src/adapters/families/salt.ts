// SALT: W = U·diag(s)·Vᵀ. The k largest values become relu(α·s + β), and the rest of the matrix of values gains X·Y of a small rank.
// Y starts at 0 and only the diagonal is clipped, so that the start is exactly W (the publication starts 1e-4 away from
// it, and its ReLU clips half of X·Y). Served as a pair: U_k·diag(relu(α·s + β) − s)·V_kᵀ beside (U_t·X)·(Y·V_tᵀ).

import { type Family, pairFamily, slice } from './family.ts';
import { beside, columnsOf, filled, times, transposedTimes, zeros } from './matrices.ts';
import { singularBasis } from './singular-basis.ts';

export interface SaltOptions {
  /** k: values with α and β. A prefix of the rank is a prefix of these; the tail always stays. */
  readonly rank: number;
  readonly tailRank: number;
}

export function salt({ rank, tailRank }: SaltOptions): Family {
  const family: Family = pairFamily({
    kind: 'salt',
    describe: `SALT: the ${rank} largest singular values scaled and shifted, the rest by rank ${tailRank}`,
    axes: {
      alpha: ['rank', 1],
      beta: ['rank', 1],
      x: [tailRank, 'rest'], // columns of X, of length m' = n' = min(in, out) − k
      y: [tailRank, 'rest'], // rows of Y
    },
    trained: ['alpha', 'beta', 'x', 'y'],
    init(site, random) {
      const values = singularBasis(site).sigma.length;
      const kept = Math.min(rank, values);
      return {
        alpha: filled(kept, 1, () => 1),
        beta: zeros(kept, 1),
        x: filled(tailRank, values - kept, () => 0.01 * random.normal()),
        y: zeros(tailRank, values - kept),
      };
    },
    pair(site, tensors, k) {
      const { alpha, beta, x, y } = k === null ? tensors : slice(family, tensors, k);
      const { u, v, sigma } = singularBasis(site);
      const kept = alpha!.columns;
      const first = sigma.length - x!.rows;
      const [tailU, tailV] = [columnsOf(u, first, x!.rows), columnsOf(v, first, x!.rows)];
      const raw = alpha!.data.map((value, i) => value * sigma[i]! + beta!.data[i]!);
      const gates = new Float64Array(kept + tailRank).fill(1);
      raw.forEach((value, i) => {
        gates[i] = Math.max(0, value) - sigma[i]!;
      });
      return {
        a: beside(columnsOf(v, 0, kept), times(tailV, y!)),
        b: beside(columnsOf(u, 0, kept), times(tailU, x!)),
        gates,
        gradient(d) {
          const shift = raw.map((value, i) => (value > 0 ? d.gates[i]! : 0));
          return {
            alpha: { rows: 1, columns: kept, data: shift.map((value, i) => value * sigma[i]!) },
            beta: { rows: 1, columns: kept, data: shift },
            x: transposedTimes(tailU, columnsOf(d.b, kept, tailRank)),
            y: transposedTimes(tailV, columnsOf(d.a, kept, tailRank)),
          };
        },
      };
    },
    fromPeft: () => "a LoRA's directions are its own, salt's are the base's",
  });
  return family;
}
