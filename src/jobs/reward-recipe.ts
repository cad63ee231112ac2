// Rewards that a recipe can name: scores of answers, 0 … 1. What callers say of answers is none of them: it is of answers that
// were given, and a member of a generation gives new ones. It comes in by what they are compared with: a refresh's lines
// hold each question's best answer or its correction.

import { z } from 'zod';

/** OpenAI's: equal, not equal, holds it, holds it in any case. */
export const checkOperations = ['eq', 'ne', 'like', 'ilike'] as const;

/** Of what both texts have: the longest common sequence of characters (`fuzzy_match`, of the first 4096 of each) or of
 *  words (`rouge_l`), or n-grams of words, those of one to four for `gleu`. */
export const similarityMetrics = [
  'fuzzy_match',
  'gleu',
  'rouge_1',
  'rouge_2',
  'rouge_3',
  'rouge_4',
  'rouge_5',
  'rouge_l',
] as const;

/** null: the example's own answer. */
type Reference = string | null;

export type SingleReward =
  /** Whether it ends with a full stop. */
  | { readonly kind: 'full-stop' }
  /** Whether it is the example's own, white space at the ends aside. */
  | { readonly kind: 'expected' }
  /** How near it is to so many tokens. */
  | { readonly kind: 'length'; readonly tokens: number }
  /** Whether it is JSON. */
  | { readonly kind: 'json' }
  /** Whether its last number is that of the example's own, give or take so much. */
  | { readonly kind: 'number'; readonly tolerance: number }
  | {
      readonly kind: 'check';
      readonly operation: (typeof checkOperations)[number];
      readonly reference: Reference;
    }
  | {
      readonly kind: 'similarity';
      readonly metric: (typeof similarityMetrics)[number];
      readonly reference: Reference;
    }
  /** How probable `yes` is, of `yes` and `no`, as the first word of what the base says to this question about it. */
  | { readonly kind: 'judge'; readonly question: string };

export type RewardRecipe =
  | SingleReward
  /** Weights of more than 0, in all at most 1. */
  | {
      readonly kind: 'weighted';
      readonly parts: readonly { readonly weight: number; readonly reward: SingleReward }[];
    };

// Jobs are listed by the hundred, each with its recipe.
const text = z.string().min(1).max(1024);
const reference = text.nullable().default(null);
const single = [
  z.strictObject({ kind: z.literal('full-stop') }),
  z.strictObject({ kind: z.literal('expected') }),
  z.strictObject({ kind: z.literal('length'), tokens: z.int().min(1).max(4096) }),
  z.strictObject({ kind: z.literal('json') }),
  z.strictObject({ kind: z.literal('number'), tolerance: z.number().min(0).max(1e9).default(0) }),
  z.strictObject({ kind: z.literal('check'), operation: z.enum(checkOperations), reference }),
  z.strictObject({ kind: z.literal('similarity'), metric: z.enum(similarityMetrics), reference }),
  z.strictObject({ kind: z.literal('judge'), question: text }),
] as const;
const part = z.strictObject({
  weight: z.number().gt(0).max(1),
  reward: z.discriminatedUnion('kind', single),
});
const weighted = z.strictObject({
  kind: z.literal('weighted'),
  parts: z
    .array(part)
    .min(1)
    .max(8)
    .refine(
      (parts) => parts.reduce((sum, { weight }) => sum + weight, 0) < 1 + 1e-9,
      'weights add up to more than 1',
    )
    .refine(
      (parts) => parts.filter(({ reward }) => reward.kind === 'judge').length < 2,
      'more than one judge',
    ),
});

export const rewardSchema: z.ZodType<RewardRecipe> = z.discriminatedUnion('kind', [
  ...single,
  weighted,
]);
