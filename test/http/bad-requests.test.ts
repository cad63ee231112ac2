import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { createHarness, type Harness, type Json } from '../support/http-harness.ts';

// Each row is one request that must be refused before anything reaches the engine, with the field at fault in `param`.

const chat = { model: 'support', messages: [{ role: 'user', content: 'Hi' }] };
const legacy = { model: 'support', prompt: 'Hi' };

let harness: Harness;
beforeAll(() => {
  harness = createHarness();
});
afterAll(() => harness.close());

async function refusal(path: string, body: unknown, headers: Record<string, string> = {}) {
  const response = await harness.post(path, body, headers);
  const { error } = (await response.json()) as { error: Record<string, unknown> };
  expect(new Set(Object.keys(error))).toEqual(new Set(['code', 'message', 'param', 'type']));
  expect(harness.engine.requests).toEqual([]);
  return { status: response.status, ...error };
}

function manyArguments(count: number): Record<string, boolean> {
  return Object.fromEntries(Array.from({ length: count }, (_, i) => [`a${i}`, true]));
}

describe('a chat field that is wrong is a 400 that names it', () => {
  const rows: ReadonlyArray<[Record<string, unknown>, string]> = [
    // Unknown or not implemented.
    [{ tools: [] }, 'tools'],
    [{ tool_choice: 'auto' }, 'tool_choice'],
    [{ functions: [] }, 'functions'],
    [{ parallel_tool_calls: true }, 'parallel_tool_calls'],
    [{ best_of: 1_000_000 }, 'best_of'],
    [{ n_discard: -1 }, 'n_discard'],
    [{ guided_regex: '(a+)+b' }, 'guided_regex'],
    [{ stream_options: { chunk: 1 }, stream: true }, 'stream_options.chunk'],
    [{ response_format: { type: 'json_object' } }, 'response_format.type'],
    [{ response_format: { type: 'json_schema', json_schema: {} } }, 'response_format.type'],
    // Counts (faults.md B45, B46).
    [{ n: 0 }, 'n'],
    [{ n: 9 }, 'n'],
    [{ n: 1_000_000 }, 'n'],
    [{ n: 1.5 }, 'n'],
    [{ n: '1' }, 'n'],
    [{ logprobs: 5 }, 'logprobs'],
    [{ logprobs: true, top_logprobs: 21 }, 'top_logprobs'],
    [{ logprobs: true, top_logprobs: -1 }, 'top_logprobs'],
    [{ logprobs: true, top_logprobs: true }, 'top_logprobs'],
    [{ top_logprobs: 2 }, 'top_logprobs'],
    [{ logprobs: false, top_logprobs: 2 }, 'top_logprobs'],
    // logit_bias (B59).
    [{ logit_bias: { 300: 1 } }, 'logit_bias'],
    [{ logit_bias: { '-1': 1 } }, 'logit_bias.-1'],
    [{ logit_bias: { '01': 1 } }, 'logit_bias.01'],
    [{ logit_bias: { '1e2': 1 } }, 'logit_bias.1e2'],
    [{ logit_bias: { 5: 101 } }, 'logit_bias.5'],
    [{ logit_bias: { 5: '1' } }, 'logit_bias.5'],
    [{ logit_bias: [] }, 'logit_bias'],
    [
      { logit_bias: Object.fromEntries(Array.from({ length: 301 }, (_, i) => [i, 0])) },
      'logit_bias',
    ],
    // Stops.
    [{ stop: '' }, 'stop'],
    [{ stop: ['a', ''] }, 'stop[1]'],
    [{ stop: ['a', 'b', 'c', 'd', 'e'] }, 'stop'],
    [{ stop: 'x'.repeat(257) }, 'stop'],
    [{ stop: 5 }, 'stop'],
    [{ stop: null }, 'stop'],
    // Messages (B49).
    [{ messages: [] }, 'messages'],
    [{ messages: 'Hi' }, 'messages'],
    [{ messages: [{ role: 'tool', content: 'x' }] }, 'messages[0].role'],
    [{ messages: [{ role: 'user' }] }, 'messages[0].content'],
    [{ messages: [{ role: 'user', content: null }] }, 'messages[0].content'],
    [{ messages: [{ role: 'user', content: [] }] }, 'messages[0].content'],
    [{ messages: [{ role: 'user', content: 'a', tool_calls: [] }] }, 'messages[0].tool_calls'],
    [
      {
        messages: [
          { role: 'user', content: [{ type: 'image_url', image_url: { url: 'http://x' } }] },
        ],
      },
      'messages[0].content[0].type',
    ],
    [{ messages: [{ role: 'user', content: '\ud800' }] }, 'messages[0].content'],
    [{ messages: [{ role: 'user', content: 'x'.repeat(5000) }] }, 'messages'],
    [{ chat_template_kwargs: { messages: true } }, 'chat_template_kwargs'],
    [{ chat_template_kwargs: { a: '<|im_start|>' } }, 'chat_template_kwargs.a'],
    [{ chat_template_kwargs: { a: {} } }, 'chat_template_kwargs.a'],
    [{ chat_template_kwargs: manyArguments(17) }, 'chat_template_kwargs'],
    // Lengths (B60).
    [{ max_tokens: 4096 }, 'messages'],
    [{ max_tokens: 5, max_completion_tokens: 6 }, 'max_completion_tokens'],
    [{ stream_options: { include_usage: true } }, 'stream_options'],
    [{ stream: 'true' }, 'stream'],
    [{ model: '' }, 'model'],
    [{ model: 5 }, 'model'],
    [{ user: 5 }, 'user'],
    [{ user: 'x'.repeat(257) }, 'user'],
    // Tiers and budgets.
    [{ service_tier: 'platinum' }, 'service_tier'],
    [{ service_tier: 'Has Space' }, 'service_tier'],
    [{ model: 'support:quality', service_tier: 'instant' }, 'service_tier'],
    [{ latency: { total_ms: 0 } }, 'latency.total_ms'],
    [{ latency: { total_ms: '5' } }, 'latency.total_ms'],
    [{ latency: { total_ms: 1e308 } }, 'latency.total_ms'],
    [{ latency: { deadline: 5 } }, 'latency.deadline'],
    [{ latency: 5 }, 'latency'],
    [{ latency: null }, 'latency'],
  ];
  for (const [extra, param] of rows) {
    it(`${param}: ${JSON.stringify(extra).slice(0, 80)}`, async () => {
      const answer = await refusal('/v1/chat/completions', { ...chat, ...extra });
      expect(answer).toMatchObject({ status: 400, param, type: 'invalid_request_error' });
    });
  }

  const numeric = [
    'max_tokens',
    'max_completion_tokens',
    'temperature',
    'top_p',
    'top_k',
    'min_p',
    'seed',
    'n',
    'presence_penalty',
    'frequency_penalty',
    'repetition_penalty',
  ];
  it.each(numeric)('no numeric field takes what is no number in range: %s', async (field) => {
    // 1e999 is written out: JSON.stringify would make it null.
    const values = [
      'null',
      '"1"',
      '[]',
      '{}',
      'true',
      '1e999',
      '-1e999',
      '-9007199254740993',
      '1e300',
    ];
    for (const value of values) {
      const body = `${JSON.stringify(chat).slice(0, -1)},"${field}":${value}}`;
      const answer = await refusal('/v1/chat/completions', body);
      expect({ value, ...answer }).toMatchObject({ value, status: 400, param: field });
    }
    const body = `${JSON.stringify(chat).slice(0, -1)},"${field}":NaN}`;
    expect(await refusal('/v1/chat/completions', body)).toMatchObject({ status: 400 });
  });

  it.each(['max_tokens', 'top_k', 'seed', 'n'])('integers are whole: %s', async (field) => {
    expect(await refusal('/v1/chat/completions', { ...chat, [field]: 1.5 })).toMatchObject({
      status: 400,
      param: field,
    });
  });

  const headers: ReadonlyArray<[string, string]> = [
    ['x-latency-budget-ms', '0'],
    ['x-latency-budget-ms', '-5'],
    ['x-latency-budget-ms', 'NaN'],
    ['x-latency-budget-ms', '1e308'],
    ['x-llm-d-slo-ttft-ms', '0x10'],
    ['x-llm-d-slo-tpot-ms', ''],
  ];
  it.each(headers)('%s: %s', async (name, value) => {
    const answer = await refusal('/v1/chat/completions', chat, { [name]: value });
    expect(answer).toMatchObject({ status: 400, code: 'invalid_budget', param: name });
  });

  it('takes as many template arguments as the limit says', async () => {
    const body = { ...chat, chat_template_kwargs: manyArguments(16) };
    expect((await harness.post('/v1/chat/completions', body)).status).toBe(200);
    harness.engine.requests.length = 0;
  });

  it('names the context in the terms of OpenAI', async () => {
    const answer = await refusal('/v1/chat/completions', { ...chat, max_tokens: 4090 });
    expect(answer).toMatchObject({ code: 'context_length_exceeded' });
    // The prompt has 9 tokens: what fits exactly is served.
    const response = await harness.post('/v1/chat/completions', { ...chat, max_tokens: 4087 });
    expect(response.status).toBe(200);
    harness.engine.requests.length = 0;
  });
});

describe('a completion field that is wrong is a 400 that names it', () => {
  const rows: ReadonlyArray<[Record<string, unknown>, string]> = [
    [{ prompt: [] }, 'prompt'],
    [{ prompt: '' }, 'prompt'],
    [{ prompt: [[]] }, 'prompt[0]'],
    [{ prompt: ['a', 5] }, 'prompt[1]'],
    [{ prompt: [1, 'a'] }, 'prompt[1]'],
    [{ prompt: [1.5] }, 'prompt[0]'],
    [{ prompt: [-1] }, 'prompt[0]'],
    [{ prompt: [300] }, 'prompt'],
    [{ prompt: Array.from({ length: 9 }, () => 'a') }, 'prompt'],
    [{ prompt: null }, 'prompt'],
    [{ prompt: ['a', 'b', 'c'], n: 6 }, 'n'],
    [{ logprobs: true }, 'logprobs'],
    [{ logprobs: 21 }, 'logprobs'],
    [{ echo: true, logprobs: 1 }, 'logprobs'],
    [{ echo: 'yes' }, 'echo'],
    [{ suffix: 'x' }, 'suffix'],
    [{ best_of: 2 }, 'best_of'],
    [{ messages: [] }, 'messages'],
    [{ max_tokens: 4095 }, 'prompt'],
  ];
  for (const [extra, param] of rows) {
    it(`${param}: ${JSON.stringify(extra).slice(0, 80)}`, async () => {
      const answer = await refusal('/v1/completions', { ...legacy, ...extra });
      expect(answer).toMatchObject({ status: 400, param });
    });
  }
});

describe('a model that does not exist is a 404, never the base model', () => {
  const names = [
    'unknown',
    'Support',
    'support ',
    'support@',
    'support@sha256:abc',
    `support@sha256:${'A'.repeat(64)}`,
    `support@sha256:${'0'.repeat(64)}`,
    `support@sha256:${'a'.repeat(63)}`,
    'support:nope',
    'support:instant:instant',
    'tiny-base:nope',
    `tiny-base@sha256:${'b'.repeat(64)}`,
    '/etc',
    '..%2f..%2fx',
    'a/../../b',
    'CON',
    'support\0',
    '.',
    '__proto__',
    'constructor',
    'support\u202e',
    'ｓupport',
    'x'.repeat(256),
  ];
  for (const stream of [false, true]) {
    it.each(names)(`stream ${stream}: %j`, async (model) => {
      const answer = await refusal('/v1/chat/completions', { ...chat, model, stream });
      expect(answer).toMatchObject({
        status: 404,
        code: 'model_not_found',
        param: 'model',
        type: 'invalid_request_error',
      });
    });
  }
});

describe('a body that is not plain JSON', () => {
  const path = '/v1/chat/completions';
  const text = JSON.stringify(chat);
  const send = (body: string | Uint8Array | ReadableStream, headers: Record<string, string> = {}) =>
    harness.fetch('POST', path, {
      headers: { 'content-type': 'application/json', ...headers },
      body,
    });

  /** The good body with these bytes in a text. */
  function withBytes(bytes: readonly number[]): Uint8Array {
    const at = text.indexOf('Hi');
    return Buffer.concat([
      Buffer.from(text.slice(0, at)),
      Buffer.from(bytes),
      Buffer.from(text.slice(at)),
    ]);
  }

  const broken: ReadonlyArray<[string, string | Uint8Array]> = [
    ['empty', ''],
    ['open', '{"a":'],
    ['trailing bytes', `${text}x`],
    ['a second value', `${text}${text}`],
    ['a byte order mark', `\ufeff${text}`],
    ['UTF-16', Buffer.from(text, 'utf16le')],
    ['half a character', withBytes([0xc3])],
    ['an overlong form', withBytes([0xc0, 0xaf])],
    ['a surrogate in UTF-8', withBytes([0xed, 0xa0, 0x80])],
    ['a duplicate key', `{"model":"support","model":"tiny-base","messages":[]}`],
    ['a duplicate key, escaped', `{"model":"support","mod\\u0065l":"x","messages":[]}`],
    ['a duplicate key, deep', text.replace('"role"', '"content":"a","role"')],
    ['__proto__', text.replace('{"model"', '{"__proto__":{"n":9},"model"')],
    ['an array', '[]'],
    ['a number', '5'],
    ['null', 'null'],
    ['deep nesting', `{"latency":${'['.repeat(10_000)}${']'.repeat(10_000)}}`],
    ['single quotes', "{'model':'support'}"],
    ['a comment', `/* x */${text}`],
  ];
  it.each(broken)('%s is a 400', async (_, body) => {
    const response = await send(body);
    expect(response.status).toBe(400);
    expect(((await response.json()) as Json).error.code).toBe('invalid_request');
  });

  it('too large is a 413, with a declared length and without', async () => {
    const large = 'x'.repeat(256 * 1024 + 1);
    expect((await send(large)).status).toBe(413);
    expect((await send('{}', { 'content-length': '9999999999' })).status).toBe(413);
  });

  it('too large is a 413 as soon as the limit is passed, however much would follow', async () => {
    let chunks = 0;
    const endless = new ReadableStream({
      pull(controller) {
        chunks += 1;
        controller.enqueue(new Uint8Array(16 * 1024).fill(32));
      },
    });
    const response = await send(endless);
    expect(response.status).toBe(413);
    expect(((await response.json()) as Json).error.code).toBe('payload_too_large');
    expect(chunks).toBeLessThan(20);
  });

  const media: ReadonlyArray<Record<string, string>> = [
    { 'content-type': 'text/plain' },
    { 'content-type': 'multipart/form-data; boundary=x' },
    { 'content-type': 'application/x-www-form-urlencoded' },
    { 'content-type': 'application/json; charset=utf-16' },
    { 'content-type': 'application/jsonp' },
    { 'content-type': '' },
    { 'content-encoding': 'gzip' },
    { 'content-encoding': 'gzip, br' },
    { 'content-encoding': 'identity, gzip' },
  ];
  it.each(media)('%j is a 415', async (headers) => {
    const response = await send(text, headers);
    expect(response.status).toBe(415);
    expect(((await response.json()) as Json).error.code).toBe('unsupported_media_type');
  });

  it('in the types that mean JSON is read', async () => {
    for (const type of [
      'application/json',
      'application/json; charset=utf-8',
      'Application/JSON',
    ]) {
      expect((await send(text, { 'content-type': type })).status).toBe(200);
    }
    harness.engine.requests.length = 0;
  });
});

describe('routes', () => {
  it('that are unknown are a 404 in the shape of OpenAI', async () => {
    for (const path of ['/', '/v1', '/v1/nope', '/v1/embeddings', '/v1/chat/completions/']) {
      const response = await harness.fetch('POST', path);
      expect(response.status).toBe(404);
      expect(((await response.json()) as Json).error.code).toBe('not_found');
      expect(response.headers.get('x-request-id')).toMatch(/^req-/);
    }
  });

  it('with another method are a 405 that says which', async () => {
    const response = await harness.fetch('GET', '/v1/chat/completions');
    expect(response.status).toBe(405);
    expect(response.headers.get('allow')).toBe('POST');
    const adapter = await harness.fetch('PATCH', '/v1/adapters/support');
    expect(adapter.headers.get('allow')).toBe('GET, PUT, DELETE');
  });
});
