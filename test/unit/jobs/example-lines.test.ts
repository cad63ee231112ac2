import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import {
  type ExampleLine,
  exampleBytesMax,
  readExampleLines,
} from '../../../src/jobs/example-lines.ts';

async function* chunked(bytes: Uint8Array, sizes: readonly number[]): AsyncGenerator<Uint8Array> {
  let at = 0;
  for (let i = 0; at < bytes.length; i++) {
    const size = sizes[i % sizes.length] ?? bytes.length;
    yield bytes.subarray(at, at + size);
    at += size;
  }
}

async function read(
  text: string | Uint8Array,
  sizes: readonly number[] = [],
): Promise<ExampleLine[]> {
  const bytes = typeof text === 'string' ? new TextEncoder().encode(text) : text;
  const lines: ExampleLine[] = [];
  for await (const line of readExampleLines(chunked(bytes, sizes))) lines.push(line);
  return lines;
}

const chat =
  '{"messages":[{"role":"user","content":"Grüße 世界"},{"role":"assistant","content":"a"}]}';
const pair = '{"prompt":"one","completion":" two"}';

describe('the lines of a training file', () => {
  it('are numbered from 1, and empty ones passed over', async () => {
    const lines = await read(`${chat}\r\n\n  \n${pair}`);
    expect(lines).toEqual([
      {
        line: 1,
        shape: {
          kind: 'chat',
          messages: [
            { role: 'user', content: 'Grüße 世界', learnt: false },
            { role: 'assistant', content: 'a', learnt: true },
          ],
        },
      },
      { line: 4, shape: { kind: 'text', prompt: 'one', completion: ' two' } },
    ]);
  });

  it('may have what the answer should be beside the messages', async () => {
    const asked = '{"role":"user","content":"one"}';
    const beside = `{"messages":[${asked}],"reference_answer":"two"}`;
    const among = `{"messages":[${asked},{"role":"assistant","content":"two"}]}`;
    const [one, other] = await read(`${beside}\n${among}`);
    expect(one).toEqual({ ...other, line: 1 });
  });

  it('are the same however the bytes arrive', async () => {
    const text = `${chat}\n{broken\n${pair}\n\n${chat}`;
    const whole = await read(text);
    await fc.assert(
      fc.asyncProperty(
        fc.array(fc.integer({ min: 1, max: 40 }), { minLength: 1 }),
        async (sizes) => {
          expect(await read(text, sizes)).toEqual(whole);
        },
      ),
    );
  });

  it.each([
    ['nonsense', 'not JSON'],
    ['[]', 'Invalid input'],
    ['{"messages":[]}', 'messages: '],
    ['{"messages":[{"role":"tool","content":"x"}]}', 'messages.0.role: '],
    ['{"messages":[{"role":"user","content":"x","name":"y"}]}', 'messages.0: '],
    ['{"messages":[{"role":"user","content":"x"}]}', 'the last message is no assistant'],
    ['{"messages":[{"role":"user","content":"x"}],"reference_answer":""}', 'reference_answer: '],
    [
      '{"messages":[{"role":"assistant","content":"x"}],"reference_answer":"y"}',
      'a reference_answer behind no user',
    ],
    ['{"messages":[{"role":"assistant","content":"x","weight":0}]}', 'no message is learnt'],
    ['{"messages":[{"role":"assistant","content":"x","weight":0.5}]}', 'messages.0.weight: '],
    [
      '{"messages":[{"role":"user","content":"x","weight":0},{"role":"assistant","content":"y"}]}',
      'a user with a weight',
    ],
    ['{"messages":[{"role":"assistant","content":"\\ud800"}]}', 'messages.0.content: holds half'],
    ['{"prompt":"x","completion":""}', 'completion: '],
    ['{"prompt":"x","completion":"y","more":1}', 'Unrecognized key'],
  ])('%s is refused', async (line, start) => {
    const [first, second] = await read(`${line}\n${pair}`);
    expect(first).toMatchObject({ line: 1, error: expect.stringMatching(`^${start}`) });
    expect(second).toMatchObject({ line: 2, shape: { kind: 'text' } }); // one line is nobody else's failure
  });

  it('that are too long or no UTF-8 are refused, and the next one is read', async () => {
    const long = new TextEncoder().encode(`"${'x'.repeat(exampleBytesMax)}"\n`);
    const bad = Uint8Array.of(0x22, 0xff, 0x22, 10);
    const bytes = Buffer.concat([long, bad, new TextEncoder().encode(pair)]);
    const lines = await read(bytes, [65_536]);
    expect(lines.map((line) => ('error' in line ? line.error : line.shape.kind))).toEqual([
      `more than ${exampleBytesMax} bytes`,
      'not UTF-8',
      'text',
    ]);
  });
});
