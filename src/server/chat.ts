// POST /v1/chat/completions: OpenAI's chat shape over generate.

import type { Context } from 'hono';
import type { ChatMessage } from '../engine/text.ts';
import type { ServerDeps } from './deps.ts';
import type { Env } from './env.ts';
import { generate } from './generation.ts';
import { readBody } from './limits.ts';
import { chatLogprobs } from './logprobs.ts';
import { invalidRequest } from './problem.ts';
import type { Shape } from './reply.ts';
import { type ChatBody, chatSchema } from './schemas.ts';

export async function completeChat(c: Context<Env>, deps: ServerDeps): Promise<Response> {
  const { config, text } = deps;
  const body = await readBody(c, deps, chatSchema);
  if (body.top_logprobs !== undefined && body.logprobs !== true) {
    throw invalidRequest('top_logprobs needs logprobs: true', 'top_logprobs');
  }
  const messages = body.messages.map(toMessage);
  const templateArguments = body.chat_template_kwargs;
  return generate(c, deps, {
    body,
    shape: chatShape,
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
  open: () => ({ delta: { role: 'assistant', content: '' } }),
  delta: (content) => ({ delta: { content } }),
  end: { delta: {} },
  whole: (_, content) => ({ message: { role: 'assistant', content, refusal: null } }),
  logprobs: (_, tokens) => chatLogprobs(tokens),
};
