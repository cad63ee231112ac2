import { createHash } from 'node:crypto';
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { beforeAll, describe, expect, it } from 'vitest';
import { byteCharacters } from '../../../src/model/bpe.ts';
import {
  createTokenizer,
  endTokensOf,
  type TokenizerSource,
  tokenBytes,
} from '../../../src/model/tokenizer.ts';
import { planeText, sweptPlanes } from '../../oracle/tokenize-corpus.ts';
import { baseTokenizerSource } from '../../support/base-tokenizer.ts';

interface Golden {
  readonly specials: readonly string[];
  readonly texts: readonly string[];
  readonly ids: Readonly<
    Record<
      string,
      {
        readonly text: readonly string[];
        readonly prompt: Readonly<Record<number, string>>;
        readonly planes: readonly string[];
      }
    >
  >;
}

const golden: Golden = JSON.parse(
  readFileSync(join(import.meta.dirname, '../../golden/tokenizer/smollm2.json'), 'utf8'),
);
const unpack = (ids: string): number[] => {
  const bytes = Uint8Array.from(Buffer.from(ids, 'base64'));
  return [...new Uint16Array(bytes.buffer)];
};
const noLimit = 2 ** 30;

let source: TokenizerSource;
beforeAll(async () => {
  source = await baseTokenizerSource();
});
// The golden ids are without BOS, whatever the pre-tokenizer would add.
const tokenizerOf = (pre: string): ReturnType<typeof createTokenizer> =>
  createTokenizer({ ...source, pre, addBos: false });

describe.each(Object.keys(golden.ids))('tokenizer, pre-tokenizer %s', (pre) => {
  const ids = golden.ids[pre]!;

  it('gives llama.cpp’s ids for text that must not be parsed', () => {
    const tokenizer = tokenizerOf(pre);
    const got = golden.texts.map((text) => [...tokenizer.encodeText(text, noLimit)]);
    expect(got).toEqual(ids.text.map(unpack));
  });

  it('gives llama.cpp’s ids for text whose special tokens are parsed', () => {
    const tokenizer = tokenizerOf(pre);
    const got = golden.texts.map((text) => [...tokenizer.encodePrompt(text, null, noLimit)]);
    const want = golden.texts.map((_, index) => unpack(ids.prompt[index] ?? ids.text[index]!));
    expect(got).toEqual(want);
    expect(Object.keys(ids.prompt).length).toBeGreaterThan(golden.specials.length * 3);
  });

  it('gives llama.cpp’s ids for every code point of the assigned planes', () => {
    const tokenizer = tokenizerOf(pre);
    const hashes = sweptPlanes.map((plane) =>
      createHash('sha256')
        .update(tokenizer.encodeText(planeText(plane), noLimit))
        .digest('hex'),
    );
    expect(hashes).toEqual(ids.planes);
  });
});

describe('tokenizer', () => {
  it('knows the special tokens of the base model', () => {
    expect(new Set(tokenizerOf('smollm').specials)).toEqual(new Set(golden.specials));
  });

  it('ends answers at the tokens that end them in llama.cpp', () => {
    // model.isEogToken over the vocabulary, node-llama-cpp 3.21.1: <|endoftext|>, <|im_end|>, <reponame>.
    expect(endTokensOf(source)).toEqual([0, 2, 4]);
    expect(endTokensOf(tiny([['<|eot_id|>', 1]]))).toEqual([258]);
  });

  it('puts exactly one BOS token before a prompt when the model wants one', () => {
    const tokenizer = createTokenizer({ ...source, addBos: true });
    const bos = source.bos!;
    const bosText = source.tokens[bos]!;
    expect([...tokenizer.encodePrompt('a', null, noLimit)]).toHaveLength(2);
    expect(tokenizer.encodePrompt('a', null, noLimit)[0]).toBe(bos);
    expect([...tokenizer.encodePrompt(`${bosText}a`, null, noLimit)]).toHaveLength(2);
    expect([...tokenizer.encodePrompt('', null, noLimit)]).toEqual([bos]);
  });

  it('drops the marks only after it looked for special tokens', () => {
    const tokenizer = tokenizerOf('smollm');
    const marked = '<|im_start|>user\n<\ue000|im_end|>';
    const [first, ...rest] = tokenizer.encodePrompt(marked, '\ue000', noLimit);
    expect(first).toBe(source.tokens.indexOf('<|im_start|>'));
    expect(rest).toEqual([...tokenizer.encodeText('user\n<|im_end|>', noLimit)]);
  });

  it('refuses text with more tokens than allowed, and takes text with just as many', () => {
    const tokenizer = tokenizerOf('smollm');
    const { length } = tokenizer.encodeText('one two three', noLimit);
    expect(tokenizer.encodeText('one two three', length)).toHaveLength(length);
    expect(() => tokenizer.encodeText('one two three', length - 1)).toThrow(
      expect.objectContaining({ code: 'CONTEXT_LENGTH_EXCEEDED' }),
    );
  });

  // 50,000 underscores take 608 ms in @huggingface/tokenizers 0.2.0 and four times that when doubled (figures.md).
  // Here 2^20 characters take 0.1 to 1.9 s on one core, so 2^17 in less than 2 s leaves room for a busy machine, while
  // a quadratic merge of 2^17 symbols would take minutes.
  it.each([
    'a',
    '_',
    ' ',
    '\n',
    '7',
    '漢',
    '😀',
    '\u0301',
    'ab',
    '<|im_',
    '<|im_end|>',
    ' a',
    '\t \u3000',
  ])('takes 2^17 characters of %j in linear time', (unit) => {
    const tokenizer = tokenizerOf('smollm');
    const text = unit.repeat(2 ** 17 / unit.length);
    const begin = performance.now();
    const tokens = tokenizer.encodeText(text, noLimit);
    expect(performance.now() - begin).toBeLessThan(2000);
    expect(tokens.length).toBeGreaterThan(1000);
  });

  it('loses nothing of a text but the bytes that the vocabulary lacks', () => {
    const tokenizer = tokenizerOf('smollm');
    const bytesOf = tokenBytes(source);
    const known = new Set(source.tokens);
    const has = (byte: number): boolean => known.has(byteCharacters[byte]!);
    // llama.cpp drops these too: leads of planes 4 and up, controls, and bytes that UTF-8 never has.
    const lacking = byteCharacters.flatMap((_, byte) => (has(byte) ? [] : [byte.toString(16)]));
    expect(lacking.join(' ')).toBe('4 6 13 14 16 1d c0 c1 f1 f2 f5 f6 f7 f8 f9 fa fb fc fd fe ff');
    for (const text of golden.texts) {
      const bytes = Array.from(tokenizer.encodeText(text, noLimit), (token) => bytesOf(token)!);
      expect(Buffer.concat(bytes)).toEqual(Buffer.from(Buffer.from(text).filter(has)));
    }
  });
});

/** All bytes, a few merges, and the tokens given. */
function tiny(extra: readonly (readonly [text: string, type: number])[]): TokenizerSource {
  return {
    model: 'gpt2',
    pre: 'gpt-2',
    tokens: [...byteCharacters, 'ab', 'abc', ...extra.map(([text]) => text)],
    merges: ['a b', 'ab c'],
    tokenTypes: [...byteCharacters.map(() => 1), 1, 1, ...extra.map(([, type]) => type)],
    bos: null,
    eos: null,
    addBos: null,
  };
}
const tokensOf = (
  from: TokenizerSource,
  text: string,
  encode: 'encodeText' | 'encodePrompt' = 'encodeText',
): string[] => {
  const tokenizer = createTokenizer(from);
  const ids =
    encode === 'encodeText'
      ? tokenizer.encodeText(text, noLimit)
      : tokenizer.encodePrompt(text, null, noLimit);
  return Array.from(ids, (id) => from.tokens[id]!);
};

describe('tokenizer of a small vocabulary', () => {
  it('merges the lowest rank first and the leftmost among equals', () => {
    const from = {
      ...tiny([
        ['aa', 1],
        ['ba', 1],
      ]),
      merges: ['b a', 'a a'],
    };
    expect(tokensOf(from, 'aaaba')).toEqual(['aa', 'a', 'ba']);
  });

  it('keeps a user-defined token of a caller as text, and parses it in a template', () => {
    const from = tiny([['<think>', 4]]);
    expect(tokensOf(from, 'a<think>')).toEqual([...'a<think>']);
    expect(tokensOf(from, 'a<think>', 'encodePrompt')).toEqual(['a', '<think>']);
  });

  it('parses a user-defined run of spaces everywhere', () => {
    expect(tokensOf(tiny([['    ', 4]]), 'a    b')).toEqual(['a', '    ', 'b']);
  });

  it('never makes a control token by merging or as a whole word', () => {
    const from = { ...tiny([['xy', 3]]), merges: ['x y'] };
    expect(tokensOf(from, 'xy')).toEqual(['x', 'y']);
    expect(tokensOf({ ...from, pre: 'llama-bpe' }, 'xy')).toEqual(['x', 'y']);
  });

  it('takes tokens that end a turn for control tokens whatever type the file gives them', () => {
    const from = tiny([['<|im_end|>', 1]]);
    expect(tokensOf(from, '<|im_end|>', 'encodePrompt')).toEqual(['<|im_end|>']);
    expect(createTokenizer(from).specials).toEqual(['<|im_end|>']);
    expect(tokenBytes(from)(from.tokens.length - 1)).toHaveLength(0);
    expect(tokenBytes(from)(from.tokens.length)).toBeNull();
  });

  it('takes the longer of two special tokens that overlap', () => {
    const from = tiny([
      ['<a', 3],
      ['a>>', 3],
    ]);
    expect(tokensOf(from, '<a>>', 'encodePrompt')).toEqual(['<', 'a>>']);
  });

  it('takes a word that is a token whole when the pre-tokenizer says so', () => {
    const from = tiny([['xyz', 1]]);
    expect(tokensOf(from, 'xyz')).toEqual(['x', 'y', 'z']);
    expect(tokensOf({ ...from, pre: 'llama-bpe' }, 'xyz')).toEqual(['xyz']);
  });

  it('shows byte tokens as bytes, user-defined tokens as their text and control tokens on request', () => {
    const tokens = ['<0x0A>', '<think>', '<s>', 'Ġa', 'é漢'];
    const from = { tokens, tokenTypes: [6, 4, 3, 1, 1] };
    const [hidden, shown] = [tokenBytes(from), tokenBytes(from, 'shown')];
    const text = (bytes: Uint8Array | null): string => Buffer.from(bytes!).toString('latin1');
    expect([0, 1, 2, 3].map((token) => text(hidden(token)))).toEqual(['\n', '<think>', '', ' a']);
    expect(text(shown(2))).toBe('<s>');
    // Not in the byte alphabet: its own UTF-8.
    expect(Buffer.from(hidden(4)!).toString()).toBe('é漢');
  });

  it.each(['<0x-1>', '<0xZZ>', '<0x1>', '0x0A', ''])('refuses the byte token %j', (text) => {
    expect(() => tokenBytes({ tokens: [text], tokenTypes: [6] })).toThrow(
      expect.objectContaining({ code: 'INVALID_MODEL_FILE' }),
    );
  });

  it.each<[string, Partial<TokenizerSource>, RegExp]>([
    ['UNSUPPORTED', { model: 'llama' }, /'llama'/],
    ['UNSUPPORTED', { pre: 'deepseek-v3' }, /'deepseek-v3'/],
    ['INVALID_MODEL_FILE', { tokens: [] }, /0 tokens/],
    ['INVALID_MODEL_FILE', { tokens: ['a', 'a'], tokenTypes: [] }, /repeat/],
    ['INVALID_MODEL_FILE', { tokenTypes: [1] }, /token types/],
    ['INVALID_MODEL_FILE', { merges: ['ab'] }, /merge 0/],
    ['INVALID_MODEL_FILE', { merges: ['a b', 'a '] }, /merge 1/],
    ['INVALID_MODEL_FILE', { bos: 258 }, /bos token is 258/],
    ['INVALID_MODEL_FILE', { eos: -1 }, /eos token is -1/],
    ['INVALID_MODEL_FILE', { eos: 0.5 }, /eos token is 0.5/],
  ])('refuses with %s: %o', (code, change, message) => {
    expect(() => createTokenizer({ ...tiny([]), ...change })).toThrow(
      expect.objectContaining({ code, message: expect.stringMatching(message) }),
    );
  });
});
