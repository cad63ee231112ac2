import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { GatewayError } from '../../src/errors.ts';
import { useOf } from '../support/adapter-use.ts';
import {
  createHarness,
  generationA,
  type Harness,
  type Json,
  parseFrames,
} from '../support/http-harness.ts';
import { endEvent, pieceEvent, startEvent } from '../support/scripted-engine.ts';

const path = '/v1/chat/completions';
const ask = { model: 'support', seed: 7, messages: [{ role: 'user', content: 'Hello there' }] };
const promptTokens = 'user: Hello there\n'.length;
const answerText = `a1a1 at 16 seed 7 prompt ${promptTokens}`;

let harness: Harness;
beforeEach(() => {
  harness = createHarness();
});
afterEach(() => harness.close());

async function frames(body: object): Promise<Json[]> {
  const response = await harness.post(path, { ...ask, stream: true, ...body });
  expect(response.status).toBe(200);
  return parseFrames(await response.text());
}

describe('a whole chat answer', () => {
  it('has the shape of OpenAI, the asked model and the decision', async () => {
    const response = await harness.post(path, ask);
    expect(response.status).toBe(200);
    expect(response.headers.get('content-type')).toContain('application/json');
    expect(await response.json()).toEqual({
      id: 'chatcmpl-id2',
      object: 'chat.completion',
      created: expect.any(Number),
      model: 'support',
      system_fingerprint: 'fp_bbbbbbbbbbbb',
      choices: [
        {
          index: 0,
          message: { role: 'assistant', content: answerText, refusal: null },
          logprobs: null,
          finish_reason: 'stop',
        },
      ],
      usage: {
        prompt_tokens: promptTokens,
        completion_tokens: answerText.length,
        total_tokens: promptTokens + answerText.length,
        prompt_tokens_details: { cached_tokens: 16 },
      },
      rankgate: {
        adapter: 'support',
        generation: generationA,
        adapters: [{ id: 'support', generation: generationA, rank: 16, rank_max: 16, weight: 1 }],
        rank: 16,
        rank_max: 16,
        rank_mean: 16,
        reason: 'full',
        predicted_ms: 120.5,
        queue_ms: 3,
        ttft_ms: 0,
        total_ms: 0,
        cached_tokens: 16,
      },
    });
  });

  it('tells its decision in headers', async () => {
    const response = await harness.post(path, { ...ask, latency: { total_ms: 200 } });
    const header = (name: string) => response.headers.get(name);
    expect(header('x-request-id')).toBe('req-id1');
    expect(header('x-adapter-id')).toBe('support');
    expect(header('x-adapter-generation')).toBe(generationA);
    expect(header('x-adapter-rank')).toBe('4/16');
    expect(header('x-rank-reason')).toBe('reduced');
    expect(header('x-predicted-ms')).toBe('120.5');
    expect(header('x-queue-ms')).toBe('3');
    expect(harness.engine.requests[0]!.adapter).toEqual(useOf(generationA, 4));
  });

  it('keeps a plain request id of the caller and replaces any other', async () => {
    const kept = await harness.post(path, ask, { 'x-request-id': 'trace-1.A_b' });
    expect(kept.headers.get('x-request-id')).toBe('trace-1.A_b');
    const replaced = await harness.post(path, ask, { 'x-request-id': 'a b"{}' });
    expect(replaced.headers.get('x-request-id')).toMatch(/^req-id\d+$/);
  });

  it('answers from the base without an adapter header', async () => {
    const response = await harness.post(path, { ...ask, model: 'tiny-base' });
    expect(response.headers.get('x-adapter-id')).toBeNull();
    expect(response.headers.get('x-rank-reason')).toBe('base');
    expect(harness.engine.requests[0]!.adapter).toBeNull();
    const body = (await response.json()) as Json;
    expect(body.model).toBe('tiny-base');
    expect(body.choices[0].message.content).toMatch(/^base /);
  });

  it('serves a fixed generation under its full name, after the name has moved on', async () => {
    const { registry } = harness;
    registry.swap(
      'support',
      harness.importer.next instanceof GatewayError
        ? generationA
        : harness.importer.next.generation,
      null,
    );
    const model = `support@${generationA}`;
    const response = await harness.post(path, { ...ask, model });
    expect(response.headers.get('x-adapter-generation')).toBe(generationA);
    expect(((await response.json()) as Json).model).toBe(model);
  });

  it('takes a tier from the suffix or from service_tier', async () => {
    for (const body of [{ model: 'support:instant' }, { service_tier: 'instant' }]) {
      await harness.post(path, { ...ask, ...body });
      expect(harness.routed.at(-1)!.budget).toMatchObject({ totalMs: 300 });
    }
    await harness.post(path, { ...ask, service_tier: 'auto' });
    expect(harness.routed.at(-1)!.budget.totalMs).toBeNull();
  });

  it('passes every sampling field on', async () => {
    await harness.post(path, {
      ...ask,
      temperature: 0.5,
      top_p: 0.9,
      top_k: 40,
      min_p: 0.05,
      presence_penalty: 1,
      frequency_penalty: -1,
      repetition_penalty: 1.1,
      logit_bias: { '5': -100, '299': 3 },
      stop: ['END', '\n'],
      max_completion_tokens: 9,
    });
    const request = harness.engine.requests[0]!;
    expect(request.sampling).toEqual({
      temperature: 0.5,
      topP: 0.9,
      topK: 40,
      minP: 0.05,
      seed: 7,
      presencePenalty: 1,
      frequencyPenalty: -1,
      repetitionPenalty: 1.1,
      logitBias: [
        [5, -100],
        [299, 3],
      ],
    });
    expect(request.stop).toEqual(['END', '\n']);
    expect(request.tokensMax).toBe(9);
    expect(request.tenant).toBe('local');
  });

  it('draws a seed when there is none, and gives the context when no length is asked', async () => {
    const { seed: _, ...unseeded } = ask;
    await harness.post(path, unseeded);
    expect(harness.engine.requests[0]!.sampling.seed).toBe(77);
    expect(harness.engine.requests[0]!.tokensMax).toBe(512);
    await harness.post(path, { ...ask, messages: [{ role: 'user', content: 'x'.repeat(4000) }] });
    const request = harness.engine.requests[1]!;
    expect(request.tokensMax).toBe(4096 - request.tokens.length);
  });

  it('makes n choices with seeds in a row', async () => {
    const response = await harness.post(path, { ...ask, n: 3, seed: 2 ** 32 - 1 });
    const body = (await response.json()) as Json;
    expect(harness.engine.requests.map((request) => request.sampling.seed)).toEqual([
      2 ** 32 - 1,
      0,
      1,
    ]);
    expect(new Set(harness.engine.requests.map((request) => request.id)).size).toBe(3);
    const texts = body.choices.map((choice: Json) => choice.message.content as string);
    expect(texts[1]).toContain('seed 0 ');
    expect(body.choices.map((choice: Json) => choice.index)).toEqual([0, 1, 2]);
    expect(body.usage.prompt_tokens).toBe(promptTokens);
    expect(body.usage.completion_tokens).toBe(texts.join('').length);
    expect(body.usage.prompt_tokens_details.cached_tokens).toBe(16);
  });

  it('concatenates text parts', async () => {
    const content = [
      { type: 'text', text: 'one ' },
      { type: 'text', text: 'two' },
    ];
    await harness.post(path, {
      ...ask,
      messages: [{ role: 'user', content }],
      chat_template_kwargs: { enable_thinking: false },
    });
    expect(harness.text.chats[0]).toEqual({
      messages: [{ role: 'user', content: 'one two' }],
      options: { templateArguments: { enable_thinking: false } },
    });
  });

  it('reports log-probabilities without top_logprobs, and with', async () => {
    harness.engine.script = async function* (request) {
      yield startEvent();
      yield pieceEvent('aé', request);
      yield endEvent(2);
    };
    const logprobsOf = async (extra: object): Promise<Json> => {
      const response = await harness.post(path, { ...ask, logprobs: true, ...extra });
      return ((await response.json()) as Json).choices[0].logprobs;
    };
    expect(await logprobsOf({})).toEqual({
      content: [
        { token: 'a', logprob: -0.5, bytes: [97], top_logprobs: [] },
        { token: 'é', logprob: -0.5, bytes: [195, 169], top_logprobs: [] },
      ],
      refusal: null,
    });
    const top = await logprobsOf({ top_logprobs: 2 });
    expect(top.content[0].top_logprobs).toEqual([
      { token: 'a', logprob: -0.5, bytes: [97] },
      { token: '?', logprob: -1.5, bytes: [63] },
    ]);
  });

  it('settles what the router learns from, as the engine measured it', async () => {
    harness.engine.script = async function* (request) {
      yield startEvent();
      yield pieceEvent('ab', request);
      yield endEvent(2, 'length', { ttftMs: 100, totalMs: 200 });
    };
    await harness.post(path, ask);
    expect(harness.outcomes).toEqual([
      {
        adapter: 'support',
        prediction: expect.objectContaining({ totalMs: 120.5 }),
        tokensMax: 512,
        completionTokens: 2,
        load: expect.objectContaining({ decodeRows: 0, waiting: 0 }),
        ttftMs: 100,
        totalMs: 200,
      },
    ]);
  });

  it('counts sequences in flight as load for the next plan, and siblings as waiting', async () => {
    await harness.post(path, { ...ask, n: 2 });
    expect(harness.routed[0]!.load).toEqual({
      decodeRows: 0,
      decodeRanks: 0,
      waiting: 1,
      waitingPromptTokens: promptTokens,
      kvCells: 0,
    });
  });
});

describe('a streamed chat answer', () => {
  it('opens with the role, ends with the reason, and says [DONE] last', async () => {
    const all = await frames({});
    expect(all.at(-1)).toBe('[DONE]');
    const chunks = all.slice(0, -1);
    for (const chunk of chunks) {
      expect(chunk).toMatchObject({
        id: 'chatcmpl-id2',
        object: 'chat.completion.chunk',
        created: chunks[0]!.created,
        model: 'support',
      });
      expect(chunk).not.toHaveProperty('usage');
    }
    const choices = chunks.map((chunk) => chunk.choices[0]);
    expect(choices[0]).toEqual({
      index: 0,
      delta: { role: 'assistant', content: '' },
      logprobs: null,
      finish_reason: null,
    });
    expect(choices.at(-1)).toEqual({ index: 0, delta: {}, logprobs: null, finish_reason: 'stop' });
    const text = choices.map((choice) => choice.delta.content ?? '').join('');
    expect(text).toBe(answerText);
    expect(choices.slice(1, -1).every((choice) => choice.delta.content !== '')).toBe(true);
    const decided = chunks.filter((chunk) => 'rankgate' in chunk);
    expect(decided).toEqual([chunks.at(-1)]);
    expect(chunks.at(-1)!.rankgate).toMatchObject({ rank: 16, rank_max: 16, queue_ms: 3 });
  });

  it('has the same text as the whole answer', async () => {
    const whole = (await (await harness.post(path, ask)).json()) as Json;
    const all = await frames({});
    const text = all.map((chunk) => chunk.choices?.[0]?.delta?.content ?? '').join('');
    expect(text).toBe(whole.choices[0].message.content);
  });

  it('ends with a usage chunk when asked, which then carries the decision', async () => {
    const all = await frames({ stream_options: { include_usage: true } });
    const chunks = all.slice(0, -1);
    expect(chunks.at(-1)).toMatchObject({
      choices: [],
      usage: {
        prompt_tokens: promptTokens,
        completion_tokens: answerText.length,
        total_tokens: promptTokens + answerText.length,
        prompt_tokens_details: { cached_tokens: 16 },
      },
      rankgate: { rank: 16, cached_tokens: 16 },
    });
    for (const chunk of chunks.slice(0, -1)) {
      expect(chunk.usage).toBeNull();
      expect(chunk).not.toHaveProperty('rankgate');
    }
  });

  it('tells what it knows in headers before the first token', async () => {
    const response = await harness.post(path, { ...ask, stream: true });
    expect(response.headers.get('content-type')).toBe('text/event-stream; charset=utf-8');
    expect(response.headers.get('x-adapter-rank')).toBe('16/16');
    expect(response.headers.get('x-queue-ms')).toBe('3');
    expect(response.headers.get('cache-control')).toBe('no-store');
    await response.text();
  });

  it('streams n choices, each opened and ended once', async () => {
    const all = (await frames({ n: 3 })).slice(0, -1);
    const choices = all.flatMap((chunk) => chunk.choices);
    for (const index of [0, 1, 2]) {
      const own = choices.filter((choice) => choice.index === index);
      expect(own[0].delta.role).toBe('assistant');
      expect(own.filter((choice) => choice.delta.role !== undefined)).toHaveLength(1);
      expect(own.filter((choice) => choice.finish_reason !== null)).toEqual([own.at(-1)]);
    }
    expect(all.filter((chunk) => 'rankgate' in chunk)).toEqual([all.at(-1)]);
  });

  it('sends log-probabilities with the text they belong to', async () => {
    const all = await frames({ logprobs: true, top_logprobs: 1 });
    for (const chunk of all.slice(1, -2)) {
      const { delta, logprobs } = chunk.choices[0];
      expect(logprobs.content.map((token: Json) => token.token).join('')).toBe(delta.content);
    }
  });

  it('holds nothing back for pieces without text, and sends no chunk for them', async () => {
    harness.engine.script = async function* (request) {
      yield startEvent();
      yield { ...pieceEvent('?', request), text: '' } as never;
      yield pieceEvent('ok', request);
      yield endEvent(3);
    };
    const all = await frames({});
    expect(all.map((chunk) => chunk.choices?.[0]?.delta)).toEqual([
      { role: 'assistant', content: '' },
      { content: 'ok' },
      {},
      undefined,
    ]);
  });
});
