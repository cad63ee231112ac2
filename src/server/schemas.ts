// Request bodies, strictly: a field that is not listed is refused by name, nothing is coerced, everything has a limit.
// What one call alone has is beside its handler, with the rules across fields; sizes that depend on the model (vocabulary,
// context) are in generation.ts.

import { z } from 'zod';
import type { GatewayError } from '../errors.ts';
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

const stopString = plainText.pipe(z.string().min(1).max(256));

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
  stop: z.union([stopString, z.array(stopString).max(4)]).exactOptional(),
  n: z.int().min(1).max(8).exactOptional(),
  presence_penalty: z.number().min(-2).max(2).exactOptional(),
  frequency_penalty: z.number().min(-2).max(2).exactOptional(),
  repetition_penalty: z.number().gt(0).max(2).exactOptional(),
  logit_bias: fewEntries(300)
    .pipe(z.record(z.string().regex(/^(?:0|[1-9]\d{0,9})$/), z.number().min(-100).max(100)))
    .exactOptional(),
  user: plainText.pipe(z.string().max(256)).exactOptional(),
  service_tier: z
    .string()
    .regex(/^[a-z0-9_-]{1,64}$/)
    .exactOptional(),
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
  service_tier?: string;
  latency?: unknown;
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
