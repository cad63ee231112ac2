// POST /v1/chat/completions: OpenAI's chat shape over generate.

import type { Context } from 'hono';
import { z } from 'zod';
import type { ChatMessage } from '../engine/text.ts';
import type { ServerDeps } from './deps.ts';
import type { Env } from './env.ts';
import { generate } from './generation.ts';
import { readBody } from './limits.ts';
import { chatLogprobs } from './logprobs.ts';
import { invalidRequest } from './problem.ts';
import type { Shape } from './reply.ts';
import { byForm, fewEntries, generationSchema, plainText, tokenIdMax } from './schemas.ts';

const textPart = z.strictObject({ type: z.literal('text'), text: plainText });
const textParts = z.array(textPart).min(1).max(256);
const message = z.strictObject({
  role: z.enum(['system', 'user', 'assistant']),
  content: byForm<string | z.infer<typeof textParts>>((value) =>
    Array.isArray(value) ? textParts : plainText,
  ),
});

/** Values that a template may print: no character that could spell a special token (faults.md B56). */
const templateValue = z.custom<string | number | boolean>(
  (value) =>
    typeof value === 'boolean' ||
    Number.isFinite(value) ||
    (typeof value === 'string' && /^[\w .:,-]{0,128}$/.test(value)),
  'want true, false, a number or at most 128 of letters, digits, blanks and _.:,-',
);
/** What the gateway itself gives to the template. */
const templateOwn = ['messages', 'add_generation_prompt', 'bos_token', 'eos_token', 'tools'];

const chatSchema = generationSchema({
  messages: z.array(message).min(1).max(1024),
  max_completion_tokens: z.int().min(1).max(tokenIdMax).exactOptional(),
  logprobs: z.boolean().exactOptional(),
  top_logprobs: z.int().min(0).max(20).exactOptional(),
  response_format: z.strictObject({ type: z.literal('text') }).exactOptional(),
  chat_template_kwargs: fewEntries(16)
    .pipe(z.record(z.string().regex(/^[a-z_][a-z0-9_]{0,63}$/i), templateValue))
    .refine((value) => !templateOwn.some((name) => name in value), 'sets a reserved variable')
    .exactOptional(),
});
type ChatBody = z.infer<typeof chatSchema>;

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
    // A template's arguments are no part of a training line.
    captured: templateArguments === undefined ? { messages } : null,
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
