// What a recipe says of ranks and directions: which a run chooses (codyra), which it takes away (squeeze), and which it must leave
// as they are (coso).

import { z } from 'zod';
import { rankMaxLimit } from '../adapters/adapter.ts';

/** CoDyRA: ranks have gates, which a threshold closes: none for this share of the steps, then rising in a line. */
export interface CodyraRecipe {
  readonly kind: 'codyra';
  readonly denseShare: number;
  readonly thresholdMax: number;
}

/** LoRA-Squeeze: trained with `from` ranks, and cut to `rank` of them: at the end, or by halves in the first `share` of the run.
 *  `cont`: an adapter with more ranks is cut first, and trained on. */
export type SqueezeRecipe =
  | { readonly kind: 'cont' }
  | { readonly kind: 'post'; readonly from: number }
  | { readonly kind: 'anneal'; readonly from: number; readonly share: number };

/** CoSO: what the adapter does to earlier data stays, and what it then does to this run's stays from now on. `directions` that A
 *  moves in, chosen every `gap` steps; what is kept of a module: the directions with so much of the energy of its gradients,
 *  as `sketch` rows stand for them, all runs together at most `keptMax`. */
export interface CosoRecipe {
  readonly kind: 'coso';
  readonly directions: number;
  readonly gap: number;
  readonly sketch: number;
  readonly energy: number;
  readonly keptMax: number;
}

const rank = z.int().min(1).max(rankMaxLimit);
const share = z.number().min(0).max(1);

export const codyraSchema: z.ZodType<CodyraRecipe, unknown> = z.strictObject({
  kind: z.literal('codyra'),
  denseShare: share.default(0.5), // the publication's, as is the threshold: for 500 steps
  thresholdMax: z.number().positive().max(10).default(0.005),
});

export const squeezeSchema: z.ZodType<SqueezeRecipe, unknown> = z.discriminatedUnion('kind', [
  z.strictObject({ kind: z.literal('cont') }),
  z.strictObject({ kind: z.literal('post'), from: rank }),
  // The share is a guess: as many steps again with the ranks that are left.
  z.strictObject({ kind: z.literal('anneal'), from: rank, share: share.default(0.5) }),
]);

export const cosoSchema: z.ZodType<CosoRecipe, unknown> = z.strictObject({
  kind: z.literal('coso'),
  directions: rank.default(16), // published: 15 to 70
  gap: z.int().min(1).max(1_000_000).default(20), // published: 1 to 20
  // Published: 100 to 160. Measured on the default base, all modules, 16 ranks: 2.3 s of a core a step with 32, 6.9 with 100.
  sketch: z.int().min(2).max(512).default(32),
  energy: share.default(0.98), // the publication's
  keptMax: z.int().min(1).max(1024).default(128), // guess
});
