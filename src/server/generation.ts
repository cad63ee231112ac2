// From a parsed body to a started answer: what /v1/chat/completions and /v1/completions have in common. Cheap refusals
// come first; adapters are leased before the prompt is encoded, so that a swap in between cannot change the answer.

import type { Context } from 'hono';
import type { AdapterUse, Sampling } from '../engine/messages.ts';
import { GatewayError } from '../errors.ts';
import type { CapturedPrompt } from '../jobs/refresh-data.ts';
import { parseBudget } from '../router/budget.ts';
import { Answer } from './answer.ts';
import { readCell, rowOf } from './archive.ts';
import { resolveTarget, type Target } from './blend.ts';
import type { ServerDeps } from './deps.ts';
import type { Env } from './env.ts';
import { HttpError, invalidRequest } from './problem.ts';
import { reply, type Shape } from './reply.ts';
import type { GenerationBody } from './schemas.ts';

/** n × prompts: what one request may put into the queue (faults.md B45). */
const sequencesMax = 16;

export interface Ask {
  readonly body: GenerationBody;
  readonly shape: Shape;
  readonly idPrefix: string;
  readonly topLogprobs: number | null;
  /** As the body had it; null when it had none. */
  readonly tokensMax: number | null;
  readonly tokensDefault: number;
  readonly promptCount: number;
  readonly encode: () => Promise<readonly Int32Array[]>;
  /** What the answer could be learnt with; null: not such a prompt. */
  readonly captured: CapturedPrompt | null;
}

export async function generate(c: Context<Env>, deps: ServerDeps, ask: Ask): Promise<Response> {
  const { body } = ask;
  if (deps.lifecycle.isDraining) {
    throw new GatewayError('NO_CAPACITY', 'the server is shutting down', { retryAfterS: 5 });
  }
  if (ask.promptCount * (body.n ?? 1) > sequencesMax) {
    throw invalidRequest(`n times the number of prompts is more than ${sequencesMax}`, 'n');
  }
  if (body.stream_options !== undefined && body.stream !== true) {
    throw invalidRequest('stream_options is for streams only', 'stream_options');
  }
  checkRoom(deps, c.get('tenant'));
  const { domain } = body;
  if (domain !== undefined && body.adapters !== undefined) {
    throw invalidRequest('domain goes with one model, not with adapters', 'domain');
  }
  const sampling = samplingOf(body, deps);
  let target = resolveTarget(body, deps.config, deps.registry);
  let answer: Answer | null = null;
  try {
    const header = (name: string): string | null => c.req.header(name) ?? null;
    const record = c.get('record');
    const tier = tierOf(c, body, target, deps);
    const budget = parseBudget({ latency: body.latency, header, tier }, deps.config);
    record.tier = tier; // a known one
    const prompts = await ask.encode();
    const prior = await priorOf(target, deps);
    const tokensMax = tokensMaxOf(prompts, ask, deps.engine.base.contextMax);
    const caller = c.get('caller');
    const { signal } = c.req.raw;
    if (signal.aborted) throw new GatewayError('CANCELLED', 'the client went away');
    let headers: Readonly<Record<string, string>> = {};
    if (domain !== undefined && target.parts.length === 0) {
      ({ target, headers } = readCell(target, { domain, budget, tokensMax, caller }, deps));
    }
    const request = {
      id: `${ask.idPrefix}${deps.random.id()}`,
      tenant: c.get('tenant'),
      receivedMs: record.receivedMs,
      target,
      row: domain === undefined ? null : rowOf(target.parts[0]?.lease.name ?? null, domain, caller),
      prior,
      prompts,
      n: body.n ?? 1,
      tokensMax,
      sampling,
      stop: typeof body.stop === 'string' ? [body.stop] : (body.stop ?? []),
      topLogprobs: ask.topLogprobs,
      budget,
      captured: capturedOf(ask, target, c.get('tenant'), deps),
    };
    const made = new Answer(deps, request, signal);
    answer = made;
    record.report = () => made.report();
    await made.start(deps.config.pingMs);
    for (const [name, value] of Object.entries(headers)) c.header(name, value);
    return await reply(c, deps, made, ask);
  } catch (error) {
    answer?.end();
    target.release(); // idempotent: an answer that was made has released it
    throw error;
  }
}

/** Where its adapter's owner, the tenant and the request let it be. */
function capturedOf(
  { captured, body: { n, store } }: Ask,
  { parts }: Target,
  tenant: string,
  { training }: ServerDeps,
): CapturedPrompt | null {
  const [part] = parts;
  const isOne = parts.length === 1 && (n ?? 1) === 1;
  if (training === null || part === undefined || !isOne || store === false) return null;
  return training.refresher.capture.wants(part.lease.name, tenant) ? captured : null;
}

/** Said here and at once: the engine may be in the middle of a long step. */
function checkRoom({ engine, inFlight, config, router }: ServerDeps, tenant: string): void {
  const { count: queued, own, most } = inFlight.queued(tenant);
  // Whoever has most in a full queue gives way to others there (engine/waiting-queue.ts).
  if (queued < config.queueRequestsMax || own + 1 < most) return;
  const code = engine.isReady() ? 'CONTENDED' : 'NO_CAPACITY';
  const retryAfterS = router.retryAfterS(inFlight.load());
  throw new GatewayError(code, `${queued} requests wait`, { retryAfterS });
}

async function priorOf(
  { instruction }: Target,
  { text }: ServerDeps,
): Promise<AdapterUse['prior']> {
  if (instruction === null) return null;
  const tokens = Array.from(await text.encode(instruction.text));
  if (tokens.length > 0) return { tokens, strength: instruction.strength };
  throw invalidRequest('instruction_prior has no tokens', 'instruction_prior');
}

/** Of the path, `service_tier` and the model's suffix: those that are there must agree. */
function tierOf(
  c: Context<Env>,
  body: GenerationBody,
  target: Target,
  { config }: ServerDeps,
): string | null {
  const inPath = c.req.param('tier') ?? null;
  if (inPath !== null && !Object.hasOwn(config.tiers, inPath)) {
    const known = Object.keys(config.tiers).join(', ');
    throw new HttpError(404, 'not_found', `there is no such tier; there are ${known}`);
  }
  const named = body.service_tier;
  // OpenAI's words for "whatever is usual here".
  const inBody = named === undefined || named === 'auto' || named === 'default' ? null : named;
  const [tier = null, ...others] = [inPath, inBody, target.tier].filter((one) => one !== null);
  if (others.some((other) => other !== tier)) {
    throw invalidRequest(
      `the tiers ${[tier, ...others].join(' and ')} contradict each other`,
      inBody === null ? 'model' : 'service_tier',
    );
  }
  return tier;
}

function tokensMaxOf(prompts: readonly Int32Array[], ask: Ask, contextMax: number): number {
  const longest = Math.max(...prompts.map((prompt) => prompt.length));
  if (prompts.some((prompt) => prompt.length === 0)) {
    throw invalidRequest('the prompt has no tokens', 'prompt');
  }
  const room = contextMax - longest;
  if (room < 1 || (ask.tokensMax ?? 1) > room) {
    throw new GatewayError(
      'CONTEXT_LENGTH_EXCEEDED',
      `this model's context is ${contextMax} tokens; the prompt has ${longest} and ` +
        `${ask.tokensMax ?? 'at least 1'} more were asked for`,
      { param: ask.idPrefix === 'chatcmpl-' ? 'messages' : 'prompt' },
    );
  }
  return ask.tokensMax ?? Math.min(ask.tokensDefault, room);
}

function samplingOf(body: GenerationBody, deps: ServerDeps): Sampling {
  const { vocabSize } = deps.engine.base.config;
  const logitBias = Object.entries(body.logit_bias ?? {}).map(
    ([token, bias]) => [Number(token), bias] as const,
  );
  for (const [token] of logitBias) {
    if (token >= vocabSize) {
      throw invalidRequest(`token ${token} is not one of the ${vocabSize} tokens`, 'logit_bias');
    }
  }
  return {
    temperature: body.temperature ?? 1,
    topP: body.top_p ?? 1,
    topK: Math.max(0, body.top_k ?? 0),
    minP: body.min_p ?? 0,
    seed: (body.seed ?? deps.random.seed()) >>> 0,
    presencePenalty: body.presence_penalty ?? 0,
    frequencyPenalty: body.frequency_penalty ?? 0,
    repetitionPenalty: body.repetition_penalty ?? 1,
    logitBias,
  };
}
