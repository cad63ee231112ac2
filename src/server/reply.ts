// An answer as an HTTP response, whole or as a stream, in whichever of OpenAI's two shapes. The shape makes choice
// objects; envelope, usage, decision headers and the `rankgate` object are made here, the same for both.

import type { Context } from 'hono';
import type { FinishReason, GeneratedToken } from '../engine/messages.ts';
import type { Answer } from './answer.ts';
import type { ServerDeps } from './deps.ts';
import type { Env } from './env.ts';
import { problemOf } from './problem.ts';
import { eventStream } from './sse.ts';

export interface Shape {
  readonly wholeObject: string;
  readonly chunkObject: string;
  /** First choice object of a stream; null when the shape has none. */
  openChoice(index: number): object | null;
  /** `tokens` is null when no log-probabilities were asked for. */
  deltaChoice(index: number, text: string, tokens: readonly GeneratedToken[] | null): object;
  endChoice(index: number, reason: FinishReason): object;
  wholeChoice(index: number, whole: WholeChoice): object;
}

export interface WholeChoice {
  readonly text: string;
  readonly tokens: readonly GeneratedToken[] | null;
  readonly reason: FinishReason;
}

export interface ReplyOptions {
  readonly isStream: boolean;
  /** stream_options.include_usage. */
  readonly hasUsageChunk: boolean;
  readonly serviceTier: string | null;
}

export async function reply(
  c: Context<Env>,
  deps: ServerDeps,
  answer: Answer,
  { shape, ...options }: ReplyOptions & { readonly shape: Shape },
): Promise<Response> {
  const envelope = envelopeOf(deps, answer, options);
  if (!options.isStream) {
    try {
      return await replyWhole(c, answer, shape, envelope);
    } finally {
      answer.end();
    }
  }
  const { clock, config } = deps;
  const record = c.get('record');
  record.isStream = true;
  setDecisionHeaders(c, answer);
  c.header('content-type', 'text/event-stream; charset=utf-8');
  c.header('x-accel-buffering', 'no'); // nginx would hold the tokens back
  return c.body(
    eventStream({
      frames: streamFrames(answer, shape, { ...options, envelope }),
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

type Envelope = Readonly<Record<string, unknown>>;

function envelopeOf(deps: ServerDeps, answer: Answer, options: ReplyOptions): Envelope {
  return {
    id: answer.request.id,
    created: Math.floor(deps.clock.unixMs() / 1000),
    model: answer.request.target.asked,
    system_fingerprint: `fp_${deps.engine.base.hash.slice(0, 12)}`,
    ...(options.serviceTier === null ? {} : { service_tier: options.serviceTier }),
  };
}

async function replyWhole(
  c: Context<Env>,
  answer: Answer,
  shape: Shape,
  envelope: Envelope,
): Promise<Response> {
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
  answer.end();
  setDecisionHeaders(c, answer);
  return c.json({
    ...envelope,
    object: shape.wholeObject,
    choices: texts.map((text, index) =>
      shape.wholeChoice(index, {
        text,
        tokens: topLogprobs === null ? null : tokens[index]!,
        reason: reasons[index]!,
      }),
    ),
    usage: usageOf(answer),
    rankgate: decisionOf(answer),
  });
}

async function* streamFrames(
  answer: Answer,
  shape: Shape,
  options: ReplyOptions & { readonly envelope: Envelope },
): AsyncGenerator<string, void, void> {
  const { hasUsageChunk } = options;
  const sequences = answer.request.prompts.length * answer.request.n;
  const hasLogprobs = answer.request.topLogprobs !== null;
  const chunk = (choices: readonly object[], extra: object = {}): string =>
    JSON.stringify({
      ...options.envelope,
      object: shape.chunkObject,
      choices,
      ...(hasUsageChunk ? { usage: null } : {}),
      ...extra,
    });
  const opened = new Set<number>();
  let endedCount = 0;
  for await (const { index, value: event } of answer.events()) {
    if (!opened.has(index)) {
      opened.add(index);
      const choice = shape.openChoice(index);
      if (choice !== null) yield chunk([choice]);
    }
    // A piece without text: a character or a possible stop string is not complete yet.
    if (event.kind === 'piece' && (event.text !== '' || (hasLogprobs && event.tokens.length > 0))) {
      yield chunk([shape.deltaChoice(index, event.text, hasLogprobs ? event.tokens : null)]);
    }
    if (event.kind === 'end') {
      endedCount += 1;
      const isLast = endedCount === sequences && !hasUsageChunk;
      yield chunk(
        [shape.endChoice(index, event.reason)],
        isLast ? { rankgate: decisionOf(answer) } : {},
      );
    }
  }
  if (hasUsageChunk) {
    yield chunk([], { usage: usageOf(answer), rankgate: decisionOf(answer) });
  }
  yield '[DONE]';
}

function usageOf(answer: Answer): object {
  const { promptTokens, completionTokens, cachedTokens } = answer;
  return {
    prompt_tokens: promptTokens,
    completion_tokens: completionTokens,
    total_tokens: promptTokens + completionTokens,
    prompt_tokens_details: { cached_tokens: cachedTokens },
  };
}

function decisionOf(answer: Answer): object {
  const report = answer.report();
  return {
    adapter: report.adapter,
    generation: report.generation,
    rank: report.rank,
    rank_max: report.rankMax,
    reason: report.reason,
    predicted_ms: rounded(report.predictedMs),
    queue_ms: rounded(report.queueMs),
    ttft_ms: rounded(report.ttftMs),
    total_ms: rounded(report.totalMs),
    cached_tokens: report.cachedTokens,
  };
}

/** On a stream these are what is known before the first token; a queue time that is not known yet is left out. */
function setDecisionHeaders(c: Context<Env>, answer: Answer): void {
  const report = answer.report();
  if (report.adapter !== null) c.header('x-adapter-id', report.adapter);
  if (report.generation !== null) c.header('x-adapter-generation', report.generation);
  c.header('x-adapter-rank', `${report.rank}/${report.rankMax}`);
  c.header('x-rank-reason', report.reason);
  if (report.predictedMs !== null) c.header('x-predicted-ms', String(rounded(report.predictedMs)));
  if (report.queueMs !== null) c.header('x-queue-ms', String(rounded(report.queueMs)));
}

/** Microseconds are noise here. */
function rounded(ms: number | null): number | null {
  return ms === null ? null : Math.round(ms * 1000) / 1000;
}
