// Everything that decides a training run, as plain JSON: the same recipe, files and base give the same adapter, byte for
// byte, on a CPU with one thread. Names and defaults are those of algorithms.md; what this build does not have is refused by
// its name, and so is every combination that could not be published.

import { z } from 'zod';
import { rankMaxLimit } from '../adapters/adapter.ts';
import type { PublishOrder, Scaling } from '../adapters/families/matryoshka.ts';
import type { LevelRule } from '../adapters/pack-pairs.ts';
import { GatewayError } from '../errors.ts';
import { type Projection, projections } from '../model/decoder-config.ts';
import { type BankRecipe, bankSchema, type ExpertRecipe, expertSchema } from './family-recipe.ts';
import {
  type CodyraRecipe,
  type CosoRecipe,
  codyraSchema,
  cosoSchema,
  type SqueezeRecipe,
  squeezeSchema,
} from './rank-recipe.ts';
import { conflict } from './recipe-rules.ts';
import { type RewardRecipe, rewardSchema } from './reward-recipe.ts';

/** `plain`: all ranks at once, as LoRA. `diag`, `binary`: the sum of the prefixes S in one pass, as published. `dylora`: one
 *  prefix of S a step. `multi`: the mean of all prefixes' losses. `sandwich`: that of the whole and one smaller prefix. */
export const objectives = ['plain', 'diag', 'binary', 'dylora', 'multi', 'sandwich'] as const;
export type Objective = (typeof objectives)[number];

interface Moments {
  readonly beta1: number;
  readonly beta2: number;
  readonly epsilon: number;
}

/** Options as trainer/optimizers has them, less what the rest of the recipe says: weight decay, seed, scale. */
export type OptimizerRecipe =
  | ({ readonly name: 'adamw' } & Moments)
  | { readonly name: 'sgd'; readonly momentum: number }
  | ({ readonly name: 'lora-pro'; readonly damping: number } & Moments)
  | { readonly name: 'lora-pro-sgd'; readonly damping: number }
  | ({
      readonly name: 'adabelief';
      readonly decay: 'decoupled' | 'gradient';
      readonly rectify: boolean;
    } & Moments)
  | ({
      readonly name: 'frugal';
      readonly density: number;
      readonly gap: number;
      readonly inactiveLrScale: number;
      readonly order: 'cyclic' | 'random';
    } & Moments)
  | ({
      readonly name: 'dct-adamw';
      readonly rank: number;
      readonly norm: 'l1' | 'l2';
      readonly errorFeedback: boolean;
    } & Moments);

/** Families that a trainer makes. */
export const trainedKinds = [
  'lora',
  'matryoshka',
  'hydra',
  'triangular',
  'salt',
  'svfit',
  'fly',
  'mora',
  'queryable',
  'flexmore',
] as const;

/** TRP: the nuclear norm of each product is held down with this weight, and every so many steps the product is cut to the
 *  ranks that hold this share of its energy. */
export interface TrpRecipe {
  readonly kind: 'trp';
  readonly weight: number;
  readonly every: number;
  readonly energy: number;
}

/** EGGROLL: a step is a generation of `population` members, every `groupSize` of which answer the same prompt. */
export interface EggrollRecipe {
  readonly kind: 'eggroll';
  readonly population: number;
  readonly groupSize: number;
  /** How far the numbers of B are moved, and the rank of what moves them. */
  readonly sigma: number;
  readonly noiseRank: 1 | 2 | 4 | 8;
  /** Tokens after which an answer is cut. */
  readonly answerTokens: number;
  readonly reward: RewardRecipe;
}

export interface Recipe {
  /** `gradient`: of the loss of what is to be learnt. */
  readonly method: 'gradient' | EggrollRecipe;
  readonly kind: (typeof trainedKinds)[number];
  /** R. Given as null: 16, or what flexmore's experts have together. */
  readonly rank: number;
  /** S, rising to R: trained by matryoshka's objectives; every kind is evaluated at them. */
  readonly ranks: readonly number[];
  /** fly, mora: ranks that stay for a token; queryable: atoms that are mixed for it. Given as null: a quarter of the ranks, at
   *  most 4 for mora; 2 atoms. */
  readonly topK: number;
  /** mora: τ of the softmax over those. */
  readonly temperature: number;
  /** triangular: half of R at the start, more where cores grow, until the modules have R on average; null: R throughout. */
  readonly rankGrowth: {
    readonly threshold: 'linear' | 'exp';
    readonly interval: number;
    readonly warmupShare: number;
  } | null;
  /** salt: ranks beside the singular values. */
  readonly tailRank: number;
  /** queryable. */
  readonly bank: BankRecipe | null;
  /** flexmore: each with ranks of its own, and a weight in every module. */
  readonly experts: readonly ExpertRecipe[] | null;
  /** s_r: 1, 1/r or 1/√r. Given as null: 1/√r for the sums that are published by SVD, as measured in section 1, else 1.
   *  Alpha is R·s_R where a family has one. */
  readonly scaling: Scaling;
  readonly objective: Objective;
  /** Given as null: what section 1 says for the objective. */
  readonly order: PublishOrder;
  /** What rank k means once it is served: pack-pairs.ts. */
  readonly levels: LevelRule;
  readonly targets: readonly Projection[];
  readonly optimizer: OptimizerRecipe;
  /** `sweep`: chosen by short runs (trainer/sweep.ts). */
  readonly learningRate: number | 'sweep';
  /** Of all steps. */
  readonly warmupShare: number;
  readonly schedule: 'cosine' | 'constant';
  readonly epochs: number;
  /** Ends earlier than the epochs do; null: with them. */
  readonly stepsMax: number | null;
  /** Windows of `windowTokens` rows that are computed at once; a step has `accumulation` times as many. */
  readonly batchWindows: number;
  readonly windowTokens: number;
  readonly accumulation: number;
  /** Of the gradient of all parameters together; null: not clipped. */
  readonly clipNorm: number | null;
  readonly weightDecay: number;
  /** `eva`: a lora's A and its ranks by what explains the inputs of so many learnt tokens, at most rho·R a module. */
  readonly init:
    | { readonly kind: 'kaiming' }
    | { readonly kind: 'eva'; readonly rho: number; readonly tokens: number };
  readonly regularizer: TrpRecipe | null;
  readonly rankSelection: CodyraRecipe | null;
  readonly squeeze: SqueezeRecipe | null;
  /** `diffora`: this share of the targets' modules, found by a search as long as that share of the run. */
  readonly modules:
    | 'all'
    | { readonly kind: 'diffora'; readonly keepRatio: number; readonly searchShare: number };
  /** AdAdaGrad: `accumulation` grows up to `max` where the gradients of micro-batches are mostly noise, by eta. */
  readonly batchSchedule: {
    readonly kind: 'adadagrad';
    readonly eta: number;
    readonly max: number;
  } | null;
  readonly continual: CosoRecipe | null;
  /** Steps between evaluations; null: at the end only. */
  readonly evaluateEvery: number | null;
  readonly checkpointEvery: number;
  /** Of the training examples, by their hash, where no held-out file is given. */
  readonly heldOutShare: number;
  readonly seed: number;
  /** Blocks are computed again on the way back: more time, far less memory. Given as null: unless one looks back at others. */
  readonly recompute: boolean;
}

const share = z.number().min(0).max(1);
const momentum = z.number().min(0).lt(1);
const rank = z.int().min(1).max(rankMaxLimit);
const stepCount = z.int().min(1).max(1_000_000);
const moments = {
  beta1: momentum.default(0.9),
  beta2: momentum.default(0.999),
  epsilon: z.number().positive().max(1).default(1e-8),
};
const damping = z.number().min(0).max(1).default(1e-8);
const optimizer = z.discriminatedUnion('name', [
  z.strictObject({ name: z.literal('adamw'), ...moments }),
  z.strictObject({ name: z.literal('lora-pro'), ...moments, damping }),
  z.strictObject({ name: z.literal('sgd'), momentum: momentum.default(0) }),
  z.strictObject({ name: z.literal('lora-pro-sgd'), damping }),
  z.strictObject({
    name: z.literal('adabelief'),
    ...moments,
    decay: z.enum(['decoupled', 'gradient']).default('decoupled'),
    rectify: z.boolean().default(true),
  }),
  z.strictObject({
    name: z.literal('frugal'),
    ...moments,
    density: share.default(0.25),
    gap: stepCount.default(200),
    inactiveLrScale: share.default(0.1), // the publication's for fine-tuning
    order: z.enum(['cyclic', 'random']).default('cyclic'),
  }),
  z.strictObject({
    name: z.literal('dct-adamw'),
    ...moments,
    rank: z.int().min(1).max(65_536).default(8),
    norm: z.enum(['l1', 'l2']).default('l1'),
    errorFeedback: z.boolean().default(false),
  }),
]);

// Between 1e-3 and 3e-3 the objectives' order on the default base was the same (section 1).
export const defaultLearningRate: number = 1e-3;

const eggroll = z.strictObject({
  kind: z.literal('eggroll'),
  // With these the default base learnt what test/nightly/eggroll-real.test.ts asks of it.
  population: z.int().min(2).max(1024).default(16),
  groupSize: z.int().min(2).max(1024).default(4),
  sigma: z.number().positive().max(10).default(0.15),
  noiseRank: z.union([z.literal(1), z.literal(2), z.literal(4), z.literal(8)]).default(1),
  answerTokens: z.int().min(1).max(1024).default(32),
  reward: rewardSchema,
});
/** Of that method. */
export const eggrollLearningRate: number = 0.05;
/** Where a recipe of that method says nothing else. */
const eggrollDefaults = {
  ...{ kind: 'lora', rank: 4, optimizer: { name: 'sgd' }, learningRate: eggrollLearningRate },
  ...{ schedule: 'constant', warmupShare: 0, clipNorm: null, epochs: 100, stepsMax: 50 },
};

const schema = z.strictObject({
  method: z.union([z.literal('gradient'), eggroll]).default('gradient'),
  kind: z.enum(trainedKinds).default('matryoshka'),
  rank: rank.nullable().default(null),
  ranks: z.array(rank).min(1).max(rankMaxLimit).nullable().default(null),
  topK: rank.nullable().default(null),
  temperature: z.number().positive().max(1e3).default(0.1),
  tailRank: rank.default(4),
  bank: bankSchema.nullable().default(null),
  experts: z.array(expertSchema).min(1).max(64).nullable().default(null),
  rankGrowth: z
    .strictObject({
      threshold: z.enum(['linear', 'exp']).default('linear'),
      interval: stepCount.default(20),
      warmupShare: share.default(0.1),
    })
    .nullable()
    .default(null),
  scaling: z.enum(['none', 'rank', 'sqrt']).nullable().default(null),
  objective: z.enum(objectives).nullable().default(null),
  order: z.enum(['svd', 'as-trained', 'as-published']).nullable().default(null),
  levels: z.enum(['energy', 'uniform']).default('uniform'),
  targets: z
    .array(z.enum(projections))
    .min(1)
    .max(projections.length)
    .default([...projections]),
  optimizer: optimizer.default({ name: 'adamw', beta1: 0.9, beta2: 0.999, epsilon: 1e-8 }),
  learningRate: z
    .union([z.number().positive().max(10), z.literal('sweep')])
    .default(defaultLearningRate),
  warmupShare: share.default(0.05),
  schedule: z.enum(['cosine', 'constant']).default('cosine'),
  epochs: z.int().min(1).max(100).default(3),
  stepsMax: stepCount.nullable().default(null),
  batchWindows: z.int().min(1).max(256).default(2),
  windowTokens: z.int().min(8).max(8192).default(256),
  accumulation: z.int().min(1).max(256).default(2),
  clipNorm: z.number().positive().max(1e6).nullable().default(1),
  weightDecay: share.default(0),
  init: z
    .discriminatedUnion('kind', [
      z.strictObject({ kind: z.literal('kaiming') }),
      z.strictObject({
        kind: z.literal('eva'),
        rho: z.number().min(1).max(16).default(2), // the publication's
        tokens: z.int().min(1).max(65_536).default(8192), // calibration.ts takes no more
      }),
    ])
    .default({ kind: 'kaiming' }),
  regularizer: z
    .strictObject({
      kind: z.literal('trp'),
      weight: z.number().min(0).max(1).default(3e-4), // the publication's, as is the energy
      every: stepCount.default(20),
      energy: share.default(0.9),
    })
    .nullable()
    .default(null),
  rankSelection: codyraSchema.nullable().default(null),
  squeeze: squeezeSchema.nullable().default(null),
  modules: z
    .union([
      z.literal('all'),
      z.strictObject({
        kind: z.literal('diffora'),
        keepRatio: z.number().positive().max(1).default(0.5),
        searchShare: z.number().positive().max(1).default(0.2),
      }),
    ])
    .default('all'),
  batchSchedule: z
    .strictObject({
      kind: z.literal('adadagrad'),
      eta: z.number().positive().max(1e6).default(0.2),
      max: z.int().min(2).max(4096).default(64),
    })
    .nullable()
    .default(null),
  continual: cosoSchema.nullable().default(null),
  evaluateEvery: stepCount.nullable().default(null),
  checkpointEvery: stepCount.default(50),
  heldOutShare: z.number().min(0).max(0.5).default(0.1),
  seed: z.int().min(0).max(Number.MAX_SAFE_INTEGER).default(42), // the publication's
  recompute: z.boolean().nullable().default(null),
});

/** Known to algorithms.md, not to this build: by path. */
const unbuilt: Readonly<Record<string, readonly string[]>> = {
  kind: ['sara'],
  'init.kind': ['meta'],
};

/** `where` begins each message. Throws INVALID_REQUEST, or UNSUPPORTED for what is not built. */
export function parseRecipe(json: unknown, where: string): Recipe {
  refuseUnbuilt(json, where);
  const parsed = schema.safeParse(isEggroll(json) ? { ...eggrollDefaults, ...json } : json);
  if (!parsed.success) {
    const { path, message } = innermost(parsed.error.issues[0]!);
    throw invalid(path.length === 0 ? where : `${where}.${path.join('.')}`, message);
  }
  const { data } = parsed;
  const { kind, experts } = data;
  const all = experts?.reduce((sum, expert) => sum + expert.rank, 0);
  const most = data.rank ?? all ?? 16; // the publication's
  const isQueryable = kind === 'queryable';
  const bank = data.bank ?? (isQueryable ? bankSchema.parse({}) : null);
  const objective = data.objective ?? (data.kind === 'matryoshka' ? 'diag' : 'plain');
  const quarter = Math.max(1, Math.floor(most / 4));
  const isSum = objective === 'plain' || objective === 'diag' || objective === 'binary';
  // CoDyRA's ranks are in the order of their gates.
  const hasOrder = !isSum || data.rankSelection !== null;
  const order = data.order ?? (hasOrder ? 'as-trained' : 'svd');
  const trainsSum = objective === 'diag' || objective === 'binary';
  const recipe: Recipe = {
    ...data,
    rank: most,
    bank,
    objective,
    order,
    scaling: data.scaling ?? (trainsSum && order === 'svd' ? 'sqrt' : 'none'),
    ranks: data.ranks ?? (isQueryable ? [most] : powersTo(most)),
    topK: data.topK ?? (isQueryable ? Math.min(2, bank?.atoms ?? 2) : fewerOf(kind, quarter)),
    recompute: data.recompute ?? !isQueryable,
  };
  const wrong = conflict(recipe);
  if (wrong !== null) throw invalid(`${where}.${wrong[0]}`, wrong[1]);
  return recipe;
}

function fewerOf(kind: Recipe['kind'], quarter: number): number {
  return kind === 'mora' ? Math.min(4, quarter) : quarter;
}

/** What is wrong inside of an object, where a field may be something else as well. */
function innermost(issue: z.core.$ZodIssue): Pick<z.core.$ZodIssue, 'path' | 'message'> {
  const inner =
    issue.code === 'invalid_union'
      ? issue.errors.map(([first]) => first).find((first) => (first?.path.length ?? 0) > 0)
      : undefined;
  if (inner === undefined) return issue;
  const { path, message } = innermost(inner);
  return { path: [...issue.path, ...path], message };
}

function isEggroll(json: unknown): json is object {
  const method = (json as { readonly method?: { readonly kind?: unknown } | null } | null)?.method;
  return method?.kind === 'eggroll';
}

function refuseUnbuilt(json: unknown, where: string): void {
  for (const [path, names] of Object.entries(unbuilt)) {
    const value = path.split('.').reduce<unknown>((at, key) => {
      const isObject = typeof at === 'object' && at !== null;
      return isObject && Object.hasOwn(at, key) ? (at as Record<string, unknown>)[key] : undefined;
    }, json);
    if (typeof value === 'string' && names.includes(value)) {
      const param = `${where}.${path}`;
      throw new GatewayError('UNSUPPORTED', `${param}: ${value} is not in this build`, { param });
    }
  }
}

/** 1, 2, 4, … and the rank itself: the published S. */
function powersTo(most: number): number[] {
  const powers: number[] = [];
  for (let power = 1; power < most; power *= 2) powers.push(power);
  return [...powers, most];
}

function invalid(where: string, message: string): GatewayError {
  return new GatewayError('INVALID_REQUEST', `${where}: ${message}`, { param: where });
}
