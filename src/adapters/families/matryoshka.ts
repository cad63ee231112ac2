// MatryoshkaLoRA (arXiv 2605.07850): trained at several ranks S at once, as x·Σ_q s_q A[:, :q]·B[:q], which is one pass with A's
// ranks times P_r = Σ over q in S, q ≥ r, of s_q. How its prefixes are served, and what that costs in quality, is measured
// in algorithms.md section 1: folding P and ordering by SVD once, at publication, is the default.

import { GatewayError } from '../../errors.ts';
import { servedPair } from '../served.ts';
import { constantGates, type Family, pairFamily, peftOf, refuse, slice } from './family.ts';
import { filled, uniform, zeros } from './matrices.ts';

export type Scaling = 'none' | 'rank' | 'sqrt';
/** `svd`: what was trained, ordered. `as-trained`: prefixes that were trained as such (multi, dylora, sandwich).
 *  `as-published`: the publication's inference, s_k·A[:, :k]·B[:k] without P, whatever was trained. */
export type PublishOrder = 'svd' | 'as-trained' | 'as-published';

export interface MatryoshkaOptions {
  readonly maxRank: number;
  /** S, rising. */
  readonly ranks: readonly number[];
  readonly scaling: Scaling;
  /** `diag`: as above. `binary`: the publication's other mask, the same sum divided by |S|. `prefix`: one rank of S at a
   *  time, by an objective of the trainer's; the trained function is the largest rank's. */
  readonly mask: 'diag' | 'binary' | 'prefix';
  readonly order: PublishOrder;
}

/** s_r. */
export function scaleOf(scaling: Scaling, rank: number): number {
  switch (scaling) {
    case 'none':
      return 1;
    case 'rank':
      return 1 / rank;
    case 'sqrt':
      return 1 / Math.sqrt(rank);
  }
}

/** P [R]; ranks above the largest of S have 0 and never train. */
export function publishedP(
  maxRank: number,
  ranks: readonly number[],
  scaling: Scaling,
): Float64Array {
  return Float64Array.from({ length: maxRank }, (_, i) =>
    ranks.filter((q) => q > i).reduce((sum, q) => sum + scaleOf(scaling, q), 0),
  );
}

export function matryoshka(options: MatryoshkaOptions): Family {
  const { maxRank, ranks, scaling, mask, order } = options;
  const largest = ranks.at(-1);
  if (
    largest === undefined ||
    largest > maxRank ||
    ranks.some((q, i) => q <= (ranks[i - 1] ?? 0))
  ) {
    throw new GatewayError('INVALID_REQUEST', `matryoshka: ranks must rise from 1 to ${maxRank}`);
  }
  if (order === 'as-trained' && mask !== 'prefix') {
    const message = `matryoshka: ${mask} trains a sum of prefixes, and none as it is served`;
    throw new GatewayError('INVALID_REQUEST', message);
  }
  const trainedGates =
    mask === 'prefix'
      ? Float64Array.from({ length: maxRank }, (_, i) =>
          i < largest ? scaleOf(scaling, largest) : 0,
        )
      : publishedP(maxRank, ranks, scaling).map((p) => (mask === 'binary' ? p / ranks.length : p));
  const family: Family = pairFamily({
    kind: 'matryoshka',
    describe: `Matryoshka LoRA trained at ranks ${ranks.join(', ')} (${mask}, scale ${scaling}), published ${order}`,
    axes: { a: ['rank', 'in'], b: ['rank', 'out'] },
    trained: ['a', 'b'],
    // The publication draws A as a tensor (in, R), whose fan-in is R: 8.5 times PEFT's entries at in 576, R 8.
    init: (site, random) => ({
      a: filled(maxRank, site.in, uniform(1 / Math.sqrt(maxRank), random)),
      b: zeros(maxRank, site.out),
    }),
    pair(_site, tensors, k) {
      if (k !== null) {
        const { a, b } = slice(family, tensors, k);
        return constantGates(a!, b!, scaleOf(scaling, k));
      }
      const { a, b } = tensors;
      if (a!.columns > maxRank) refuse('matryoshka:', `a has ${a!.columns} ranks, want ${maxRank}`);
      return { ...constantGates(a!, b!, 1), gates: trainedGates.slice(0, a!.columns) };
    },
    // The publication's rule for a prefix: alpha r, 1, or 1 with rsLoRA make PEFT's scale 1, 1/r, 1/√r.
    toPeft(_site, tensors, k) {
      const prefix = slice(family, tensors, k);
      const pair = peftOf(constantGates(prefix.a!, prefix.b!, 1));
      return { ...pair, alpha: scaling === 'none' ? k : 1, rslora: scaling === 'sqrt' };
    },
    fromPeft: () => 'which ranks it was trained at, and with which scales, a LoRA does not say',
  });
  if (order === 'svd') return family;
  return {
    ...family,
    serve(site, { a, b }) {
      if (scaling === 'none') return servedPair(site, { rank: a!.columns, a: a!.data, b: b!.data });
      const message = `matryoshka: published ${order}, every rank has a scale (${scaling}) of its own`;
      throw new GatewayError('UNSUPPORTED', `${message}, which packed files have not: publish svd`);
    },
  };
}
