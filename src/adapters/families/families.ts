// A kind and its options, as a family's own directory states them (rankgate.json), → that family. eora has no numbers of its
// own: it is a lora that `adapters compensate` makes.

import { z } from 'zod';
import { GatewayError } from '../../errors.ts';
import { type AdapterKind, rankMaxLimit } from '../adapter.ts';
import type { Family } from './family.ts';
import { flexmore } from './flexmore.ts';
import { fly } from './fly.ts';
import { hydra } from './hydra.ts';
import { lora } from './lora.ts';
import { matryoshka } from './matryoshka.ts';
import { mora } from './mora.ts';
import { queryable } from './queryable.ts';
import { salt } from './salt.ts';
import { svfit } from './svfit.ts';
import { triangular } from './triangular.ts';

export type FamilyKind = Exclude<AdapterKind, 'eora'>;

const rank = z.int().min(1).max(rankMaxLimit);
const alpha = z.number().positive().max(1e6);
const order = z.enum(['svd', 'as-trained']).default('svd');
const seed = z
  .string()
  .regex(/^[0-9a-f]{16}$/)
  .transform((hex) => BigInt(`0x${hex}`));

const openers: Readonly<Record<FamilyKind, (options: unknown) => Family>> = {
  lora: opener(z.strictObject({ rank, alpha, rslora: z.boolean().default(false), order }), lora),
  matryoshka: opener(
    z.strictObject({
      maxRank: rank,
      ranks: z.array(rank).min(1).max(rankMaxLimit),
      scaling: z.enum(['none', 'rank', 'sqrt']).default('none'),
      mask: z.enum(['diag', 'binary', 'prefix']).default('diag'),
      order: z.enum(['svd', 'as-trained', 'as-published']).default('svd'),
    }),
    matryoshka,
  ),
  queryable: opener(
    z.strictObject({
      rank,
      alpha,
      atoms: z.int().min(1).max(256),
      queryWidth: z.int().min(1).max(256).default(16),
      topK: z.int().min(1).max(256).default(2),
      earlierBlocks: z.boolean().default(true),
      bias: z.null().default(null),
    }),
    queryable,
  ),
  fly: opener(
    z.strictObject({
      rank,
      topK: rank,
      alpha,
      seed,
      score: z.enum(['abs_plus_bias', 'signed', 'abs_sum']).default('abs_plus_bias'),
    }),
    fly,
  ),
  svfit: opener(z.strictObject({ rank: rank.default(64) }), svfit),
  hydra: opener(z.strictObject({ rank: rank.max(rankMaxLimit / 2), alpha }), hydra),
  flexmore: opener(
    z.strictObject({
      experts: z
        .array(z.strictObject({ name: z.string().min(1).max(200), rank }))
        .min(1)
        .max(64),
    }),
    flexmore,
  ),
  mora: opener(
    z.strictObject({
      rank,
      topK: rank,
      temperature: z.number().positive().max(1e6).default(0.1),
      frozen: z.int().min(0).max(rankMaxLimit).default(0),
    }),
    mora,
  ),
  salt: opener(z.strictObject({ rank, tailRank: z.int().min(0).max(rankMaxLimit) }), salt),
  triangular: opener(z.strictObject({ rank, alpha }), triangular),
};

function opener<O>(schema: z.ZodType<O>, open: (options: O) => Family): (raw: unknown) => Family {
  return (raw) => {
    const parsed = schema.safeParse(raw);
    if (parsed.success) return open(parsed.data);
    const issue = parsed.error.issues[0];
    const where = issue?.path.join('.') || 'options';
    throw new GatewayError('INVALID_ADAPTER', `${where}: ${issue?.message ?? 'invalid'}`);
  };
}

/** Throws INVALID_ADAPTER for options that the family does not have or that are out of range. */
export function openFamily(kind: FamilyKind, options: unknown): Family {
  return openers[kind](options);
}
