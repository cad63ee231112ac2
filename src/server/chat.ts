// POST /v1/chat/completions: OpenAI's chat shape over openAnswer and reply.

import type { Context } from 'hono';
import type { ChatMessage } from '../engine/text.ts';
import type { ServerDeps } from './deps.ts';
import type { Env } from './env.ts';
import { openAnswer } from './generation.ts';
import { readBody } from './limits.ts';
import { chatLogprobs } from './logprobs.ts';
import { invalidRequest } from './problem.ts';
import { reply, type Shape } from './reply.ts';
import { type ChatBody, chatSchema } from './schemas.ts';

export async function completeChat(c: Context<Env>, deps: ServerDeps): Promise<Response> {
  const { config, text } = deps;
  const body = await readBody(c, deps, chatSchema);
  if (body.top_logprobs !== undefined && body.logprobs !== true) {
    throw invalidRequest('top_logprobs needs logprobs: true', 'top_logprobs');
  }
  const messages = body.messages.map(toMessage);
  const templateArguments = body.chat_template_kwargs;
  const answer = await openAnswer(c, deps, {
    body,
    idPrefix: 'chatcmpl-',
    topLogprobs: body.logprobs === true ? (body.top_logprobs ?? 0) : null,
    tokensMax: tokensMaxOf(body),
    tokensDefault: config.chatTokensDefault,
    promptCount: 1,
    encode: async () => {
      const options = templateArguments === undefined ? {} : { templateArguments };
      return [(await text.encodeChat(messages, options)).tokens];
    },
  });
  return reply(c, deps, answer, {
    shape: chatShape,
    isStream: body.stream === true,
    hasUsageChunk: body.stream_options?.include_usage === true,
    serviceTier: body.service_tier ?? null,
  });
}

function toMessage({ role, content }: ChatBody['messages'][number]): ChatMessage {
  return {
    role,
    content: typeof content === 'string' ? content : content.map((part) => part.text).join(''),
  };
}

/** max_completion_tokens is the newer name of max_tokens. */
function tokensMaxOf(body: ChatBody): number | null {
  const { max_tokens: older, max_completion_tokens: newer } = body;
  if (older !== undefined && newer !== undefined && older !== newer) {
    throw invalidRequest('max_tokens and max_completion_tokens differ', 'max_completion_tokens');
  }
  return newer ?? older ?? null;
}

const chatShape: Shape = {
  wholeObject: 'chat.completion',
  chunkObject: 'chat.completion.chunk',
  openChoice: (index) => ({
    index,
    delta: { role: 'assistant', content: '' },
    logprobs: null,
    finish_reason: null,
  }),
  deltaChoice: (index, content, tokens) => ({
    index,
    delta: { content },
    logprobs: tokens === null ? null : chatLogprobs(tokens),
    finish_reason: null,
  }),
  endChoice: (index, reason) => ({ index, delta: {}, logprobs: null, finish_reason: reason }),
  wholeChoice: (index, { text, tokens, reason }) => ({
    index,
    message: { role: 'assistant', content: text, refusal: null },
    logprobs: tokens === null ? null : chatLogprobs(tokens),
    finish_reason: reason,
  }),
};
