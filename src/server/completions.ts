// POST /v1/completions: OpenAI's legacy shape. A prompt is one text, one list of token ids, or up to eight of either.
// Choice i·n + j is sample j of prompt i.

import type { Context } from 'hono';
import { z } from 'zod';
import type { TextService } from '../engine/text.ts';
import { GatewayError } from '../errors.ts';
import type { ServerDeps } from './deps.ts';
import type { Env } from './env.ts';
import { generate } from './generation.ts';
import { readBody } from './limits.ts';
import { LegacyLogprobs } from './logprobs.ts';
import { invalidRequest } from './problem.ts';
import type { Shape } from './reply.ts';
import { byForm, generationSchema, plainText, tokens } from './schemas.ts';

type Prompts = string | number[] | string[] | number[][];

const texts = z.array(plainText).min(1).max(8);
const tokenLists = z.array(tokens).min(1).max(8);

/** The first element tells which of the four forms is meant. */
function promptForm(value: unknown): z.ZodType {
  if (!Array.isArray(value)) return plainText;
  if (Array.isArray(value[0])) return tokenLists;
  return typeof value[0] === 'number' ? tokens : texts;
}

const completionSchema = generationSchema({
  prompt: byForm<Prompts>(promptForm),
  echo: z.boolean().exactOptional(),
  logprobs: z.int().min(0).max(20).exactOptional(),
});

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
  let echoes: readonly string[] = [];
  return generate(c, deps, {
    body,
    shape: textShape((index) => echoes[Math.floor(index / (body.n ?? 1))] ?? ''),
    idPrefix: 'cmpl-',
    topLogprobs: body.logprobs ?? null,
    tokensMax: body.max_tokens ?? null,
    tokensDefault: config.completionTokensDefault,
    promptCount: prompts.length,
    async encode() {
      const encoded = await Promise.all(prompts.map((prompt) => encodePrompt(prompt, text)));
      if (body.echo === true) {
        echoes = await Promise.all(prompts.map((prompt) => promptText(prompt, text)));
      }
      return encoded;
    },
    captured: typeof body.prompt === 'string' ? { prompt: body.prompt } : null,
  });
}

type Prompt = string | readonly number[];

function promptsOf(prompt: Prompts): readonly Prompt[] {
  if (typeof prompt === 'string') return [prompt];
  return isTokens(prompt) ? [prompt] : prompt;
}

function isTokens(prompt: Exclude<Prompts, string>): prompt is number[] {
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
function textShape(echo: (index: number) => string): Shape {
  const offsets = new Map<number, LegacyLogprobs>();
  return {
    wholeObject: 'text_completion',
    chunkObject: 'text_completion',
    open: (index) => (echo(index) === '' ? null : { text: echo(index) }),
    delta: (text) => ({ text }),
    end: { text: '' },
    whole: (index, text) => ({ text: echo(index) + text }),
    logprobs(index, tokens) {
      const logprobs = offsets.get(index) ?? new LegacyLogprobs();
      offsets.set(index, logprobs);
      return logprobs.next(tokens);
    },
  };
}
