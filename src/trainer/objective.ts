// What a step minimises, as passes through the decoder: what each rank is multiplied with, and the pass's share of the loss
// (MatryoshkaLoRA, arXiv 2605.07850, Algorithm 1, and algorithms.md section 1). Gradients of a step's passes add up.

import { publishedP, scaleOf } from '../adapters/families/matryoshka.ts';
import { createRandom, type Random } from '../adapters/families/seeded-random.ts';
import type { Recipe } from '../jobs/recipe.ts';

export interface Pass {
  readonly gates: Float64Array; // [R]
  readonly weight: number;
}

/** What keeps apart the draws of one recipe's seed; families.ts's are numbers of modules, which are smaller. */
export const streams = { order: 0xffff0000, objective: 0xffff0001 } as const;

type Trained = Pick<Recipe, 'rank' | 'ranks' | 'scaling' | 'objective' | 'seed'>;

/** Of step `step`, from 0; always in the same order. */
export function passesOf(recipe: Trained, step: number): readonly Pass[] {
  const { rank, ranks, scaling, objective, seed } = recipe;
  const prefix = (q: number, weight: number): Pass => ({
    gates: Float64Array.from({ length: rank }, (_, i) => (i < q ? scaleOf(scaling, q) : 0)),
    weight,
  });
  const drawn = (among: readonly number[]): number => {
    const random: Random = createRandom(BigInt(seed), [streams.objective, step]);
    return among[random.below(among.length)]!;
  };
  switch (objective) {
    case 'plain':
      return [prefix(rank, 1)];
    case 'diag':
      return [{ gates: publishedP(rank, ranks, scaling), weight: 1 }];
    case 'binary': {
      const gates = publishedP(rank, ranks, scaling).map((p) => p / ranks.length);
      return [{ gates, weight: 1 }];
    }
    case 'dylora':
      return [prefix(drawn(ranks), 1)];
    case 'multi':
      return ranks.map((q) => prefix(q, 1 / ranks.length));
    case 'sandwich':
      if (ranks.length === 1) return [prefix(rank, 1)];
      return [prefix(rank, 0.5), prefix(drawn(ranks.slice(0, -1)), 0.5)];
  }
}
