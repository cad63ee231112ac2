// LoRA: y += s·B·A·x with s = alpha/r, or alpha/√r (rsLoRA). Published in the order of its SVD, so that every prefix of its ranks
// is the best adapter of that size (algorithms.md sections 1 and 17).

import {
  constantGates,
  type Family,
  pairFamily,
  type RankOrder,
  slice,
  tensorsOf,
} from './family.ts';
import { filled, uniform, zeros } from './matrices.ts';

export interface LoraOptions {
  readonly rank: number;
  readonly alpha: number;
  readonly rslora: boolean;
  readonly order: RankOrder;
}

export function lora({ rank, alpha, rslora, order }: LoraOptions): Family {
  // The trained rank's scale also for prefixes: slicing takes ranks away and changes nothing else.
  const scale = alpha / (rslora ? Math.sqrt(rank) : rank);
  const family: Family = pairFamily({
    kind: 'lora',
    describe: `LoRA of rank ${rank}, alpha ${alpha}${rslora ? ' (rsLoRA)' : ''}`,
    axes: { a: ['rank', 'in'], b: ['rank', 'out'] },
    trained: ['a', 'b'],
    order,
    init: (site, random) => ({
      a: filled(rank, site.in, uniform(1 / Math.sqrt(site.in), random)),
      b: zeros(rank, site.out),
    }),
    pair(_site, tensors, k) {
      const { a, b } = k === null ? tensors : slice(family, tensors, k);
      return constantGates(a!, b!, scale);
    },
    fromPeft(_site, module) {
      const { a, b } = tensorsOf({ ...module, scale: module.scale / scale });
      return { a, b };
    },
  });
  return family;
}
