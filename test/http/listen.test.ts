import { once } from 'node:events';
import { connect, type Socket } from 'node:net';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { type Listening, listen } from '../../src/server/listen.ts';
import { createHarness, type Harness, parseFrames, settleTasks } from '../support/http-harness.ts';
import { EventFeed, endEvent, pieceEvent, startEvent } from '../support/scripted-engine.ts';

// What only a real socket shows: how @hono/node-server surfaces a disconnect, backpressure through the kernel, Node's own
// limits, and the drain.

const path = '/v1/chat/completions';
const ask = { model: 'support', messages: [{ role: 'user', content: 'Hi' }] };

let harness: Harness;
let listening: Listening;
/** The signal of every request that came in. */
let signals: AbortSignal[];

beforeEach(async () => {
  harness = createHarness();
  signals = [];
  const { hono } = harness.app;
  const spied = Object.assign(Object.create(hono) as typeof hono, {
    fetch(request: Request, env: never) {
      signals.push(request.signal);
      return hono.fetch(request, env);
    },
  });
  listening = await listen({ ...harness.app, hono: spied }, harness.lifecycle, {
    host: '127.0.0.1',
    port: 0,
    connectionsMax: 64,
    keepAliveMs: 600_000, // no test waits for it: what closes a connection is the drain
    requestMsMax: 60_000,
  });
});
afterEach(async () => {
  await listening.close(0);
  harness.close();
});

function feed(): EventFeed {
  const events = new EventFeed();
  harness.engine.script = () => events;
  return events;
}

function post(body: object, signal?: AbortSignal): Promise<Response> {
  return fetch(`http://127.0.0.1:${listening.port}${path}`, {
    method: 'POST',
    headers: { 'content-type': 'application/json' },
    body: JSON.stringify(body),
    ...(signal === undefined ? {} : { signal }),
  });
}

/** Turns the loop until `holds`; a condition that never comes is the test's timeout. */
async function until(holds: () => boolean): Promise<void> {
  while (!holds()) await settleTasks();
}

async function open(): Promise<Socket> {
  const socket = connect(listening.port, '127.0.0.1');
  await once(socket, 'connect');
  return socket;
}

async function raw(request: string): Promise<string> {
  const socket = await open();
  socket.end(request);
  let answer = '';
  for await (const chunk of socket) answer += String(chunk);
  return answer;
}

function httpRequest(body: string): string {
  return [
    `POST ${path} HTTP/1.1`,
    'Host: 127.0.0.1',
    'Content-Type: application/json',
    `Content-Length: ${Buffer.byteLength(body)}`,
    '',
    body,
  ].join('\r\n');
}

describe('success', () => {
  it('fires no abort, whole and streamed', async () => {
    const whole = await post(ask);
    expect(whole.status).toBe(200);
    await whole.json();
    const stream = await post({ ...ask, stream: true });
    expect(parseFrames(await stream.text()).at(-1)).toBe('[DONE]');
    await until(() => harness.logs.length === 2);
    await settleTasks();
    expect(signals.map((signal) => signal.aborted)).toEqual([false, false]);
    expect(harness.logs.map((line) => JSON.parse(line).status)).toEqual([200, 200]);
  });

  it('sends each token when it is there, the head before the first', async () => {
    const events = feed();
    const answering = post({ ...ask, stream: true });
    events.push(startEvent());
    const response = await answering; // head only: no token exists yet
    const reader = response.body!.getReader();
    const texts: string[] = [];
    for (const word of ['one', 'two']) {
      events.push(pieceEvent(word));
      while (!texts.join('').includes(word)) {
        const next = await reader.read();
        texts.push(Buffer.from(next.value!).toString());
      }
    }
    events.push(endEvent(6));
    let rest = '';
    for (let next = await reader.read(); !next.done; next = await reader.read()) {
      rest += Buffer.from(next.value).toString();
    }
    expect(rest).toContain('[DONE]');
  });
});

describe('a socket that is dropped', () => {
  it('in mid-stream aborts the request', async () => {
    const events = feed();
    events.push(startEvent(), pieceEvent('a'));
    const client = new AbortController();
    const response = await post({ ...ask, stream: true }, client.signal);
    await response.body!.getReader().read();
    client.abort();
    await until(() => harness.engine.live === 0 && harness.logs.length === 1);
    expect(signals[0]!.aborted).toBe(true);
    expect(JSON.parse(harness.logs[0]!)).toMatchObject({ status: 499, code: 'cancelled' });
  });

  for (const stream of [false, true]) {
    it(`while queued aborts the request, stream ${stream}`, async () => {
      feed();
      const client = new AbortController();
      const answering = post({ ...ask, stream }, client.signal);
      await until(() => harness.engine.live === 1);
      client.abort();
      await expect(answering).rejects.toThrow();
      await until(() => harness.logs.length === 1);
      expect(JSON.parse(harness.logs[0]!)).toMatchObject({ status: 499 });
    });
  }

  it.each([false, true])('aborts what was pipelined on it too, stream %s', async (stream) => {
    harness.engine.script = () => {
      const events = new EventFeed();
      if (stream) events.push(startEvent(), pieceEvent('a'));
      return events;
    };
    const socket = await open();
    socket.write(httpRequest(JSON.stringify({ ...ask, stream })).repeat(5));
    await until(() => harness.engine.live === 5);
    socket.destroy();
    await until(() => harness.engine.live === 0 && harness.logs.length === 5);
    expect(harness.logs.every((line) => JSON.parse(line).status === 499)).toBe(true);
  });

  it('in the middle of its body submits nothing', async () => {
    const socket = await open();
    socket.write(httpRequest(JSON.stringify(ask)).slice(0, -10));
    await until(() => signals.length === 1);
    socket.destroy();
    await until(() => harness.logs.length === 1);
    expect(JSON.parse(harness.logs[0]!)).toMatchObject({ status: 499, code: 'cancelled' });
    expect(harness.engine.requests).toEqual([]);
  });
});

describe('a socket that is not read', () => {
  it('stops the engine after what the kernel buffers', async () => {
    let taken = 0;
    const piecesMax = 2000;
    const text = 'x'.repeat(16 * 1024);
    harness.engine.script = async function* () {
      yield startEvent();
      for (; taken < piecesMax; taken++) yield { kind: 'piece', text, tokens: [] };
      yield endEvent(1);
    };
    const socket = await open();
    socket.pause();
    socket.write(httpRequest(JSON.stringify({ ...ask, stream: true })));
    await until(() => taken > 0);
    let before = -1;
    // Still when the loop turned many times without a piece taken.
    while (before !== taken) {
      before = taken;
      for (let i = 0; i < 10; i++) await settleTasks();
    }
    expect(taken).toBeLessThan(piecesMax / 2);
    socket.destroy();
    await until(() => harness.engine.live === 0);
  });
});

describe('a port that is taken', () => {
  it('is said so', async () => {
    const options = {
      host: '127.0.0.1',
      port: listening.port,
      connectionsMax: 1,
      keepAliveMs: 1,
      requestMsMax: 60_000,
    };
    await expect(listen(harness.app, harness.lifecycle, options)).rejects.toMatchObject({
      code: 'INVALID_REQUEST',
      message: `cannot listen on 127.0.0.1 port ${listening.port}: EADDRINUSE`,
    });
  });
});

describe('limits of the connection', () => {
  it('a body that is too large sees its 413', async () => {
    const answer = await raw(httpRequest(`{"x":"${'y'.repeat(600_000)}"}`));
    expect(answer).toMatch(/^HTTP\/1.1 413 /);
    const chunked = [
      `POST ${path} HTTP/1.1`,
      'Host: 127.0.0.1',
      'Content-Type: application/json',
      'Transfer-Encoding: chunked',
      '',
      '80000',
      'y'.repeat(0x80000),
      '0',
      '',
      '',
    ].join('\r\n');
    expect(await raw(chunked)).toMatch(/^HTTP\/1.1 413 /);
  });

  const head = `POST ${path} HTTP/1.1\r\n`;
  it.each([
    [
      'both lengths',
      `${head}Host: a\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n{}`,
      400,
    ],
    ['two lengths', `${head}Host: a\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{}`, 400],
    ['no host', `${head}Content-Length: 2\r\n\r\n{}`, 400],
    ['a bad host', `${head}Host: a b\r\nContent-Length: 2\r\n\r\n{}`, 400],
    ['LF only', `POST ${path} HTTP/1.1\nHost: a\nContent-Length: 2\n\n{}`, 400],
    ['17 KiB of header', `${head}Host: a\r\nX: ${'y'.repeat(17 * 1024)}\r\n\r\n`, 431],
    ['a backslash in the path', 'GET /v1\\models HTTP/1.1\r\nHost: a b\r\n\r\n', 400],
  ])('%s is refused', async (_, request, status) => {
    expect(await raw(request)).toMatch(new RegExp(`^HTTP/1.1 ${status} `));
    expect(harness.engine.requests).toEqual([]);
  });

  it('admin calls see the real peer', async () => {
    const response = await fetch(`http://127.0.0.1:${listening.port}/v1/adapters`);
    expect(response.status).toBe(200);
    await response.text();
  });
});

describe('close', () => {
  it('lets a stream end within the grace and answers 503 until it has', async () => {
    const events = feed();
    events.push(startEvent(), pieceEvent('a'));
    const response = await post({ ...ask, stream: true });
    const unused = await open();
    const closing = listening.close(60_000);
    for (const body of [ask, { ...ask, stream: true }]) {
      const refused = await post(body);
      expect([refused.status, refused.headers.get('retry-after')]).toEqual([503, '5']);
      expect(refused.headers.get('connection')).toBe('close');
      expect(await refused.json()).toMatchObject({ error: { code: 'no_capacity' } });
    }
    expect((await fetch(`http://127.0.0.1:${listening.port}/readyz`)).status).toBe(503);
    // A connection that was opened before and used only now.
    unused.write(httpRequest(JSON.stringify(ask)));
    expect(String(await once(unused, 'data'))).toMatch(/^HTTP\/1.1 503 /);
    events.push(pieceEvent('b'), endEvent(2));
    expect(parseFrames(await response.text()).at(-1)).toBe('[DONE]');
    await closing; // the kept-alive connection does not hold it up
    await expect(open()).rejects.toThrow('ECONNREFUSED');
  });

  it('cuts a stream after the grace with an error frame', async () => {
    feed().push(startEvent(), pieceEvent('a'));
    const response = await post({ ...ask, stream: true });
    const reading = response.text();
    await listening.close(0);
    expect(parseFrames(await reading).at(-1)).toMatchObject({ error: { code: 'no_capacity' } });
  });

  it('is immediate when only idle connections are open', async () => {
    await (await post(ask)).json();
    const unused = await open();
    const closed = once(unused, 'close');
    await listening.close(60_000);
    await closed;
  });
});
