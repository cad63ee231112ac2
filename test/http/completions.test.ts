import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { createHarness, type Harness, type Json, parseFrames } from '../support/http-harness.ts';
import { endEvent, pieceEvent, startEvent } from '../support/scripted-engine.ts';

const path = '/v1/completions';
const ask = { model: 'support', seed: 7, prompt: 'Once' };
const cut = 'a1a1 at 16 seed '; // the first 16 tokens: the default length of this call

let harness: Harness;
beforeEach(() => {
  harness = createHarness();
});
afterEach(() => harness.close());

async function whole(extra: object): Promise<Json> {
  const response = await harness.post(path, { ...ask, ...extra });
  expect(response.status).toBe(200);
  return response.json();
}

async function frames(extra: object): Promise<Json[]> {
  const response = await harness.post(path, { ...ask, stream: true, ...extra });
  expect(response.status).toBe(200);
  return parseFrames(await response.text());
}

describe('a whole completion', () => {
  it('has the legacy shape', async () => {
    expect(await whole({})).toMatchObject({
      id: 'cmpl-id2',
      object: 'text_completion',
      model: 'support',
      choices: [{ index: 0, text: cut, logprobs: null, finish_reason: 'length' }],
      usage: { prompt_tokens: 4, completion_tokens: 16, total_tokens: 20 },
    });
  });

  it('takes token ids as they are', async () => {
    await whole({ prompt: [1, 2, 299] });
    expect([...harness.engine.requests[0]!.tokens]).toEqual([1, 2, 299]);
  });

  it('takes several prompts with n samples each, in order', async () => {
    const body = await whole({ prompt: ['a', 'bb'], n: 2, max_tokens: 100 });
    expect(body.choices.map((choice: Json) => choice.index)).toEqual([0, 1, 2, 3]);
    expect(body.choices.map((choice: Json) => choice.text)).toEqual([
      'a1a1 at 16 seed 7 prompt 1',
      'a1a1 at 16 seed 8 prompt 1',
      'a1a1 at 16 seed 7 prompt 2',
      'a1a1 at 16 seed 8 prompt 2',
    ]);
    expect(body.usage.prompt_tokens).toBe(3);
    await whole({ prompt: [[1], [2, 3]] });
    expect(harness.engine.requests.slice(4).map((request) => [...request.tokens])).toEqual([
      [1],
      [2, 3],
    ]);
  });

  it('repeats the prompt when asked, from text or token ids', async () => {
    expect((await whole({ echo: true })).choices[0].text).toBe(`Once${cut}`);
    const body = await whole({
      echo: true,
      prompt: [
        [79, 110],
        [99, 101],
      ],
    });
    expect(body.choices.map((choice: Json) => choice.text)).toEqual([`On${cut}`, `ce${cut}`]);
  });

  it('has log-probabilities in the legacy shape, with offsets in code points', async () => {
    harness.engine.script = async function* (request) {
      yield startEvent();
      yield pieceEvent('a😀', request);
      const [half] = (pieceEvent('é', request) as Json).tokens;
      const halves = [half.bytes.subarray(0, 1), half.bytes.subarray(1)];
      const tokens = halves.map((bytes) => ({ ...half, bytes, top: [] }));
      yield { kind: 'piece', text: 'é', tokens };
      yield pieceEvent('b', request);
      yield endEvent(5);
    };
    const body = await whole({ logprobs: 2 });
    expect(body.choices[0]).toMatchObject({ text: 'a😀éb' });
    expect(body.choices[0].logprobs).toEqual({
      tokens: ['a', '😀', 'bytes:\\xc3', 'bytes:\\xa9', 'b'],
      token_logprobs: [-0.5, -0.5, -0.5, -0.5, -0.5],
      top_logprobs: [
        { a: -0.5, '?': -1.5 },
        { '😀': -0.5, '?': -1.5 },
        { 'bytes:\\xc3': -0.5 },
        { 'bytes:\\xa9': -0.5 },
        { b: -0.5, '?': -1.5 },
      ],
      text_offset: [0, 1, 2, 2, 3],
    });
  });
});

describe('a streamed completion', () => {
  it('has text in every chunk and the reason in the last', async () => {
    const all = await frames({});
    expect(all.at(-1)).toBe('[DONE]');
    const choices = all.slice(0, -1).map((chunk) => {
      expect(chunk).toMatchObject({ id: 'cmpl-id2', object: 'text_completion', model: 'support' });
      return chunk.choices[0];
    });
    expect(choices.map((choice) => choice.text).join('')).toBe(cut);
    expect(choices.map((choice) => choice.finish_reason)).toEqual([
      ...choices.slice(1).map(() => null),
      'length',
    ]);
  });

  it('repeats the prompt first', async () => {
    const all = await frames({ echo: true, prompt: ['x', 'yy'], n: 2 });
    const choices = all.slice(0, -1).flatMap((chunk) => chunk.choices);
    for (const [index, prompt] of ['x', 'x', 'yy', 'yy'].entries()) {
      const own = choices.filter((choice) => choice.index === index);
      expect(own[0].text).toBe(prompt);
      expect(own.map((choice) => choice.text).join('')).toBe(`${prompt}${cut}`);
    }
  });

  it('goes on with the offsets of the log-probabilities from chunk to chunk', async () => {
    const all = await frames({ logprobs: 0 });
    const parts = all.slice(0, -2).map((chunk) => chunk.choices[0].logprobs);
    expect(parts.length).toBeGreaterThan(2);
    const offsets = parts.flatMap((part) => part.text_offset);
    expect(offsets).toEqual(Array.from({ length: 16 }, (_, i) => i));
  });
});
