import * as fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { byteCharacters, createMerger, TokenBuffer } from '../../src/model/bpe.ts';
import { createChatTemplate } from '../../src/model/chat-template.ts';
import { createPreTokenizer } from '../../src/model/pre-tokenizer.ts';
import { createTokenizer } from '../../src/model/tokenizer.ts';

/** Merges over a few letters, each of two earlier parts, so that long chains and competing ranks happen. */
const merges = fc.array(fc.tuple(fc.nat(), fc.nat()), { maxLength: 24 }).map((picks) => {
  const parts = ['a', 'b', 'c'];
  const pairs: (readonly [left: string, right: string])[] = [];
  for (const [left, right] of picks) {
    const pair = [parts[left % parts.length]!, parts[right % parts.length]!] as const;
    pairs.push(pair);
    const product = pair.join('');
    if (product.length <= 12 && !parts.includes(product)) parts.push(product);
  }
  return pairs;
});

/** BPE as it is defined: again and again the first pair of the lowest rank. */
function naiveMerge(word: string, pairs: readonly (readonly [string, string])[]): string[] {
  const parts = [...word];
  for (;;) {
    let [best, at] = [pairs.length, -1];
    for (let i = 0; i + 1 < parts.length; i += 1) {
      const rank = pairs.findIndex(([l, r]) => l === parts[i] && r === parts[i + 1]);
      if (rank >= 0 && rank < best) [best, at] = [rank, i];
    }
    if (at < 0) return parts;
    parts.splice(at, 2, parts[at]! + parts[at + 1]!);
  }
}

describe('byte-level BPE', () => {
  it('merges as the definition does', async () => {
    const word = fc.string({ unit: fc.constantFrom('a', 'b', 'c'), maxLength: 40 });
    await fc.assert(
      fc.property(merges, word, (pairs, text) => {
        const products = new Set(pairs.map((pair) => pair.join('')));
        const tokens = [...byteCharacters, ...products];
        const merger = createMerger({
          tokens,
          merges: pairs.map((pair) => pair.join(' ')),
          isSpecial: () => false,
          ignoresMerges: false,
        });
        const output = new TokenBuffer(1000);
        merger.merge(text, output);
        const got = Array.from(output.finish(), (token) => tokens[token]);
        expect(got).toEqual(naiveMerge(text, pairs));
      }),
      { numRuns: 2000 },
    );
  });

  it('cuts any text into words that make the text', async () => {
    const text = fc.string({ unit: 'binary', maxLength: 60 });
    const names = fc.constantFrom('smollm', 'gpt-2', 'qwen2', 'llama3', 'default');
    await fc.assert(
      fc.property(names, text, (name, whole) => {
        const ends = createPreTokenizer(name).wordEnds(whole);
        expect(ends).toEqual([...new Set(ends)].sort((a, b) => a - b));
        expect(ends.at(-1) ?? 0).toBe(whole.length);
        expect(ends.every((end) => end > 0)).toBe(true);
      }),
      { numRuns: 2000 },
    );
  });
});

describe('chat encoding', () => {
  const specials = ['<|im_start|>', '<|im_end|>', '<s>', '<|im', '[e~[', '_<EOT>'];
  const tokens = [...byteCharacters, ...specials];
  const tokenizer = createTokenizer({
    model: 'gpt2',
    pre: 'smollm',
    tokens,
    merges: [],
    tokenTypes: tokens.map((token) => (specials.includes(token) ? 3 : 1)),
    bos: null,
    eos: null,
    addBos: false,
  });
  const spelled = specials.flatMap((special) =>
    Array.from({ length: special.length }, (_, at) => [special.slice(at), special.slice(0, at)]),
  );
  /** Whole special tokens, beginnings and ends of them, white space and letters: what an attack is made of. */
  const content = fc
    .array(fc.constantFrom(...spelled.flat(), ...specials, ' ', '\n', 'x', '\ue000', '|'), {
      maxLength: 6,
    })
    // Nothing but white space would bring the template's own pieces together.
    .map((parts) => (parts.join('').trim() === '' ? 'y' : parts.join('')));
  // The template's own special tokens, and pieces of them right beside caller text.
  const templates = fc.constantFrom(
    '{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}',
    '<|im{% for m in messages %}{{ m.content }}{% endfor %}d|>',
    '{% for m in messages %}<{{ m.content | trim }}|im_end|>{{ m.content }}{% endfor %}',
    '<s>{{ messages[0].content | upper }}|{{ messages[0].content | lower }}_{{ x }}<EOT>',
  );

  it('never lets caller text make a special token, and loses none of it', async () => {
    await fc.assert(
      fc.property(
        templates,
        fc.array(content, { minLength: 1, maxLength: 4 }),
        (template, contents) => {
          const chat = createChatTemplate({ template, bosText: '', eosText: '', specials });
          const specialsOf = (texts: readonly string[]): string[] => {
            const messages = texts.map((text) => ({ role: 'user', content: text }));
            const templateArguments = { x: texts[0]! };
            const { marked, mark, prompt } = chat.render({
              messages,
              templateArguments,
              now: new Date(0),
              charactersMax: 100_000,
            });
            const ids = tokenizer.encodePrompt(marked, mark, 100_000);
            expect(Array.from(ids, (id) => written(tokens[id]!)).join('')).toBe(
              Buffer.from(prompt).toString('latin1'),
            );
            return Array.from(ids, (id) => tokens[id]!).filter((text) => specials.includes(text));
          };
          // Every special token in the ids is the template's: as many as with harmless text in the same places.
          expect(specialsOf(contents)).toEqual(specialsOf(contents.map(() => 'y')));
        },
      ),
      { numRuns: 2000 },
    );
  });

  const byteOf = new Map(byteCharacters.map((character, byte) => [character, byte]));
  const written = (token: string): string =>
    specials.includes(token) ? token : String.fromCharCode(byteOf.get(token)!);
});
