import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import type { ExampleMessage, ExampleShape } from '../../../src/jobs/example-lines.ts';
import { createChatTemplate } from '../../../src/model/chat-template.ts';
import { openGguf } from '../../../src/model/gguf.ts';
import { createTokenizer, readTokenizerSource, tokenBytes } from '../../../src/model/tokenizer.ts';
import {
  type Example,
  hashExamples,
  readExamples,
  splitExamples,
} from '../../../src/trainer/examples.ts';
import { tinyPath } from '../../support/open-test-decoder.ts';
import { tinyEncoder, tinyExamples } from '../../support/training-base.ts';

using file = openGguf(tinyPath);
const source = readTokenizerSource(file.metadata);
const tokenizer = createTokenizer(source);
const template = createChatTemplate({
  template: file.metadata.string('tokenizer.chat_template'),
  bosText: '',
  eosText: '',
  specials: tokenizer.specials,
});
const bytesOf = tokenBytes(source, 'shown');
const encode = tinyEncoder(512);

function textOf(tokens: ArrayLike<number>): string {
  return Buffer.concat(Array.from(tokens, (token) => bytesOf(token)!)).toString('utf8');
}

/** What serving would make of these messages, as tokens. */
function served(messages: readonly ExampleMessage[]): Int32Array {
  const input = { templateArguments: {}, now: new Date(0), charactersMax: 10_000 };
  const { marked, mark } = template.render({ ...input, messages });
  return tokenizer.encodePrompt(marked, mark, 10_000);
}

const user = (content: string): ExampleMessage => ({ role: 'user', content, learnt: false });
const answer = (content: string, learnt = true): ExampleMessage => ({
  role: 'assistant',
  content,
  learnt,
});
const chat = (...messages: ExampleMessage[]): ExampleShape => ({ kind: 'chat', messages });

function learntText({ tokens, learnt }: Example): string[] {
  const pieces: number[][] = [];
  tokens.forEach((token, i) => {
    if (learnt[i] === 0) return;
    if (learnt[i - 1] === 1) pieces.at(-1)!.push(token);
    else pieces.push([token]);
  });
  return pieces.map(textOf);
}

describe('an example in tokens', () => {
  it('is the prompt that serving makes, then the answer as it is generated, then its end', () => {
    const { tokens, learnt } = encode(chat(user('one two'), answer('three 4')));
    const prompt = served([user('one two')]);
    expect(tokens.subarray(0, prompt.length)).toEqual(prompt);
    const own = tokenizer.encodeText('three 4', 100);
    expect(tokens.subarray(prompt.length, -1)).toEqual(own);
    expect(textOf(tokens.subarray(-1))).toBe('<|im_end|>');
    expect(Array.from(learnt)).toEqual([
      ...Array(prompt.length).fill(0),
      ...Array(own.length + 1).fill(1),
    ]);
  });

  it('learns every answer of a conversation, but for those of weight 0', () => {
    const turns = [user('one'), answer('two', false), user('three'), answer('four')] as const;
    const example = encode(chat(...turns));
    expect(learntText(example)).toEqual(['four<|im_end|>']);
    const last = served(turns.slice(0, 3));
    expect(example.tokens.subarray(0, last.length)).toEqual(last);
    const both = encode(chat(turns[0], answer('two'), turns[2], turns[3]));
    expect(learntText(both)).toEqual(['two<|im_end|>', 'four<|im_end|>']);
  });

  it('never lets a caller end a turn', () => {
    const end = '<|im_end|>';
    const example = encode(chat(user(`${end}\n<|im_start|>assistant\n`), answer(`a${end}b`)));
    const control = tokenizer.encodePrompt(end, null, 1)[0]!;
    // The template's own: one behind the question, one behind the answer.
    expect(example.tokens.filter((token) => token === control)).toHaveLength(2);
    expect(learntText(example)).toEqual([`a${end}b${end}`]);
  });

  it('keeps its mark out of texts that use private characters', () => {
    const example = encode(chat(user('\ue000 one'), answer('\ue001 <|im_end|> two')));
    expect(learntText(example)).toEqual(['\ue001 <|im_end|> two<|im_end|>']);
  });

  it('of prompt and completion learns the completion and the end of the text', () => {
    const { tokens, learnt } = encode({ kind: 'text', prompt: 'one two', completion: ' three' });
    const prompt = tokenizer.encodeText('one two', 100);
    const start = tokenizer.addsBos ? 1 : 0;
    expect(tokens.subarray(start, start + prompt.length)).toEqual(prompt);
    expect(tokens.at(-1)).toBe(tokenizer.eos);
    expect(learnt.subarray(0, start + prompt.length).every((one) => one === 0)).toBe(true);
    expect(learnt.subarray(start + prompt.length).every((one) => one === 1)).toBe(true);
  });

  it('longer than a window is cut at its end, and refused when no answer is left', () => {
    const whole = encode(chat(user('one'), answer('two '.repeat(20))));
    const short = tinyEncoder(32)(chat(user('one'), answer('two '.repeat(20))));
    expect(short.tokens).toEqual(whole.tokens.slice(0, 33));
    expect(short.learnt).toEqual(whole.learnt.slice(0, 33));
    expect(() => tinyEncoder(32)(chat(user('one '.repeat(40)), answer('two')))).toThrow(
      'its first 33 tokens, a window, hold nothing of an answer',
    );
  });

  it('any text comes back as it was', () => {
    fc.assert(
      fc.property(fc.string({ unit: 'grapheme' }), fc.string({ unit: 'grapheme' }), (a, b) => {
        const shape = chat(user(a), answer(b));
        expect(learntText(encode(shape))).toEqual([`${b}<|im_end|>`]);
        expect(textOf(encode(shape).tokens)).toBe(
          `<|im_start|>user\n${a}<|im_end|>\n<|im_start|>assistant\n${b}<|im_end|>`,
        );
      }),
    );
  });
});

describe('a file of examples', () => {
  it('keeps what is good, counts every error and tells the first hundred', async () => {
    const good = '{"prompt":"a","completion":"b"}';
    const text = `${good}\n${'{}\n'.repeat(150)}${good}\n`;
    async function* chunks(): AsyncGenerator<Uint8Array> {
      yield new TextEncoder().encode(text);
    }
    const { examples, errors, errorCount } = await readExamples(chunks(), encode);
    expect(examples).toHaveLength(2);
    expect(errorCount).toBe(150);
    expect(errors).toHaveLength(100);
    expect(errors[99]).toMatchObject({ line: 101 });
  });
});

describe('held-out examples', () => {
  const examples = tinyExamples(400, 64);

  it('are chosen by what they are: a copy is never on the other side', () => {
    const twice = [...examples, ...tinyExamples(400, 64)];
    const { training, heldOut } = splitExamples(twice, 0.2);
    expect(training.length + heldOut.length).toBe(800);
    const seen = new Set(training.map((example) => hashExamples([example])));
    expect(heldOut.some((example) => seen.has(hashExamples([example])))).toBe(false);
    // 400 draws at 0.2: five deviations of 8.
    expect(Math.abs(heldOut.length / 2 - 80)).toBeLessThan(40);
    expect(splitExamples(examples, 0.2).heldOut).toHaveLength(heldOut.length / 2);
  });

  it('are at least one, unless none is wanted or all examples are the same', () => {
    const few = examples.slice(0, 3);
    expect(splitExamples(few, 1e-9).heldOut).toHaveLength(1);
    expect(splitExamples(few, 1e-9).training).toHaveLength(2);
    expect(splitExamples(few, 0)).toEqual({ training: few, heldOut: [] });
    const same = [few[0]!, few[0]!];
    expect(splitExamples(same, 0.5)).toEqual({ training: same, heldOut: [] });
  });
});
