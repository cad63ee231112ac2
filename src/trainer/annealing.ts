// LoRA-Squeeze while it trains (arXiv 2602.10993, algorithms.md section 17): a lora begins with more ranks than it is to have, and its
// products are cut to the best of fewer: `anneal`, little by little on the way; `post`, at the end. The section gives no
// schedule: ours halves the ranks at equal distances in the first part of the run. What was moved about rows that are others now
// is forgotten: optimisers begin anew. Ranks that are gone are zero in A and B, which nothing moves that moves numbers one by one.

import { transpose } from '../adapters/orthogonal.ts';
import { openPacked, type PackedAdapter } from '../adapters/pack.ts';
import { squeezePacked } from '../adapters/pack-pairs.ts';
import { squeezeModule } from '../adapters/squeeze.ts';
import { GatewayError } from '../errors.ts';
import type { Recipe } from '../jobs/recipe.ts';
import type { Parameter } from './optimizers/optimizer.ts';
import { pairsOf } from './regularizer.ts';
import type { LowRankPair } from './trp.ts';

/** What a module is trained with at first. */
export function ranksBefore({ rank, squeeze }: Pick<Recipe, 'rank' | 'squeeze'>): number {
  return squeeze === null || squeeze.kind === 'cont' ? rank : squeeze.from;
}

/** What is left after step `step` of `steps`, counted from 1. */
export function ranksAfter(
  { rank, squeeze }: Pick<Recipe, 'rank' | 'squeeze'>,
  step: number,
  steps: number,
): number {
  const from = ranksBefore({ rank, squeeze });
  if (squeeze?.kind !== 'anneal') return step < steps ? from : rank;
  const halvings = Math.ceil(Math.log2(from / rank));
  const done = Math.floor((halvings * step) / Math.max(1, squeeze.share * steps));
  return step < steps ? Math.max(rank, Math.ceil(from / 2 ** done)) : rank;
}

/** What training goes on from: with `cont`, of no more ranks than are wanted. Throws INVALID_REQUEST when there is nothing. */
export function startOf(
  { rank, squeeze }: Pick<Recipe, 'rank' | 'squeeze'>,
  start: PackedAdapter | null,
): PackedAdapter | null {
  if (squeeze?.kind !== 'cont') return start;
  if (start === null) {
    const message = 'squeeze cont cuts an adapter that training goes on from: there is none';
    throw new GatewayError('INVALID_REQUEST', message, { param: 'squeeze.kind' });
  }
  if (start.manifest.rankMax <= rank) return start;
  return openPacked(squeezePacked(start, { rank }).bytes, start.generation);
}

/** Cuts what has more ranks; whether anything had. */
export function cutProducts(parameters: readonly Parameter[], ranks: number): boolean {
  const larger = pairsOf(parameters).filter(({ a }) =>
    a.values.subarray(ranks * a.columns).some((value) => value !== 0),
  );
  for (const pair of larger) cutProduct(pair, ranks);
  return larger.length > 0;
}

function cutProduct({ a, b }: LowRankPair, ranks: number): void {
  const left = { rows: b.columns, columns: b.rows, data: Float64Array.from(b.values) }; // [out, R]
  const cut = squeezeModule(
    {
      ...{ rank: a.rows, in: a.columns, out: b.columns, scale: 1 },
      a: Float64Array.from(a.values),
      b: transpose(left).data,
    },
    { rankMax: ranks },
  );
  a.values.fill(0, ranks * a.columns);
  b.values.fill(0, ranks * b.columns);
  // A product of nothing has no directions: its A stays, to learn.
  if (cut.sigma[0] === 0) return;
  for (const [{ values }, kept] of [
    [a, cut.a],
    [b, cut.b],
  ] as const) {
    values.fill(0);
    values.set(kept);
  }
}
