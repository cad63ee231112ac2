// Request bodies, strictly: a field that is not listed is refused by name, nothing is coerced, everything has a limit.
// What one call alone has is beside its handler, with the rules across fields; sizes that depend on the model (vocabulary,
// context) are in generation.ts.

import { z } from 'zod';
import { rankMaxLimit } from '../adapters/adapter.ts';
import { type Merge, merges, partsMax, weightMax } from '../engine/messages.ts';
import { invalidRequest } from './problem.ts';

// Characters, before tokenising; the text worker has its own, tighter limit from the context length.
const textLengthMax = 2 ** 20;
const promptTokensMax = 2 ** 17; // beyond any context served
export const tokenIdMax: number = 2 ** 31 - 1;

/** Lone surrogates have no UTF-8 form: they would reach the tokenizer as something else than was sent. */
export const plainText: z.ZodString = z
  .string()
  .max(textLengthMax)
  .refine((value) => !/\p{Surrogate}/u.test(value), 'holds half of a surrogate pair');
/** One pass by hand: z.array(z.int()) takes 90 ms for 131,072 ids, this under 1 ms, and the event loop waits for it. */
export const tokens: z.ZodType<number[]> = z
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

/** What an answer is about: a row of the archive. */
export const domainName: z.ZodString = z
  .string()
  .regex(/^[a-z0-9-]{1,64}$/, 'want 1 to 64 of a-z 0-9 and -');

/** Counted first: a record's keys are validated one by one, each a hundred times slower than counted. */
export function fewEntries(entriesMax: number): z.ZodType<Record<string, unknown>> {
  return z.custom<Record<string, unknown>>(
    (value) =>
      typeof value === 'object' &&
      value !== null &&
      !Array.isArray(value) &&
      Object.keys(value).length <= entriesMax,
    `want an object of at most ${entriesMax} entries`,
  );
}

/** The value's form (a list or not, say) tells which schema is meant; a union would blame another one. */
export function byForm<T>(schemaOf: (value: unknown) => z.ZodType): z.ZodCustom<T, T> {
  return z.custom<T>().check(({ value, issues }) => {
    const { error } = schemaOf(value).safeParse(value);
    for (const issue of error?.issues ?? []) issues.push(issue as z.core.$ZodRawIssue);
  });
}

const stopString = plainText.pipe(z.string().min(1).max(256));
const stopStrings = z.array(stopString).max(4);

/** Fields that both completion calls share. Ranges are OpenAI's where it has the field, else vLLM's. */
const shared = z.strictObject({
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
  stop: byForm<string | string[]>((value) =>
    Array.isArray(value) ? stopStrings : stopString,
  ).exactOptional(),
  n: z.int().min(1).max(8).exactOptional(),
  presence_penalty: z.number().min(-2).max(2).exactOptional(),
  frequency_penalty: z.number().min(-2).max(2).exactOptional(),
  repetition_penalty: z.number().gt(0).max(2).exactOptional(),
  logit_bias: fewEntries(300)
    .pipe(z.record(z.string().regex(/^(?:0|[1-9]\d{0,9})$/), z.number().min(-100).max(100)))
    .exactOptional(),
  user: plainText.pipe(z.string().max(256)).exactOptional(),
  /** false: not captured, whatever the adapter's owner wants. */
  store: z.boolean().exactOptional(),
  service_tier: z
    .string()
    .regex(/^[a-z0-9_-]{1,64}$/)
    .exactOptional(),
  /** Adapters blended by weight over the base that `model` names; blend.ts has the rules across these fields. */
  adapters: z
    .array(
      z.strictObject({
        id: z.string().min(1).max(256),
        weight: z.number().min(-weightMax).max(weightMax),
      }),
    )
    .min(1)
    .max(partsMax)
    .exactOptional(),
  domain: domainName.exactOptional(),
  merge: z.enum(merges).exactOptional(),
  density: z.number().gt(0).max(1).exactOptional(),
  fly_top_k: z.int().min(1).max(rankMaxLimit).exactOptional(),
  instruction_prior: plainText.pipe(z.string().min(1).max(2000)).exactOptional(),
  prior_strength: z.number().min(0).max(100).exactOptional(),
  /** Looked into by router/budget.ts, which words its errors. */
  latency: z.unknown().optional(),
}) satisfies z.ZodType<GenerationBody>;

/** One call's body: what both share, and its `own`. */
export function generationSchema<S extends z.ZodRawShape>(
  own: S,
): z.ZodType<GenerationBody & z.output<z.ZodObject<S>>> {
  // The compiler cannot see through a generic extend; `satisfies` above holds the shared half, zod infers the own one.
  return shared.extend(own) as never;
}

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
  store?: boolean;
  service_tier?: string;
  latency?: unknown;
  adapters?: Array<{ id: string; weight: number }>;
  domain?: string;
  merge?: Merge;
  density?: number;
  fly_top_k?: number;
  instruction_prior?: string;
  prior_strength?: number;
}

/** Throws INVALID_REQUEST whose `param` is the first offending field. `at`: where in the body it stands. */
export function parseBody<T>(
  schema: z.ZodType<T>,
  body: unknown,
  at: readonly PropertyKey[] = [],
): T {
  const parsed = schema.safeParse(body);
  if (parsed.success) return parsed.data;
  const issue = parsed.error.issues[0]!;
  if (issue.code === 'unrecognized_keys') {
    const param = paramOf([...at, ...issue.path, issue.keys[0] ?? '']);
    throw invalidRequest(`unknown or unsupported field: ${param}`, param);
  }
  const param = paramOf([...at, ...issue.path]);
  throw invalidRequest(
    param === '' ? issue.message : `${param}: ${issue.message}`,
    param || undefined,
  );
}

/** `messages[0].content`; a key that a client chose is shown in part only. */
function paramOf(path: readonly PropertyKey[]): string {
  return path
    .map((part) => (typeof part === 'number' ? `[${part}]` : `.${String(part).slice(0, 64)}`))
    .join('')
    .replace(/^\./, '');
}
