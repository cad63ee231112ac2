// POST /v1/completions: OpenAI's legacy shape. A prompt is one text, one list of token ids, or up to eight of either.
// Choice i·n + j is sample j of prompt i.

import type { Context } from 'hono';
import type { TextService } from '../engine/text.ts';
import { GatewayError } from '../errors.ts';
import type { ServerDeps } from './deps.ts';
import type { Env } from './env.ts';
import { openAnswer } from './generation.ts';
import { readBody } from './limits.ts';
import { LegacyLogprobs } from './logprobs.ts';
import { invalidRequest } from './problem.ts';
import { reply, type Shape } from './reply.ts';
import { type CompletionBody, completionSchema } from './schemas.ts';

export async function completeText(c: Context<Env>, deps: ServerDeps): Promise<Response> {
  const { config, text, engine } = deps;
  const body = await readBody(c, deps, completionSchema);
  if (body.echo === true && body.logprobs !== undefined) {
    throw new GatewayError(
      'UNSUPPORTED',
      'echo with logprobs needs log-probabilities of the prompt, which are not available',
      { param: 'logprobs' },
    );
  }
  const prompts = promptsOf(body.prompt);
  for (const prompt of prompts) checkTokens(prompt, engine.base.config.vocabSize);
  const answer = await openAnswer(c, deps, {
    body,
    idPrefix: 'cmpl-',
    topLogprobs: body.logprobs ?? null,
    tokensMax: body.max_tokens ?? null,
    tokensDefault: config.completionTokensDefault,
    promptCount: prompts.length,
    encode: () => Promise.all(prompts.map((prompt) => encodePrompt(prompt, text))),
  });
  let echoes: readonly string[] = [];
  try {
    if (body.echo === true) {
      echoes = await Promise.all(prompts.map((prompt) => promptText(prompt, text)));
    }
  } catch (error) {
    answer.end();
    throw error;
  }
  const n = body.n ?? 1;
  return reply(c, deps, answer, {
    shape: completionShape((index) => echoes[Math.floor(index / n)] ?? ''),
    isStream: body.stream === true,
    hasUsageChunk: body.stream_options?.include_usage === true,
    serviceTier: body.service_tier ?? null,
  });
}

type Prompt = string | readonly number[];

function promptsOf(prompt: CompletionBody['prompt']): readonly Prompt[] {
  if (typeof prompt === 'string') return [prompt];
  return isTokens(prompt) ? [prompt] : prompt;
}

function isTokens(prompt: Exclude<CompletionBody['prompt'], string>): prompt is number[] {
  return typeof prompt[0] === 'number';
}

function checkTokens(prompt: Prompt, vocabSize: number): void {
  if (typeof prompt === 'string') return;
  const outside = prompt.find((token) => token >= vocabSize);
  if (outside !== undefined) {
    throw invalidRequest(`token ${outside} is not one of the ${vocabSize} tokens`, 'prompt');
  }
}

async function encodePrompt(prompt: Prompt, text: TextService): Promise<Int32Array> {
  return typeof prompt === 'string' ? await text.encode(prompt) : Int32Array.from(prompt);
}

async function promptText(prompt: Prompt, text: TextService): Promise<string> {
  return typeof prompt === 'string' ? prompt : await text.decode(Int32Array.from(prompt));
}

/** One per response: the text offsets of the log-probabilities go on from chunk to chunk. */
function completionShape(echo: (index: number) => string): Shape {
  const offsets = new Map<number, LegacyLogprobs>();
  const logprobsOf = (
    index: number,
    tokens: Parameters<Shape['deltaChoice']>[2],
  ): object | null => {
    if (tokens === null) return null;
    const logprobs = offsets.get(index) ?? new LegacyLogprobs();
    offsets.set(index, logprobs);
    return logprobs.next(tokens);
  };
  return {
    wholeObject: 'text_completion',
    chunkObject: 'text_completion',
    openChoice(index) {
      const text = echo(index);
      return text === '' ? null : { index, text, logprobs: null, finish_reason: null };
    },
    deltaChoice: (index, text, tokens) => ({
      index,
      text,
      logprobs: logprobsOf(index, tokens),
      finish_reason: null,
    }),
    endChoice: (index, reason) => ({ index, text: '', logprobs: null, finish_reason: reason }),
    wholeChoice: (index, { text, tokens, reason }) => ({
      index,
      text: echo(index) + text,
      logprobs: logprobsOf(index, tokens),
      finish_reason: reason,
    }),
  };
}
