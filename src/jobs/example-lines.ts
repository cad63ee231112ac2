// The lines of a training file as they arrive, each in OpenAI's chat fine-tuning shape (`messages`, the last one the
// assistant's or a `reference_answer` behind them, `weight` 0 for an answer that is only context), or `prompt` and
// `completion`. The shape only: what it is in tokens, and whether that fits, the trainer says (trainer/examples.ts). Nothing
// is held but the line that is not complete.

import { z } from 'zod';
import { asGatewayError, GatewayError } from '../errors.ts';

/** Bytes of a line, its line break not counted. */
export const exampleBytesMax: number = 1024 * 1024;
const linesMax = 1_000_000;
/** A line's JSON needs three; what nests without end is not given to a parser. */
const depthMax = 8;

export interface ExampleMessage {
  readonly role: 'system' | 'user' | 'assistant';
  readonly content: string;
  /** Whether it is learnt: an assistant's, without weight 0. */
  readonly learnt: boolean;
}

export type ExampleShape =
  | { readonly kind: 'chat'; readonly messages: readonly ExampleMessage[] }
  | { readonly kind: 'text'; readonly prompt: string; readonly completion: string };

/** Lines are numbered from 1. */
export type ExampleLine =
  | { readonly line: number; readonly shape: ExampleShape }
  | { readonly line: number; readonly error: string };

/** Empty lines are passed over. Throws INVALID_FILE for what is no text file at all. */
export async function* readExampleLines(
  chunks: AsyncIterable<Uint8Array>,
): AsyncGenerator<ExampleLine, void> {
  let line = 0;
  for await (const bytes of splitLines(chunks)) {
    line += 1;
    if (line > linesMax) throw invalid(`the file has more than ${linesMax} lines`);
    if (bytes === null) {
      yield { line, error: `more than ${exampleBytesMax} bytes` };
      continue;
    }
    try {
      const text = decode(bytes);
      if (text.trim() !== '') yield { line, shape: parseExample(text) };
    } catch (error) {
      yield { line, error: asGatewayError(error).message };
    }
  }
}

/** null for a line that is too long; its bytes are dropped as they come. */
async function* splitLines(
  chunks: AsyncIterable<Uint8Array>,
): AsyncGenerator<Uint8Array | null, void> {
  let held: Uint8Array[] = [];
  let heldBytes = 0;
  const hold = (bytes: Uint8Array): void => {
    heldBytes += bytes.length;
    if (heldBytes > exampleBytesMax) held = [];
    else if (bytes.length > 0) held.push(bytes.slice()); // The chunk's memory may be used again.
  };
  const take = (): Uint8Array | null => {
    const whole = heldBytes > exampleBytesMax ? null : Buffer.concat(held);
    [held, heldBytes] = [[], 0];
    return whole;
  };
  for await (const chunk of chunks) {
    let start = 0;
    for (let end = chunk.indexOf(10); end >= 0; end = chunk.indexOf(10, start)) {
      hold(chunk.subarray(start, end));
      yield take();
      start = end + 1;
    }
    hold(chunk.subarray(start));
  }
  if (heldBytes > 0) yield take();
}

const decoder = new TextDecoder('utf-8', { fatal: true, ignoreBOM: true });

function decode(bytes: Uint8Array): string {
  try {
    return decoder.decode(bytes);
  } catch {
    throw invalid('not UTF-8');
  }
}

const text = z
  .string()
  .refine((value) => !/\p{Surrogate}/u.test(value), 'holds half of a surrogate pair');
const message = z.strictObject({
  role: z.enum(['system', 'user', 'assistant']),
  content: text,
  weight: z.union([z.literal(0), z.literal(1)]).exactOptional(),
});
const chat = z.strictObject({
  messages: z.array(message).min(1).max(1024),
  /** What the answer should be, behind a user's message: OpenAI's files of prompts have it. */
  reference_answer: text.min(1).exactOptional(),
});
const pair = z.strictObject({ prompt: text, completion: text.min(1) });

/** Throws INVALID_FILE that says what is wrong with the line; the caller knows its number. */
function parseExample(line: string): ExampleShape {
  const value = parseJson(line);
  const isPair = typeof value === 'object' && value !== null && 'prompt' in value;
  const parsed = isPair ? pair.safeParse(value) : chat.safeParse(value);
  if (!parsed.success) {
    const { path, message: what } = parsed.error.issues[0]!;
    throw invalid(path.length === 0 ? what : `${path.join('.')}: ${what}`);
  }
  const example = parsed.data;
  if ('prompt' in example) return { kind: 'text', ...example };
  const { reference_answer: reference } = example;
  const messages: ExampleMessage[] = example.messages.map(({ role, content, weight }) => {
    if (weight !== undefined && role !== 'assistant') throw invalid(`a ${role} with a weight`);
    return { role, content, learnt: role === 'assistant' && weight !== 0 };
  });
  if (reference !== undefined) {
    if (messages.at(-1)!.role !== 'user')
      throw invalid('a reference_answer behind no user’s message');
    messages.push({ role: 'assistant', content: reference, learnt: true });
  }
  if (messages.at(-1)!.role !== 'assistant') throw invalid('the last message is no assistant’s');
  if (!messages.some(({ learnt }) => learnt)) throw invalid('no message is learnt');
  return { kind: 'chat', messages };
}

function parseJson(line: string): unknown {
  try {
    if (isShallow(line)) return JSON.parse(line);
  } catch {
    // As below.
  }
  throw invalid('not JSON');
}

/** What nests deeper is refused before a parser sees it, which a megabyte of brackets keeps busy for half a second. */
function isShallow(line: string): boolean {
  let depth = 0;
  let isText = false;
  for (let i = 0; i < line.length; i++) {
    const code = line.charCodeAt(i);
    if (code === 34) isText = !isText;
    else if (isText) i += code === 92 ? 1 : 0;
    else if (code === 123 || code === 91) depth += 1;
    else if (code === 125 || code === 93) depth -= 1;
    if (depth > depthMax) return false;
  }
  return true;
}

function invalid(message: string): GatewayError {
  return new GatewayError('INVALID_FILE', message);
}
