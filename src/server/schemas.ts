// Request bodies, strictly: a field that is not listed is refused by name, nothing is coerced, everything has a limit.
// Cross-field rules are in chat.ts and completions.ts; sizes that depend on the model (vocabulary, context) in answer.ts.

import { z } from 'zod';
import { type Generation, isAdapterName, isGeneration } from '../adapters/adapter.ts';
import type { GatewayError } from '../errors.ts';
import { invalidRequest } from './problem.ts';

// Characters, before tokenising; the text worker has its own, tighter limit from the context length.
const textLengthMax = 2 ** 20;
const promptTokensMax = 2 ** 17; // beyond any context served
const tokenIdMax = 2 ** 31 - 1;

/** Lone surrogates have no UTF-8 form: they would reach the tokenizer as something else than was sent. */
const text = z
  .string()
  .max(textLengthMax)
  .refine((value) => !/\p{Surrogate}/u.test(value), 'holds half of a surrogate pair');
/** One pass by hand: z.array(z.int()) takes 90 ms for 131,072 ids, this under 1 ms, and the event loop waits for it. */
const tokens: z.ZodType<number[]> = z
  .custom<number[]>((value) => Array.isArray(value), 'want a list of token ids')
  .check((context) => {
    const { value, issues } = context;
    const fail = (message: string, path: number[] = []): void =>
      void issues.push({ code: 'custom', message, path, input: value });
    if (value.length < 1 || value.length > promptTokensMax) {
      fail(`want 1 to ${promptTokensMax} token ids`);
      return;
    }
    const wrong = value.findIndex((id) => !(Number.isInteger(id) && id >= 0 && id <= tokenIdMax));
    if (wrong >= 0) fail('not a token id', [wrong]);
  });

/** Counted first: a record's keys are validated one by one, each a hundred times slower than counted. */
function fewEntries(entriesMax: number): z.ZodType<Record<string, unknown>> {
  return z.custom<Record<string, unknown>>(
    (value) =>
      typeof value === 'object' &&
      value !== null &&
      !Array.isArray(value) &&
      Object.keys(value).length <= entriesMax,
    `want an object of at most ${entriesMax} entries`,
  );
}

const stopString = text.pipe(z.string().min(1).max(256));

/** Fields that both completion calls share. Ranges are OpenAI's where it has the field, else vLLM's. */
const generationFields = {
  model: z.string().min(1).max(256),
  stream: z.boolean().exactOptional(),
  stream_options: z.strictObject({ include_usage: z.boolean().exactOptional() }).exactOptional(),
  max_tokens: z.int().min(1).max(tokenIdMax).exactOptional(),
  temperature: z.number().min(0).max(2).exactOptional(),
  top_p: z.number().gt(0).max(1).exactOptional(),
  top_k: z.int().min(-1).max(tokenIdMax).exactOptional(), // 0 and -1: off
  min_p: z.number().min(0).max(1).exactOptional(),
  seed: z
    .int()
    .min(-(2 ** 31))
    .max(2 ** 32 - 1)
    .exactOptional(),
  stop: z.union([stopString, z.array(stopString).max(4)]).exactOptional(),
  n: z.int().min(1).max(8).exactOptional(),
  presence_penalty: z.number().min(-2).max(2).exactOptional(),
  frequency_penalty: z.number().min(-2).max(2).exactOptional(),
  repetition_penalty: z.number().gt(0).max(2).exactOptional(),
  logit_bias: fewEntries(300)
    .pipe(z.record(z.string().regex(/^(?:0|[1-9]\d{0,9})$/), z.number().min(-100).max(100)))
    .exactOptional(),
  user: text.pipe(z.string().max(256)).exactOptional(),
  service_tier: z
    .string()
    .regex(/^[a-z0-9_-]{1,64}$/)
    .exactOptional(),
  /** Looked into by router/budget.ts, which words its errors. */
  latency: z.unknown().optional(),
};

const textPart = z.strictObject({ type: z.literal('text'), text });
const message = z.strictObject({
  role: z.enum(['system', 'user', 'assistant']),
  content: z.union([text, z.array(textPart).min(1).max(256)]),
});

/** Values that a template may print: no character that could spell a special token (faults.md B56). */
const templateValue = z.union([
  z.boolean(),
  z.number(),
  z
    .string()
    .max(128)
    .regex(/^[\w .:,-]*$/),
]);
/** What the gateway itself gives to the template. */
const templateOwn = ['messages', 'add_generation_prompt', 'bos_token', 'eos_token', 'tools'];

export const chatSchema: z.ZodType<ChatBody> = z.strictObject({
  ...generationFields,
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

const texts = z.array(text).min(1).max(8);
const tokenLists = z.array(tokens).min(1).max(8);

/** The first element tells which of the four forms is meant; a union would blame another one. */
function promptForm(value: unknown): z.ZodType {
  if (!Array.isArray(value)) return text;
  if (Array.isArray(value[0])) return tokenLists;
  return typeof value[0] === 'number' ? tokens : texts;
}

const prompt: z.ZodType<CompletionBody['prompt']> = z
  .custom<CompletionBody['prompt']>((value) => value !== undefined, 'want a prompt')
  .check(({ value, issues }) => {
    const parsed = promptForm(value).safeParse(value);
    for (const { path, message } of parsed.error?.issues ?? []) {
      issues.push({ code: 'custom', path, message, input: value });
    }
  });

export const completionSchema: z.ZodType<CompletionBody> = z.strictObject({
  ...generationFields,
  prompt,
  echo: z.boolean().exactOptional(),
  logprobs: z.int().min(0).max(20).exactOptional(),
});

const adapterName = z
  .string()
  .refine(
    isAdapterName,
    'an adapter name is 1 to 64 of a-z 0-9 . _ - and starts with a letter or digit',
  );
const generation = z.custom<Generation>(
  (value) => typeof value === 'string' && isGeneration(value),
  'want sha256: and 64 hex digits',
);

export const addAdapterSchema: z.ZodType<AddAdapterBody> = z.strictObject({
  name: adapterName,
  source: z.string().min(1).max(1024),
  accept_base_name: z.string().min(1).max(256).exactOptional(),
  if_generation: generation.exactOptional(),
  replace: z.boolean().exactOptional(),
});

export const swapSchema: z.ZodType<{ generation: Generation }> = z.strictObject({ generation });

export const loadLoraSchema: z.ZodType<LoadLoraBody> = z.strictObject({
  lora_name: adapterName,
  lora_path: z.string().min(1).max(1024),
  load_inplace: z.boolean().exactOptional(),
});

export const unloadLoraSchema: z.ZodType<{ lora_name: string }> = z.strictObject({
  lora_name: z.string().min(1).max(256),
});

export interface GenerationBody {
  model: string;
  stream?: boolean;
  stream_options?: { include_usage?: boolean };
  max_tokens?: number;
  temperature?: number;
  top_p?: number;
  top_k?: number;
  min_p?: number;
  seed?: number;
  stop?: string | string[];
  n?: number;
  presence_penalty?: number;
  frequency_penalty?: number;
  repetition_penalty?: number;
  logit_bias?: Record<string, number>;
  user?: string;
  service_tier?: string;
  latency?: unknown;
}

export interface ChatBody extends GenerationBody {
  messages: Array<{
    role: 'system' | 'user' | 'assistant';
    content: string | Array<{ type: 'text'; text: string }>;
  }>;
  max_completion_tokens?: number;
  logprobs?: boolean;
  top_logprobs?: number;
  response_format?: { type: 'text' };
  chat_template_kwargs?: Record<string, string | number | boolean>;
}

export interface CompletionBody extends GenerationBody {
  prompt: string | number[] | string[] | number[][];
  echo?: boolean;
  logprobs?: number;
}

export interface AddAdapterBody {
  name: string;
  source: string;
  accept_base_name?: string;
  if_generation?: Generation;
  replace?: boolean;
}

export interface LoadLoraBody {
  lora_name: string;
  lora_path: string;
  load_inplace?: boolean;
}

/** Throws INVALID_REQUEST whose `param` is the first offending field. */
export function parseBody<T>(schema: z.ZodType<T>, body: unknown): T {
  const parsed = schema.safeParse(body);
  if (parsed.success) return parsed.data;
  throw describeIssue(parsed.error.issues[0]!, []);
}

function describeIssue(issue: z.core.$ZodIssue, parent: readonly PropertyKey[]): GatewayError {
  const path = [...parent, ...issue.path];
  if (issue.code === 'unrecognized_keys') {
    const param = paramOf([...path, issue.keys[0] ?? '']);
    return invalidRequest(`unknown or unsupported field: ${param}`, param);
  }
  if (issue.code === 'invalid_union') {
    const meant = issue.errors.filter(isRightKind).sort(compareAlternatives)[0];
    if (meant !== undefined) return describeIssue(meant[0]!, path);
  }
  const param = paramOf(path);
  const message = issue.message.replace(/^Invalid input$/, 'none of the accepted forms');
  return invalidRequest(param === '' ? message : `${param}: ${message}`, param || undefined);
}

type Alternative = readonly z.core.$ZodIssue[];

/** A text where a list is wanted is no attempt at a list. */
function isRightKind([first]: Alternative): boolean {
  return first !== undefined && (first.path.length > 0 || first.code !== 'invalid_type');
}

/** First the alternative that was most likely meant: fewest faults, then the first fault furthest into the value. */
function compareAlternatives(a: Alternative, b: Alternative): number {
  if (a.length !== b.length) return a.length - b.length;
  const [pathA, pathB] = [a[0]!.path, b[0]!.path];
  if (pathA.length !== pathB.length) return pathB.length - pathA.length;
  const at = pathA.findIndex((part, i) => part !== pathB[i]);
  return at < 0 ? 0 : Number(pathB[at]) - Number(pathA[at]) || 0;
}

/** `messages[0].content`; a key that a client chose is shown in part only. */
function paramOf(path: readonly PropertyKey[]): string {
  return path
    .map((part) => (typeof part === 'number' ? `[${part}]` : `.${String(part).slice(0, 64)}`))
    .join('')
    .replace(/^\./, '');
}
