// What a recipe says of families that have more than ranks: queryable's bank of atoms, flexmore's experts.

import { z } from 'zod';
import { rankMaxLimit } from '../adapters/adapter.ts';

/** What is null is the bank's that the adapter has from which training goes on; without one: 8 atoms, queries of 16 numbers, a
 *  choice for 5 layers. */
export interface BankRecipe {
  /** K. More than there are: these and their keys are all that trains. */
  readonly atoms: number | null;
  /** dq. */
  readonly queryWidth: number | null;
  /** Layers that share a choice. */
  readonly blockLayers: number | null;
  /** What an instruction's prior knows the atoms by. */
  readonly labels: readonly string[] | null;
  /** Weight in the loss of how unevenly atoms are chosen. */
  readonly balance: number;
  /** Of all steps, the first that mix all atoms. */
  readonly denseShare: number;
  /** What all examples are learnt under, as requests say it by `instruction_prior` and `prior_strength`. */
  readonly instruction: { readonly text: string; readonly strength: number } | null;
}

export interface ExpertRecipe {
  readonly name: string;
  readonly rank: number;
}

// Atoms, and numbers of a query, are as many as ranks at most.
const size = z.int().min(1).max(rankMaxLimit);
export const bankSchema: z.ZodType<BankRecipe, unknown> = z.strictObject({
  atoms: size.nullable().default(null),
  queryWidth: size.nullable().default(null),
  blockLayers: z.int().min(1).max(9_999).nullable().default(null),
  labels: z.array(z.string().min(1).max(1000)).min(1).max(rankMaxLimit).nullable().default(null),
  // Section 6's, as are the sizes.
  balance: z.number().min(0).max(1e3).default(1e-2),
  denseShare: z.number().min(0).max(1).default(0.1),
  instruction: z
    .strictObject({
      text: z.string().min(1).max(2000),
      strength: z.number().min(0).max(100).default(0.5),
    })
    .nullable()
    .default(null),
});

export const expertSchema: z.ZodType<ExpertRecipe> = z.strictObject({
  name: z.string().min(1).max(64),
  rank: z.int().min(1).max(rankMaxLimit),
});
