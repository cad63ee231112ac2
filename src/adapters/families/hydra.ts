// Hydra: a parallel branch on the input and a sequential one on the base's output, y += s·B_p·A_p·x + s·B_s·A_s·(W0·x). As W0 is
// linear the second is a LoRA with A_s·W0, so the whole is one of rank 2r: A = [A_p; A_s·W0], B = [B_p, B_s]. The bases that
// we serve have no bias in a projection, so neither has this. r counts ranks of each branch.

import type { Columns } from '../orthogonal.ts';
import { type Family, pairFamily, slice, tensorsOf } from './family.ts';
import { beside, columnsOf, filled, times, transposedTimes, uniform, zeros } from './matrices.ts';

export interface HydraOptions {
  readonly rank: number;
  readonly alpha: number;
}

export function hydra({ rank, alpha }: HydraOptions): Family {
  const scale = alpha / rank;
  const half = (x: Columns, index: 0 | 1): Columns =>
    columnsOf(x, (index * x.columns) / 2, x.columns / 2);
  const family: Family = pairFamily({
    kind: 'hydra',
    describe: `Hydra: rank ${rank} beside and rank ${rank} after the base's layer, alpha ${alpha}`,
    axes: {
      'parallel.a': ['rank', 'in'],
      'parallel.b': ['rank', 'out'],
      'sequential.a': ['rank', 'out'],
      'sequential.b': ['rank', 'out'],
    },
    trained: ['parallel.a', 'parallel.b', 'sequential.a', 'sequential.b'],
    init: (site, random) => ({
      'parallel.a': filled(rank, site.in, uniform(1 / Math.sqrt(site.in), random)),
      'parallel.b': zeros(rank, site.out),
      'sequential.a': filled(rank, site.out, uniform(1 / Math.sqrt(site.out), random)),
      'sequential.b': zeros(rank, site.out),
    }),
    pair(site, tensors, k) {
      const kept = k === null ? tensors : slice(family, tensors, k);
      const weight = site.weight(); // [in, out]
      return {
        a: beside(kept['parallel.a']!, times(weight, kept['sequential.a']!)),
        b: beside(kept['parallel.b']!, kept['sequential.b']!),
        gates: new Float64Array(2 * kept['parallel.a']!.columns).fill(scale),
        gradient: (d) => ({
          'parallel.a': half(d.a, 0),
          'parallel.b': half(d.b, 0),
          'sequential.a': transposedTimes(weight, half(d.a, 1)),
          'sequential.b': half(d.b, 1),
        }),
      };
    },
    fromPeft(site, module) {
      const { a, b } = tensorsOf({ ...module, scale: module.scale / scale });
      const none = zeros(module.rank, site.out);
      return { 'parallel.a': a, 'parallel.b': b, 'sequential.a': none, 'sequential.b': none };
    },
  });
  return family;
}
