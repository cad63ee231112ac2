// A line of a training file → tokens, and which of them are learnt: an answer and the token that ends it, as serving would
// see them. What comes before an answer is tokenised as the prompt that serving makes of it, the answer on its own, as it
// would be generated. An example of more than one window is cut at its end; one whose answers lie behind the cut is refused.

import { createHash } from 'node:crypto';
import { GatewayError, type LineError } from '../errors.ts';
import {
  type ExampleMessage,
  type ExampleShape,
  exampleBytesMax,
  readExampleLines,
} from '../jobs/example-lines.ts';
import { type ChatTemplate, createChatTemplate } from '../model/chat-template.ts';
import type { GgufMetadata } from '../model/gguf-values.ts';
import {
  createTokenizer,
  endTokensOf,
  readTokenizerSource,
  type Tokenizer,
} from '../model/tokenizer.ts';

export interface Example {
  readonly tokens: Int32Array; // [n], n ≥ 2
  /** 1: is learnt, from the tokens before it; so never the first. */
  readonly learnt: Uint8Array; // [n]
}

/** Throws INVALID_REQUEST or UNSUPPORTED that says why the line cannot be learnt. */
export type ExampleEncoder = (shape: ExampleShape) => Example;

// No token is shorter than a byte of its text; the template's own come on top.
const encodedMax = 4 * exampleBytesMax;
// What a template prints as the date must not change from one attempt of a job to the next.
export const templateDate: Date = new Date(0);

interface Part {
  readonly tokens: ArrayLike<number>;
  /** So many of the first are learnt. */
  readonly learnt: number;
}

/** What a base reads and writes, and how its turns are written; null: it has none. */
export interface BaseText {
  readonly tokenizer: Tokenizer;
  readonly ends: ReadonlySet<number>;
  readonly template: ChatTemplate | null;
}

export function openText(metadata: GgufMetadata): BaseText {
  const source = readTokenizerSource(metadata);
  const tokenizer = createTokenizer(source);
  const ends = new Set(endTokensOf(source));
  const key = 'tokenizer.chat_template';
  const textOf = (token: number | null): string => (token === null ? '' : tokenizer.textOf(token));
  const template = metadata.has(key)
    ? createChatTemplate({
        template: metadata.string(key),
        bosText: textOf(tokenizer.bos),
        eosText: textOf(tokenizer.eos),
        specials: tokenizer.specials,
      })
    : null;
  return { tokenizer, ends, template };
}

export function createExampleEncoder(metadata: GgufMetadata, windowRows: number): ExampleEncoder {
  const { tokenizer, ends, template } = openText(metadata);
  return (shape) => {
    switch (shape.kind) {
      case 'text':
        return joined(textParts(tokenizer, shape), windowRows);
      case 'chat':
        if (template === null) {
          throw new GatewayError('UNSUPPORTED', 'the model file has no chat template');
        }
        return joined(chatParts({ tokenizer, ends }, template, shape.messages), windowRows);
    }
  };
}

function textParts(
  { addsBos, bos, eos, encodeText }: Tokenizer,
  { prompt, completion }: ExampleShape & { readonly kind: 'text' },
): Part[] {
  const answer = [...encodeText(completion, encodedMax), ...(eos === null ? [] : [eos])];
  return [
    { tokens: addsBos && bos !== null ? [bos] : [], learnt: 0 },
    { tokens: encodeText(prompt, encodedMax), learnt: 0 },
    { tokens: answer, learnt: answer.length },
  ];
}

function chatParts(
  { tokenizer, ends }: { readonly tokenizer: Tokenizer; readonly ends: ReadonlySet<number> },
  template: ChatTemplate,
  messages: readonly ExampleMessage[],
): Part[] {
  const rendered = (count: number, generationPrompt: boolean) =>
    template.render({
      messages: messages.slice(0, count),
      generationPrompt,
      // All of these texts have one mark: what is rendered of fewer messages begins what is rendered of more.
      markNotIn: messages.map(({ content }) => content),
      templateArguments: {},
      now: templateDate,
      charactersMax: encodedMax,
    });
  const answers = messages.flatMap(({ role }, i) => (role === 'assistant' ? [i] : []));
  const texts = [
    ...answers.map((i) => rendered(i, true)), // up to where the answer begins
    rendered(messages.length, false),
  ];
  return texts.map(({ marked, mark }, i) => {
    const before = texts[i - 1]?.marked ?? '';
    if (!marked.startsWith(before)) {
      const message = 'the chat template does not write an answer behind the prompt for it';
      throw new GatewayError('UNSUPPORTED', message);
    }
    const all = tokenizer.encodePrompt(marked.slice(before.length), mark, encodedMax);
    if (i === 0) return { tokens: all, learnt: 0 };
    const tokens = tokenizer.addsBos && all[0] === tokenizer.bos ? all.subarray(1) : all;
    const end = tokens.findIndex((token) => ends.has(token)) + 1;
    if (end === 0) {
      const message = 'the chat template ends no answer with a token that serving stops at';
      throw new GatewayError('UNSUPPORTED', message);
    }
    const isLast = i === texts.length - 1;
    return {
      tokens: isLast ? tokens.subarray(0, end) : tokens,
      learnt: messages[answers[i - 1]!]!.learnt ? end : 0,
    };
  });
}

function joined(parts: readonly Part[], windowRows: number): Example {
  const count = parts.reduce((sum, part) => sum + part.tokens.length, 0);
  const tokens = new Int32Array(count);
  const learnt = new Uint8Array(count);
  let at = 0;
  for (const part of parts) {
    tokens.set(part.tokens, at);
    learnt.fill(1, at, at + part.learnt);
    at += part.tokens.length;
  }
  learnt[0] = 0;
  const kept = Math.min(count, windowRows + 1); // the last token has no row: nothing follows it
  if (!learnt.subarray(0, kept).includes(1)) {
    const message =
      kept < count
        ? `its first ${kept} tokens, a window, hold nothing of an answer`
        : 'a single token is nothing to learn';
    throw new GatewayError('INVALID_REQUEST', message);
  }
  return { tokens: tokens.slice(0, kept), learnt: learnt.slice(0, kept) };
}

export interface ExampleFile {
  readonly examples: readonly Example[];
  /** The first 100. */
  readonly errors: readonly LineError[];
  readonly errorCount: number;
}

const errorsMax = 100;
const tokensMax = 16 * 1024 * 1024; // 84 MB as examples

/** Throws PAYLOAD_TOO_LARGE for more lines or tokens than are trained on at once. */
export async function readExamples(
  chunks: AsyncIterable<Uint8Array>,
  encode: ExampleEncoder,
): Promise<ExampleFile> {
  const examples: Example[] = [];
  const errors: LineError[] = [];
  let errorCount = 0;
  let tokens = 0;
  const refuse = (line: number, message: string): void => {
    errorCount += 1;
    if (errors.length < errorsMax) errors.push({ line, message });
  };
  for await (const entry of readExampleLines(chunks)) {
    if ('error' in entry) {
      refuse(entry.line, entry.error);
      continue;
    }
    try {
      const example = encode(entry.shape);
      examples.push(example);
      tokens += example.tokens.length;
    } catch (error) {
      if (!(error instanceof GatewayError)) throw error;
      refuse(entry.line, error.message);
    }
    if (tokens > tokensMax) {
      throw new GatewayError('PAYLOAD_TOO_LARGE', `more than ${tokensMax} tokens`);
    }
  }
  return { examples, errors, errorCount };
}

export interface Split {
  readonly training: readonly Example[];
  readonly heldOut: readonly Example[];
}

/** By the hash of what is learnt: equal lines are on one side, whatever file they are in. Of a file so small that none is
 *  held out, the example with the least hash is, unless all are equal. */
export function splitExamples(examples: readonly Example[], heldOutShare: number): Split {
  const places = examples.map(placeOf);
  const least = places.reduce((low, place) => Math.min(low, place), 1);
  const bound = least < heldOutShare ? heldOutShare : least + 2 ** -53;
  const isHeldOut = (_: Example, i: number): boolean => heldOutShare > 0 && places[i]! < bound;
  const heldOut = examples.filter(isHeldOut);
  if (heldOut.length === examples.length) return { training: examples, heldOut: [] };
  return { training: examples.filter((example, i) => !isHeldOut(example, i)), heldOut };
}

/** Uniform in [0, 1), multiples of 2^-48. */
function placeOf({ tokens, learnt }: Example): number {
  return (
    createHash('sha256').update(bytesOf(tokens)).update(learnt).digest().readUIntBE(0, 6) / 2 ** 48
  );
}

/** The hash of all that is learnt, in order. */
export function hashExamples(examples: readonly Example[]): string {
  const hash = createHash('sha256');
  for (const { tokens, learnt } of examples) {
    hash.update(`${tokens.length}:`).update(bytesOf(tokens)).update(learnt);
  }
  return hash.digest('hex');
}

function bytesOf({ buffer, byteOffset, byteLength }: Int32Array): Uint8Array {
  return new Uint8Array(buffer, byteOffset, byteLength);
}
