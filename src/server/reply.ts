// An answer as an HTTP response, whole or as a stream, in whichever of OpenAI's two shapes. The shape makes choice
// objects; envelope, usage, decision headers and the `rankgate` object are made here, the same for both.

import type { Context } from 'hono';
import type { FinishReason, GeneratedToken } from '../engine/messages.ts';
import type { Answer } from './answer.ts';
import type { UsedAdapter } from './blend.ts';
import type { ServerDeps } from './deps.ts';
import type { Env } from './env.ts';
import { problemOf } from './problem.ts';
import type { GenerationBody } from './schemas.ts';
import { eventStream } from './sse.ts';

/** What the two calls have of their own in a choice, beside its index, log-probabilities and finish reason. */
export interface Shape {
  readonly wholeObject: string;
  readonly chunkObject: string;
  /** First of a stream; null when the shape has none. */
  open(index: number): object | null;
  delta(text: string): object;
  readonly end: object;
  whole(index: number, text: string): object;
  logprobs(index: number, tokens: readonly GeneratedToken[]): object;
}

interface ReplyOptions {
  readonly shape: Shape;
  readonly body: GenerationBody;
}

export async function reply(
  c: Context<Env>,
  deps: ServerDeps,
  answer: Answer,
  options: ReplyOptions,
): Promise<Response> {
  const { body } = options;
  const envelope = {
    id: answer.request.id,
    created: Math.floor(deps.clock.unixMs() / 1000),
    model: answer.request.target.asked,
    system_fingerprint: `fp_${deps.engine.base.hash.slice(0, 12)}`,
    ...(body.service_tier === undefined ? {} : { service_tier: body.service_tier }),
  };
  if (body.stream !== true) {
    const whole = await wholeOf(answer, options.shape);
    answer.end();
    setDecisionHeaders(c, answer);
    return c.json({ ...envelope, ...whole, ...figuresOf(answer) });
  }
  const { clock, config } = deps;
  const record = c.get('record');
  record.isStream = true;
  setDecisionHeaders(c, answer);
  c.header('content-type', 'text/event-stream; charset=utf-8');
  c.header('x-accel-buffering', 'no'); // nginx would hold the tokens back
  return c.body(
    eventStream({
      frames: streamFrames(answer, options, envelope),
      clock,
      pingMs: config.pingMs,
      stallMsMax: config.stallMsMax,
      onEnd(failure) {
        answer.end();
        if (failure !== null) record.fail(failure);
        const isCancelled = failure !== null && problemOf(failure).status === 499;
        record.finish(isCancelled ? 499 : 200);
      },
    }),
  );
}

async function wholeOf(answer: Answer, shape: Shape): Promise<object> {
  const { prompts, n, topLogprobs } = answer.request;
  const texts = Array.from({ length: prompts.length * n }, () => '');
  const tokens = texts.map((): GeneratedToken[] => []);
  const reasons = texts.map((): FinishReason => 'stop');
  for await (const { index, value: event } of answer.events()) {
    if (event.kind === 'piece') {
      texts[index] += event.text;
      if (topLogprobs !== null) tokens[index]!.push(...event.tokens);
    }
    if (event.kind === 'end') reasons[index] = event.reason;
  }
  const choices = texts.map((text, index) => ({
    index,
    ...shape.whole(index, text),
    logprobs: topLogprobs === null ? null : shape.logprobs(index, tokens[index]!),
    finish_reason: reasons[index]!,
  }));
  return { object: shape.wholeObject, choices };
}

async function* streamFrames(
  answer: Answer,
  { shape, body }: ReplyOptions,
  envelope: object,
): AsyncGenerator<string, void, void> {
  const hasUsageChunk = body.stream_options?.include_usage === true;
  const hasLogprobs = answer.request.topLogprobs !== null;
  const chunk = (choices: readonly object[], extra: object = {}): string =>
    JSON.stringify({
      ...envelope,
      object: shape.chunkObject,
      choices,
      ...(hasUsageChunk ? { usage: null } : {}),
      ...extra,
    });
  const opened = new Set<number>();
  let running = answer.request.prompts.length * answer.request.n;
  for await (const { index, value: event } of answer.events()) {
    const choice = (part: object, rest: object = {}): object => ({
      index,
      ...part,
      logprobs: null,
      finish_reason: null,
      ...rest,
    });
    if (!opened.has(index)) {
      opened.add(index);
      const part = shape.open(index);
      if (part !== null) yield chunk([choice(part)]);
    }
    // A piece without text: a character or a possible stop string is not complete yet.
    if (event.kind === 'piece' && (event.text !== '' || (hasLogprobs && event.tokens.length > 0))) {
      const logprobs = hasLogprobs ? shape.logprobs(index, event.tokens) : null;
      yield chunk([choice(shape.delta(event.text), { logprobs })]);
    }
    if (event.kind === 'end') {
      running -= 1;
      const { rankgate } = figuresOf(answer);
      yield chunk(
        [choice(shape.end, { finish_reason: event.reason })],
        running === 0 && !hasUsageChunk ? { rankgate } : {},
      );
    }
  }
  if (hasUsageChunk) yield chunk([], figuresOf(answer));
  yield '[DONE]';
}

/** The figures that end an answer: OpenAI's, and what was decided. */
function figuresOf(answer: Answer): { usage: object; rankgate: object } {
  const report = answer.report();
  const { promptTokens, completionTokens, cachedTokens } = report;
  return {
    usage: {
      prompt_tokens: promptTokens,
      completion_tokens: completionTokens,
      total_tokens: promptTokens + completionTokens,
      prompt_tokens_details: { cached_tokens: cachedTokens },
    },
    rankgate: {
      adapter: listed(answer.used, 'id'),
      generation: listed(answer.used, 'generation'),
      adapters: answer.used.map(({ rankMax, ...rest }) => ({ ...rest, rank_max: rankMax })),
      rank: report.rank,
      rank_max: report.rankMax,
      rank_mean: report.rankMean,
      reason: report.reason,
      predicted_ms: rounded(report.predictedMs),
      queue_ms: rounded(report.queueMs),
      ttft_ms: rounded(report.ttftMs),
      total_ms: rounded(report.totalMs),
      cached_tokens: cachedTokens,
      ...(answer.atoms.length === 0 ? {} : { atoms: answer.atoms }),
    },
  };
}

/** On a stream these are what is known before the first token; a queue time that is not known yet is left out. */
function setDecisionHeaders(c: Context<Env>, answer: Answer): void {
  const report = answer.report();
  const { used } = answer;
  const [ids, generations] = [listed(used, 'id'), listed(used, 'generation')];
  if (ids !== null) c.header('x-adapter-id', ids);
  if (generations !== null) c.header('x-adapter-generation', generations);
  c.header('x-adapter-rank', used.map(({ rank, rankMax }) => `${rank}/${rankMax}`).join() || '0/0');
  c.header('x-rank-reason', report.reason);
  if (report.predictedMs !== null) c.header('x-predicted-ms', String(rounded(report.predictedMs)));
  if (report.queueMs !== null) c.header('x-queue-ms', String(rounded(report.queueMs)));
}

/** Every adapter, the system adapter last. A name holds no comma. */
function listed(used: readonly UsedAdapter[], key: 'id' | 'generation'): string | null {
  return used.map((one) => one[key]).join() || null;
}

/** Microseconds are noise here. */
function rounded(ms: number | null): number | null {
  return ms === null ? null : Math.round(ms * 1000) / 1000;
}
