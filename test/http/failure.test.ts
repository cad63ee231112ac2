import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { type ErrorCode, GatewayError } from '../../src/errors.ts';
import {
  createHarness,
  type Harness,
  type Json,
  nothingLeft,
  parseFrames,
  settleTasks,
} from '../support/http-harness.ts';
import { EventFeed, endEvent, pieceEvent, startEvent } from '../support/scripted-engine.ts';

const path = '/v1/chat/completions';
const ask = { model: 'support', messages: [{ role: 'user', content: 'Hi' }] };

let harness: Harness;
beforeEach(() => {
  harness = createHarness();
});
afterEach(() => harness.close());

function feed(): EventFeed {
  const events = new EventFeed();
  harness.engine.script = () => events;
  return events;
}

function streamed(signal?: AbortSignal): Promise<Response> {
  return harness.fetch('POST', path, {
    headers: { 'content-type': 'application/json' },
    body: JSON.stringify({ ...ask, stream: true }),
    ...(signal === undefined ? {} : { signal }),
  });
}

function lastLog(): Record<string, unknown> {
  return JSON.parse(harness.logs.at(-1)!) as Record<string, unknown>;
}

describe('a failure of the engine', () => {
  const cases: ReadonlyArray<[ErrorCode, number, string]> = [
    ['CONTENDED', 429, 'rate_limit_error'],
    ['NO_CAPACITY', 503, 'server_error'],
    ['CONTEXT_LENGTH_EXCEEDED', 400, 'invalid_request_error'],
    ['ENGINE_POISONED', 422, 'invalid_request_error'],
    ['ENGINE_FAILED', 500, 'server_error'],
    ['ADAPTER_CORRUPT', 500, 'server_error'],
  ];
  for (const [code, status, type] of cases) {
    for (const stream of [false, true]) {
      it(`before the first token is a plain ${status}: ${code}, stream ${stream}`, async () => {
        feed().push(
          new GatewayError(code, 'at /srv/secret/file 0x7ffdeadbeef', { retryAfterS: 2.2 }),
        );
        const response = await harness.post(path, { ...ask, stream });
        expect(response.status).toBe(status);
        const { error } = (await response.json()) as Json;
        expect(error).toEqual({
          message: expect.not.stringMatching(/\/|0x/),
          type,
          param: null,
          code: code.toLowerCase(),
        });
        expect(response.headers.get('retry-after')).toBe(
          status === 429 || status === 503 ? '3' : null,
        );
        expect(lastLog()).toMatchObject({ status, code: code.toLowerCase() });
      });
    }
  }

  it('that is none of ours is a 500 that says nothing, and the log says it all', async () => {
    feed().push(new Error('password is hunter2 at /etc/shadow'));
    const response = await harness.post(path, ask);
    expect(response.status).toBe(500);
    const text = await response.text();
    expect(JSON.parse(text).error).toEqual({
      message: 'internal error',
      type: 'server_error',
      param: null,
      code: 'internal',
    });
    expect(response.headers.get('x-request-id')).toBe(lastLog().requestId);
    expect(lastLog().cause).toContain('hunter2');
  });

  it('in mid-stream is an error frame and the end, without [DONE]', async () => {
    const events = feed();
    events.push(startEvent(), pieceEvent('some'), new GatewayError('ENGINE_FAILED', 'secret'));
    const response = await streamed();
    expect(response.status).toBe(200);
    const frames = parseFrames(await response.text());
    expect(frames[1].choices[0].delta.content).toBe('some');
    expect(frames.at(-1)).toEqual({
      error: {
        message: 'the engine failed on this request',
        type: 'server_error',
        param: null,
        code: 'engine_failed',
      },
    });
    expect(frames).not.toContain('[DONE]');
    expect(lastLog()).toMatchObject({ status: 200, code: 'engine_failed', stream: true });
    expect(harness.outcomes).toEqual([]);
  });

  it('of one of n sequences stops the others', async () => {
    let submitted = 0;
    harness.engine.script = async function* (request) {
      submitted += 1;
      const own = submitted;
      yield startEvent();
      if (own < 3) {
        await new Promise<void>(() => {}); // only the abort ends this one
      }
      yield pieceEvent('x', request);
      throw new GatewayError('ENGINE_FAILED', 'no');
    };
    const response = await harness.post(path, { ...ask, n: 3 });
    expect(response.status).toBe(500);
    await settleTasks();
  });

  it('that ends a sequence without an end event is not a complete answer', async () => {
    harness.engine.script = async function* () {
      yield startEvent();
    };
    const response = await streamed();
    const frames = parseFrames(await response.text());
    expect(frames.at(-1).error.code).toBe('engine_failed');
  });
});

describe('a client that goes away', () => {
  it('while its request is queued stops it (whole answer)', async () => {
    feed();
    const client = new AbortController();
    const answering = harness.fetch('POST', path, {
      headers: { 'content-type': 'application/json' },
      body: JSON.stringify(ask),
      signal: client.signal,
    });
    await settleTasks();
    expect(harness.leftovers()).toMatchObject({ live: 1, leases: 1, flying: 1 });
    client.abort();
    const response = await answering;
    expect(response.status).toBe(499);
    expect(lastLog()).toMatchObject({ status: 499, code: 'cancelled' });
  });

  it('while its request is queued stops it (stream)', async () => {
    feed();
    const client = new AbortController();
    const answering = streamed(client.signal);
    await settleTasks();
    client.abort();
    expect((await answering).status).toBe(499);
  });

  it('before its body was read submits nothing', async () => {
    const client = new AbortController();
    client.abort();
    const response = await streamed(client.signal);
    expect(response.status).toBe(499);
    expect(harness.engine.requests).toEqual([]);
  });

  it('in mid-stream stops it within one event', async () => {
    const events = feed();
    events.push(startEvent(), pieceEvent('a'));
    const response = await streamed();
    const reader = response.body!.getReader();
    await reader.read();
    await reader.read();
    await reader.cancel();
    await settleTasks();
    expect(harness.leftovers()).toEqual(nothingLeft);
    expect(lastLog()).toMatchObject({ status: 499, code: 'cancelled', stream: true });
    expect(harness.logs).toHaveLength(1);
  });

  it('by its signal, with a frame pending, gets an error frame and no [DONE]', async () => {
    feed().push(startEvent(), pieceEvent('a'));
    const client = new AbortController();
    const response = await streamed(client.signal);
    const reading = response.text();
    await settleTasks();
    client.abort();
    const frames = parseFrames(await reading);
    expect(frames.at(-1).error.code).toBe('cancelled');
  });

  it('a hundred times in a row, at any moment, leaves nothing behind', async () => {
    for (let i = 0; i < 100; i++) {
      const events = feed();
      if (i % 3 > 0) events.push(startEvent());
      if (i % 3 > 1) events.push(pieceEvent('a'));
      const client = new AbortController();
      const answering =
        i % 2 === 0
          ? streamed(client.signal)
          : harness.fetch('POST', path, {
              headers: { 'content-type': 'application/json' },
              body: JSON.stringify({ ...ask, n: 1 + (i % 4) }),
              signal: client.signal,
            });
      if (i % 5 > 0) await settleTasks();
      client.abort();
      const response = await answering;
      await response.text();
    }
    await settleTasks();
    expect(harness.leftovers()).toEqual(nothingLeft);
  });
});

describe('many answers at once', () => {
  it('are no leak in the eyes of Node', async () => {
    const warnings: Error[] = [];
    const note = (warning: Error): void => void warnings.push(warning);
    process.on('warning', note);
    const feeds: EventFeed[] = [];
    harness.engine.script = () => {
      feeds.push(new EventFeed());
      return feeds.at(-1)!;
    };
    const body = { model: 'support', prompt: ['a', 'b'], n: 8 };
    const answering = Array.from({ length: 15 }, () => harness.post('/v1/completions', body));
    await settleTasks();
    expect(feeds).toHaveLength(240);
    for (const events of feeds) events.push(startEvent(), pieceEvent('x'), endEvent(1));
    for (const response of await Promise.all(answering)) expect(response.status).toBe(200);
    process.off('warning', note);
    expect(warnings).toEqual([]);
  });
});

describe('a client that reads slowly', () => {
  it('holds the engine back: no event is taken that no frame was wanted for', async () => {
    let taken = 0;
    harness.engine.script = async function* (request) {
      yield startEvent();
      for (; taken < 1000; taken++) yield pieceEvent('x', request);
      yield endEvent(1000);
    };
    const response = await streamed();
    const reader = response.body!.getReader();
    await reader.read();
    await settleTasks();
    expect(taken).toBeLessThan(4);
    for (let i = 0; i < 10; i++) await reader.read();
    await settleTasks();
    expect(taken).toBeGreaterThan(8);
    expect(taken).toBeLessThan(16);
    await reader.cancel();
    await settleTasks();
  });

  it('teaches the router the pace of the engine and not its own', async () => {
    feed().push(startEvent(), pieceEvent('a'), pieceEvent('b'), endEvent(2));
    const response = await streamed();
    const reader = response.body!.getReader();
    await reader.read();
    harness.clock.advance(20_000);
    while (!(await reader.read()).done);
    await settleTasks();
    expect(harness.outcomes).toMatchObject([{ completionTokens: 2, ttftMs: 5, totalMs: 9 }]);
  });

  it('for too long is treated as gone, and its lease is given back', async () => {
    feed().push(startEvent(), pieceEvent('a'), pieceEvent('b'));
    const response = await streamed();
    const reader = response.body!.getReader();
    await reader.read();
    harness.clock.advance(29_999);
    await settleTasks();
    expect(harness.leftovers()).toMatchObject({ live: 1, leases: 1 });
    harness.clock.advance(1);
    await settleTasks();
    expect(harness.leftovers()).toEqual(nothingLeft);
    expect(lastLog()).toMatchObject({ status: 499, code: 'cancelled' });
    // It comes back: what it has is not the whole, and it is told so.
    let rest = '';
    for (let next = await reader.read(); !next.done; next = await reader.read()) {
      rest += Buffer.from(next.value).toString();
    }
    expect(parseFrames(rest)).toEqual([{ error: expect.objectContaining({ code: 'cancelled' }) }]);
    expect(harness.logs).toHaveLength(1);
  });
});

describe('pings', () => {
  it('keep a queued stream alive, and the head does not wait for the first token', async () => {
    const events = feed();
    const answering = streamed();
    await settleTasks();
    harness.clock.advance(5000);
    const response = await answering;
    expect(response.status).toBe(200);
    expect(response.headers.get('x-queue-ms')).toBeNull();
    const reader = response.body!.getReader();
    for (let i = 0; i < 3; i++) {
      const reading = reader.read();
      await settleTasks();
      harness.clock.advance(5000);
      expect(Buffer.from((await reading).value!).toString()).toBe(': ping\n\n');
    }
    events.push(startEvent(0, 20_000), pieceEvent('hi'), endEvent(2));
    let rest = '';
    for (let next = await reader.read(); !next.done; next = await reader.read()) {
      rest += Buffer.from(next.value).toString();
    }
    const frames = parseFrames(rest);
    expect(frames.at(-1)).toBe('[DONE]');
    expect(frames.at(-2).rankgate).toMatchObject({ queue_ms: 20_000, ttft_ms: 20_000 });
  });

  it('are not sent while tokens come', async () => {
    const events = feed();
    events.push(startEvent());
    const response = await streamed();
    const reading = response.text();
    for (let i = 0; i < 5; i++) {
      await settleTasks();
      harness.clock.advance(4000);
      events.push(pieceEvent('x'));
    }
    events.push(endEvent(5));
    expect(await reading).not.toContain('ping');
  });
});

describe('draining', () => {
  it('refuses new answers and lets running ones end', async () => {
    const events = feed();
    events.push(startEvent());
    const response = await streamed();
    harness.lifecycle.isDraining = true;
    const refused = await harness.post(path, ask);
    expect(refused.status).toBe(503);
    expect(refused.headers.get('retry-after')).toBe('5');
    events.push(pieceEvent('done'), endEvent(4));
    expect(await response.text()).toContain('[DONE]');
  });

  it('cuts what still runs after the grace, as no capacity and not as a client that left', async () => {
    feed().push(startEvent());
    const response = await streamed();
    const reading = response.text();
    const whole = harness.post(path, ask);
    await settleTasks();
    harness.lifecycle.isDraining = true;
    harness.lifecycle.cut();
    expect((parseFrames(await reading).at(-1) as Json).error.code).toBe('no_capacity');
    expect((await whole).status).toBe(503);
  });
});
