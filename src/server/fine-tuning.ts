// OpenAI's fine-tuning jobs. Its hyperparameters become parts of a recipe, `rankgate` says the rest of it, and what both say is
// refused. A tenant sees its own jobs alone, the operator all; the result is an adapter in the tenant's namespace.

import type { Context } from 'hono';
import { z } from 'zod';
import type { Generation } from '../adapters/adapter.ts';
import { GatewayError } from '../errors.ts';
import type { Job, JobCheckpoint, JobEvent } from '../jobs/job.ts';
import {
  defaultLearningRate,
  eggrollLearningRate,
  parseRecipe,
  type Recipe,
} from '../jobs/recipe.ts';
import type { ServerDeps } from './deps.ts';
import type { Env } from './env.ts';
import { ownerOf, trainingOf, viewerOf } from './files.ts';
import { rewardOfGrader } from './graders.ts';
import { readBody } from './limits.ts';
import { resolveModel } from './model-reference.ts';
import { type Described, listOf, pageWishOf } from './page-query.ts';
import { invalidRequest } from './problem.ts';
import { byForm } from './schemas.ts';
import { checkMayName } from './tenancy.ts';

type AutoOr = 'auto' | number;
const autoOr = (number: z.ZodType<number>): z.ZodCustom<AutoOr, AutoOr> =>
  byForm<AutoOr>((value) => (typeof value === 'string' ? z.literal('auto') : number));

const shared = {
  n_epochs: autoOr(z.int().min(1).max(100)).exactOptional(),
  batch_size: autoOr(z.int().min(1).max(256)).exactOptional(),
  learning_rate_multiplier: autoOr(z.number().gt(0).max(100)).exactOptional(),
};
const hyperparameters = z.strictObject(shared);
const scoredHyperparameters = z.strictObject({
  ...shared,
  eval_interval: autoOr(z.int().min(1).max(1_000_000)).exactOptional(),
});
type Hyperparameters = z.infer<typeof scoredHyperparameters>;

const suffixPattern = /^[a-z0-9](?:[a-z0-9_-]{0,22}[a-z0-9])?$/;
const fileId = z.string().min(1).max(128);
const schema = z.strictObject({
  model: z.string().min(1).max(256),
  training_file: fileId,
  validation_file: fileId.nullable().exactOptional(),
  suffix: z
    .string()
    .regex(suffixPattern, 'want 1 to 24 of a-z 0-9 _ - that start and end with a letter or digit')
    .nullable()
    .exactOptional(),
  seed: z.int().min(0).max(Number.MAX_SAFE_INTEGER).nullable().exactOptional(),
  hyperparameters: hyperparameters.exactOptional(),
  method: z
    .strictObject({
      type: z.string().max(64),
      supervised: z
        .strictObject({ hyperparameters: hyperparameters.exactOptional() })
        .exactOptional(),
      dpo: z.unknown().optional(),
      reinforcement: z
        .strictObject({
          grader: z.unknown(),
          hyperparameters: scoredHyperparameters.exactOptional(),
        })
        .exactOptional(),
    })
    .exactOptional(),
  /** Parts of a recipe, whose errors are parseRecipe's. */
  rankgate: z.record(z.string().max(64), z.unknown()).exactOptional(),
});
type Body = z.infer<typeof schema>;

export async function createJob(c: Context<Env>, deps: ServerDeps): Promise<Response> {
  const { jobs, trainers } = trainingOf(deps);
  const body = await readBody(c, deps, schema);
  if (deps.lifecycle.isDraining) {
    throw new GatewayError('NO_CAPACITY', 'the server is shutting down', { retryAfterS: 5 });
  }
  const startFrom = startOf(body.model, deps);
  const recipe = recipeOf(body);
  const caller = c.get('caller');
  const suffix = body.suffix ?? null;
  const prefix = caller.namespace === null ? '' : `${caller.namespace}/`;
  const adapter = prefix + nameOf(deps.config.modelName, suffix, deps.random.id());
  checkMayName(adapter, caller);
  const job = jobs.create(ownerOf(caller), viewerOf(caller), {
    request: { model: body.model, startFrom, suffix, recipe, adapter, ...graderOf(body) },
    trainingFile: body.training_file,
    validationFile: body.validation_file ?? null,
  });
  trainers.wake();
  return c.json(describeJob(job));
}

/** null for the base. Whether the recipe can hold what the adapter is, the trainer says. */
function startOf(model: string, { config, registry }: ServerDeps): Generation | null {
  const { lease } = resolveModel(model, { modelName: config.modelName, tiers: {} }, registry);
  lease?.release();
  return lease?.generation ?? null;
}

/** OpenAI's ft:base:suffix:id, by the rules of adapter names. */
function nameOf(base: string, suffix: string | null, id: string): string {
  const unique = id.toLowerCase().replace(/[^a-z0-9]/g, '');
  const end = `${suffix === null ? '' : `.${suffix}`}.${unique.slice(0, 12)}`;
  return `ft.${base.slice(0, 64 - 3 - end.length).replace(/\.+$/, '')}${end}`;
}

/** What OpenAI's fields say of a recipe. A batch is counted in windows of tokens, which are what a step computes. */
function recipeOf(body: Body): Recipe {
  const { rankgate = {}, seed } = body;
  const wanted = hyperparametersOf(body);
  const { grader } = graderOf(body);
  const given = {
    ...(grader === undefined ? fromHyperparameters(wanted) : byScores(wanted, grader)),
    ...(typeof seed === 'number' ? { seed } : {}),
  };
  const twice = Object.keys(given).find((name) => Object.hasOwn(rankgate, name));
  if (twice !== undefined) {
    throw invalidRequest(`rankgate.${twice}: another field says it already`, `rankgate.${twice}`);
  }
  return parseRecipe({ ...given, ...rankgate }, 'rankgate');
}

const methods = ['supervised', 'dpo', 'reinforcement'] as const;

/** Throws UNSUPPORTED or INVALID_REQUEST for what is not of the method. */
function hyperparametersOf({ method, hyperparameters: top }: Body): Hyperparameters {
  if (method === undefined) return top ?? {};
  const type = methods.find((one) => one === method.type);
  if (type !== 'supervised' && type !== 'reinforcement') {
    const message = `method.type: ${method.type.slice(0, 32)}: want supervised or reinforcement`;
    throw new GatewayError('UNSUPPORTED', message, { param: 'method.type' });
  }
  const other = methods.find((one) => one !== type && method[one] !== undefined);
  if (other !== undefined) {
    throw invalidRequest(`method.${other}: method.type is ${type}`, `method.${other}`);
  }
  const own = method[type]?.hyperparameters;
  if (own !== undefined && top !== undefined) {
    throw invalidRequest('hyperparameters: method has them already', 'hyperparameters');
  }
  return own ?? top ?? {};
}

function graderOf({ method }: Body): { grader?: unknown } {
  return method?.type === 'reinforcement' ? { grader: method.reinforcement?.grader ?? null } : {};
}

const defaults = parseRecipe({}, 'rankgate');
/** Members that answer one prompt: the method's default. */
const groupSize = 4;

/** A batch is counted in prompts. */
function byScores(wanted: Hyperparameters, grader: unknown): object {
  const { n_epochs: epochs, batch_size: batch, eval_interval: interval } = wanted;
  const { learning_rate_multiplier: multiplier } = wanted;
  const population = typeof batch === 'number' ? { population: batch * groupSize, groupSize } : {};
  return {
    method: { kind: 'eggroll', reward: rewardOfGrader(grader), ...population },
    ...(typeof epochs === 'number' ? { epochs, stepsMax: null } : {}),
    ...(typeof multiplier === 'number' ? { learningRate: eggrollLearningRate * multiplier } : {}),
    ...(typeof interval === 'number' ? { evaluateEvery: interval } : {}),
  };
}

function fromHyperparameters(wanted: Hyperparameters): Partial<Recipe> {
  const { n_epochs: epochs, batch_size: batch, learning_rate_multiplier: multiplier } = wanted;
  const windows = typeof batch === 'number' && batch % defaults.batchWindows === 0;
  const batchWindows = windows ? defaults.batchWindows : 1;
  return {
    ...(typeof epochs === 'number' ? { epochs } : {}),
    ...(typeof batch === 'number' ? { batchWindows, accumulation: batch / batchWindows } : {}),
    ...(typeof multiplier === 'number' ? { learningRate: defaultLearningRate * multiplier } : {}),
  };
}

export function listJobs(c: Context<Env>, deps: ServerDeps): Response {
  const page = trainingOf(deps).jobs.list(viewerOf(c.get('caller')), pageWishOf(c));
  return c.json(listOf(page, describeJob));
}

export function showJob(c: Context<Env>, deps: ServerDeps): Response {
  return c.json(describeJob(jobOf(c, deps)));
}

export function cancelJob(c: Context<Env>, deps: ServerDeps): Response {
  const { jobs, trainers } = trainingOf(deps);
  const job = jobs.cancel(jobOf(c, deps));
  trainers.wake();
  return c.json(describeJob(job));
}

export function listEvents(c: Context<Env>, deps: ServerDeps): Response {
  const { after, limit } = pageWishOf(c);
  return c.json(listOf(trainingOf(deps).jobs.events(jobOf(c, deps), after, limit), describeEvent));
}

export function listCheckpoints(c: Context<Env>, deps: ServerDeps): Response {
  const job = jobOf(c, deps);
  const { after, limit } = pageWishOf(c);
  const page = trainingOf(deps).jobs.checkpoints(job, after, limit);
  return c.json(listOf(page, (checkpoint) => describeCheckpoint(job, checkpoint)));
}

export function jobOf(c: Context<Env>, deps: ServerDeps): Job {
  const job = trainingOf(deps).jobs.find(c.req.param('id') ?? '', viewerOf(c.get('caller')));
  if (job === null) throw new GatewayError('JOB_NOT_FOUND', 'there is no such job');
  return job;
}

export function describeJob(job: Job): Described {
  const { id, owner, state, request, progress, result, error } = job;
  const { recipe, adapter } = request;
  const { method } = recipe;
  const isScored = method !== 'gradient';
  const rate = isScored ? eggrollLearningRate : defaultLearningRate;
  const hyper = {
    n_epochs: recipe.epochs,
    batch_size: isScored
      ? method.population / method.groupSize
      : recipe.batchWindows * recipe.accumulation,
    learning_rate_multiplier: recipe.learningRate === 'sweep' ? 'auto' : recipe.learningRate / rate,
  };
  const type = isScored ? 'reinforcement' : 'supervised';
  const grader = request.grader === undefined ? {} : { grader: request.grader };
  const hasSucceeded = state === 'succeeded';
  return {
    id,
    object: 'fine_tuning.job',
    status: state,
    model: request.model,
    created_at: job.createdS,
    finished_at: job.finishedS,
    estimated_finish: null,
    training_file: job.trainingFile,
    validation_file: job.validationFile,
    result_files: [],
    organization_id: owner === '' ? 'operator' : owner,
    fine_tuned_model: hasSucceeded && result?.generation !== null ? adapter : null,
    trained_tokens: hasSucceeded ? (progress?.tokens ?? null) : null,
    seed: recipe.seed,
    hyperparameters: hyper,
    method: { type, [type]: { ...grader, hyperparameters: hyper } },
    error:
      error === null
        ? null
        : { code: error.code.toLowerCase(), message: error.message, param: null },
    rankgate: {
      adapter,
      recipe,
      progress,
      attempts: job.attempts,
      generation: result?.generation ?? null,
      losses: result?.losses ?? null,
      base_loss: result?.baseLoss ?? null,
      aurac: result?.aurac ?? null,
      verdict: result?.verdict ?? null,
    },
  };
}

function describeEvent(event: JobEvent): Described {
  const { id, createdS, level, message, metrics } = event;
  const type = metrics === null ? 'message' : 'metrics';

  return {
    id,
    object: 'fine_tuning.job.event',
    created_at: createdS,
    type,
    level,
    message,
    data: metrics,
  };
}

/** Training goes on from it after a crash; it is no model that could be asked for. */
function describeCheckpoint(job: Job, checkpoint: JobCheckpoint): Described {
  const { id, createdS, progress } = checkpoint;
  return {
    id,
    object: 'fine_tuning.job.checkpoint',
    created_at: createdS,
    fine_tuning_job_id: job.id,
    fine_tuned_model_checkpoint: null,
    step_number: progress.step,
    metrics: { step: progress.step, train_loss: progress.loss },
  };
}
