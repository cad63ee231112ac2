// Text ↔ tokens of a byte-level BPE vocabulary (GGUF `tokenizer.ggml.model` = gpt2). Ids equal llama.cpp's, with one
// difference on purpose: in caller's text a user-defined token (`<think>`) stays text too, not only a control token,
// because a caller must not speak with the template's voice (faults.md B56).

import { GatewayError } from '../errors.ts';
import { byteCharacters, createMerger, TokenBuffer } from './bpe.ts';
import type { GgufMetadata } from './gguf-values.ts';
import { createPreTokenizer } from './pre-tokenizer.ts';

/** What it takes to read tokens. */
export interface Vocabulary {
  readonly tokens: readonly string[];
  /** GGUF token types, one per token; empty when the file has none (all normal). */
  readonly tokenTypes: ArrayLike<number>;
  readonly bos: number | null;
  readonly eos: number | null;
}

/** And to make them: what a model file says, as it stands there. */
export interface TokenizerSource extends Vocabulary {
  /** tokenizer.ggml.model */
  readonly model: string;
  /** tokenizer.ggml.pre */
  readonly pre: string;
  readonly merges: readonly string[];
  /** tokenizer.ggml.add_bos_token; null when absent: the pre-tokenizer decides, as in llama.cpp. */
  readonly addBos: boolean | null;
}

export interface Tokenizer {
  readonly bos: number | null;
  readonly eos: number | null;
  readonly addsBos: boolean;
  /** Longest token: no text of more than n times as many UTF-16 units fits into n tokens. */
  readonly tokenCharactersMax: number;
  /** Texts of the tokens that only a template may spell, longest first. */
  readonly specials: readonly string[];
  /** Caller's text: special tokens stay text. No BOS. Throws CONTEXT_LENGTH_EXCEEDED beyond `tokensMax`. */
  encodeText(text: string, tokensMax: number): Int32Array<ArrayBuffer>;
  /** A rendered template: spelled special tokens become tokens, then `ignored` is dropped from what is left. Begins
   *  with exactly one BOS when the model wants one, whether or not the template spelled it. */
  encodePrompt(prompt: string, ignored: string | null, tokensMax: number): Int32Array<ArrayBuffer>;
  textOf(token: number): string;
}

const vocabSizeMax = 2 ** 20;
const mergesMax = 2 ** 21;

// Token types of the GGUF format.
const types = { normal: 1, unknown: 2, control: 3, userDefined: 4, byte: 6 } as const;

// llama.cpp v0.4.0 takes tokens with these texts for control tokens whatever the file says (llama-vocab.cpp, "its type
// will be overridden"): files in the wild get the type wrong, and then every caller could end a turn. The first list
// ends the generation there too.
const endTexts: readonly string[] = (
  '<|eot_id|> <|im_end|> <|end|> <|return|> <|call|> <|flush|> <|calls|> <end_of_turn> <|endoftext|> </s> ' +
  '<|eom_id|> <EOT> _<EOT> [EOT] [EOS] <|end_of_text|> <end_of_utterance> <eos> <turn|> <|tool_response> ' +
  '<｜end▁of▁sentence｜> [e~[ <|fim_pad|> <fim-pad> <fim_pad> <PAD> [PAD] <|fim_repo|> <|repo_name|> <fim-repo> ' +
  '<REPO> <reponame> <|file_sep|>'
).split(' ');
const middleTexts: readonly string[] = (
  '<|fim_prefix|> <fim-prefix> <fim_prefix> <｜fim▁begin｜> <PRE> <|code_prefix|> <|prefix|> ' +
  '<|fim_suffix|> <fim-suffix> <fim_suffix> <｜fim▁hole｜> <SUF> <|code_suffix|> <|suffix|> ' +
  '<|fim_middle|> <fim-middle> <fim_middle> <｜fim▁end｜> <MID> <|code_middle|> <|middle|>'
).split(' ');
const alwaysControl: ReadonlySet<string> = new Set([...endTexts, ...middleTexts]);

/** Tokens that end an answer: the file's own, and those that llama.cpp knows by their text. */
export function endTokensOf({ tokens, eos }: Vocabulary): number[] {
  const ends = new Set(eos === null ? [] : [eos]);
  for (const text of endTexts) {
    const token = tokens.indexOf(text);
    if (token >= 0) ends.add(token);
  }
  return [...ends].sort((a, b) => a - b);
}

interface Special {
  readonly token: number;
  readonly text: string;
  /** Runs of white space that a vocabulary lists as user-defined: they carry no authority, callers may type them. */
  readonly isPlain: boolean;
}

export function createTokenizer(source: TokenizerSource): Tokenizer {
  check(source);
  const pre = createPreTokenizer(source.pre);
  const specials = findSpecials(source);
  const specialTokens = new Set(specials.map((special) => special.token));
  const merger = createMerger({
    tokens: source.tokens,
    merges: source.merges,
    isSpecial: (token) => specialTokens.has(token),
    ignoresMerges: pre.ignoresMerges,
  });
  const plain = specials.filter((special) => special.isPlain);
  const { bos, eos } = source;
  const addsBos = (source.addBos ?? pre.addsBos) && bos !== null;
  const writeText = (text: string, output: TokenBuffer): void => {
    for (const part of partition(text, plain)) {
      if (typeof part === 'number') {
        output.push(part);
        continue;
      }
      let start = 0;
      for (const end of pre.wordEnds(part)) {
        merger.merge(part.slice(start, end), output);
        start = end;
      }
    }
  };
  return {
    bos,
    eos,
    addsBos,
    tokenCharactersMax: source.tokens.reduce((most, text) => Math.max(most, text.length), 1),
    specials: specials.filter((special) => !special.isPlain).map((special) => special.text),
    encodeText(text, tokensMax) {
      const output = new TokenBuffer(tokensMax);
      writeText(text, output);
      return output.finish();
    },
    encodePrompt(prompt, ignored, tokensMax) {
      const output = new TokenBuffer(tokensMax);
      const parts = partition(prompt, specials);
      if (addsBos && parts[0] !== bos) output.push(bos);
      for (const part of parts) {
        if (typeof part === 'number') output.push(part);
        else writeText(ignored === null ? part : part.replaceAll(ignored, ''), output);
      }
      return output.finish();
    },
    textOf: (token) => source.tokens[token] ?? '',
  };
}

const key = (name: string): string => `tokenizer.ggml.${name}`;

/** Without the merges, which are as many strings again. */
export function readVocabulary(metadata: GgufMetadata): Vocabulary {
  const has = (name: string): boolean => metadata.has(key(name));
  const id = (name: string): number | null =>
    has(`${name}_token_id`) ? metadata.integer(key(`${name}_token_id`)) : null;
  checkModel(metadata.string(key('model')));
  return {
    tokens: metadata.strings(key('tokens')),
    tokenTypes: has('token_type') ? metadata.numbers(key('token_type')) : [],
    bos: id('bos'),
    eos: id('eos'),
  };
}

export function readTokenizerSource(metadata: GgufMetadata): TokenizerSource {
  const has = (name: string): boolean => metadata.has(key(name));
  return {
    ...readVocabulary(metadata),
    model: metadata.string(key('model')),
    // Files without it are read by llama.cpp's fallback, which is what `default` names.
    pre: has('pre') ? metadata.string(key('pre')) : 'default',
    merges: metadata.strings(key('merges')),
    addBos: has('add_bos_token') ? metadata.boolean(key('add_bos_token')) : null,
  };
}

function checkModel(model: string): void {
  if (model === 'gpt2') return;
  throw new GatewayError('UNSUPPORTED', `tokenizer.ggml.model is '${model}'; supported: gpt2`);
}

function check({ model, tokens, merges, tokenTypes, ...ids }: TokenizerSource): void {
  checkModel(model);
  const fail = (message: string): never => {
    throw new GatewayError('INVALID_MODEL_FILE', `tokenizer: ${message}`);
  };
  if (tokens.length === 0 || tokens.length > vocabSizeMax) fail(`${tokens.length} tokens`);
  if (merges.length > mergesMax) fail(`${merges.length} merges`);
  if (tokenTypes.length !== 0 && tokenTypes.length < tokens.length) {
    fail(`${tokens.length} tokens, ${tokenTypes.length} token types`);
  }
  const distinct = new Set(tokens);
  if (distinct.size !== tokens.length)
    fail(`${tokens.length - distinct.size} tokens repeat others`);
  for (const key of ['bos', 'eos'] as const) {
    const id = ids[key];
    if (id !== null && !(Number.isInteger(id) && id >= 0 && id < tokens.length)) {
      fail(`${key} token is ${id} of ${tokens.length}`);
    }
  }
}

/** Longest text first: llama.cpp looks for them in that order. */
function findSpecials({ tokens, tokenTypes }: TokenizerSource): Special[] {
  const specials: Special[] = [];
  tokens.forEach((text, token) => {
    const type = tokenTypes[token] ?? types.normal;
    const isControl = type === types.control || type === types.unknown || alwaysControl.has(text);
    if (text === '' || !(isControl || type === types.userDefined)) return;
    specials.push({ token, text, isPlain: !isControl && text.trim() === '' });
  });
  return specials.sort((a, b) => Buffer.byteLength(b.text) - Buffer.byteLength(a.text));
}

/** Text with the given tokens cut out. A longer token wins over an earlier one, as in llama.cpp. */
function partition(text: string, specials: readonly Special[]): (string | number)[] {
  let parts: (string | number)[] = text === '' ? [] : [text];
  for (const special of specials) {
    if (!text.includes(special.text)) continue;
    parts = parts.flatMap((part) => (typeof part === 'number' ? part : cutOut(part, special)));
  }
  return parts;
}

function cutOut(text: string, special: Special): (string | number)[] {
  return text
    .split(special.text)
    .flatMap((part, index) => (index === 0 ? [part] : [special.token, part]))
    .filter((part) => part !== '');
}

const byteOf: ReadonlyMap<string, number> = new Map(
  byteCharacters.map((character, byte) => [character, byte]),
);

/** Token → the bytes that it stands for; null beyond the vocabulary. A special token's are those of its text, or none when
 *  `specials` is `hidden`: what a client is shown. Made when asked for: 49,152 small arrays are 12 MB. */
export function tokenBytes(
  { tokens, tokenTypes }: Pick<Vocabulary, 'tokens' | 'tokenTypes'>,
  specials: 'hidden' | 'shown' = 'hidden',
): (token: number) => Uint8Array | null {
  const encoder = new TextEncoder();
  const typeOf = (token: number): number => tokenTypes[token] ?? types.normal;
  tokens.forEach((text, token) => {
    if (typeOf(token) === types.byte) parseByteToken(text); // a file that is damaged is refused at the start
  });
  return (token) => {
    const text = tokens[token];
    if (text === undefined) return null;
    const type = typeOf(token);
    if (type === types.control || type === types.unknown || alwaysControl.has(text)) {
      return specials === 'hidden' ? new Uint8Array() : encoder.encode(text);
    }
    if (type === types.byte) return Uint8Array.of(parseByteToken(text));
    if (type === types.userDefined) return encoder.encode(text);
    const bytes = [...text].map((character) => byteOf.get(character));
    // A character outside the byte alphabet: the token was never made of bytes.
    return bytes.includes(undefined) ? encoder.encode(text) : Uint8Array.from(bytes as number[]);
  };
}

/** `<0x0A>` → 10. */
function parseByteToken(text: string): number {
  const digits = /^<0x([0-9A-Fa-f]{2})>$/.exec(text)?.[1];
  if (digits === undefined) {
    throw new GatewayError('INVALID_MODEL_FILE', `'${text}' is not a byte token like <0x0A>`);
  }
  return Number.parseInt(digits, 16);
}
