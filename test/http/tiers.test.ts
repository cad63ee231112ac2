import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { GatewayError } from '../../src/errors.ts';
import { createHarness, type Harness, type Json, settleTasks } from '../support/http-harness.ts';
import { EventFeed, endEvent, pieceEvent, startEvent } from '../support/scripted-engine.ts';

const chat = '/v1/chat/completions';
const ask = { model: 'support', messages: [{ role: 'user', content: 'Hi' }] };

let harness: Harness;
beforeEach(() => {
  harness = createHarness({ queueRequestsMax: 2 });
});
afterEach(() => harness.close());

async function problem(response: Response): Promise<[number, string, string | null]> {
  const { error } = (await response.json()) as Json;
  return [response.status, error.code, error.param];
}

describe('a call in a tier', () => {
  it.each([
    ['/v1/tiers/instant/chat/completions', ask],
    ['/v1/tiers/instant/completions', { model: 'support', prompt: 'Hi' }],
  ])('%s has the budget and the priority of the tier', async (path, body) => {
    const response = await harness.post(path, body);
    expect(response.status).toBe(200);
    expect(harness.routed[0]!.budget).toMatchObject({ totalMs: 300, priority: 8 });
    expect(response.headers.get('x-rank-reason')).toBe('reduced');
  });

  it('keeps its priority beside times of the body', async () => {
    await harness.post('/v1/tiers/quality/chat/completions', { ...ask, latency: { total_ms: 9 } });
    expect(harness.routed[0]!.budget).toMatchObject({ totalMs: 9, priority: 2 });
  });

  it('may say the same tier twice', async () => {
    const body = { ...ask, model: 'support:instant', service_tier: 'instant' };
    expect((await harness.post('/v1/tiers/instant/chat/completions', body)).status).toBe(200);
    const usual = { ...ask, service_tier: 'auto' };
    expect((await harness.post('/v1/tiers/instant/chat/completions', usual)).status).toBe(200);
    expect(harness.routed.map(({ budget }) => budget.totalMs)).toEqual([300, 300]);
  });

  it.each([
    [{ service_tier: 'quality' }, 'service_tier'],
    [{ model: 'support:quality' }, 'model'],
    [{ model: 'support:instant', service_tier: 'quality' }, 'service_tier'],
  ])('is refused when %j says another', async (body, param) => {
    const response = await harness.post('/v1/tiers/instant/chat/completions', { ...ask, ...body });
    expect(await problem(response)).toEqual([400, 'invalid_request', param]);
  });

  it.each(['platinum', 'toString', '__proto__', 'a%2Fb', '%00'])(
    'of the name %s that is none is 404',
    async (tier) => {
      const response = await harness.post(`/v1/tiers/${tier}/chat/completions`, ask);
      expect(await problem(response)).toEqual([404, 'not_found', null]);
    },
  );

  it('answers other methods with 405', async () => {
    expect((await harness.fetch('GET', '/v1/tiers/instant/completions')).status).toBe(405);
  });
});

describe('admission', () => {
  it('answers a full queue at once with 429 and the time that the backlog takes', async () => {
    const feeds = [new EventFeed(), new EventFeed()];
    const pending = [...feeds];
    harness.engine.script = () => pending.shift()!;
    const waiting = feeds.map(() => harness.post(chat, ask));
    await settleTasks();
    const refused = await harness.post(chat, ask);
    expect(refused.headers.get('retry-after')).toBe('5'); // the harness's router: 3 s and one each
    expect(await problem(refused)).toEqual([429, 'contended', null]);
    expect(harness.engine.requests).toHaveLength(2);
    harness.engine.ready = false;
    const down = await harness.post(chat, ask);
    expect(down.headers.get('retry-after')).toBe('5');
    expect(await problem(down)).toEqual([503, 'no_capacity', null]);
    // Who has started does not wait any more.
    harness.engine.ready = true;
    feeds[0]!.push(startEvent());
    await settleTasks();
    harness.engine.script = () => {
      const feed = new EventFeed();
      feed.push(startEvent(), endEvent(0));
      return feed;
    };
    expect((await harness.post(chat, ask)).status).toBe(200);
    feeds[0]!.push(endEvent(0));
    feeds[1]!.push(startEvent(), endEvent(0));
    for (const one of waiting) expect((await one).status).toBe(200);
  });

  it('tells when to come back where the engine only says that its queue is full', async () => {
    const feed = new EventFeed();
    harness.engine.script = () => feed;
    feed.push(new GatewayError('CONTENDED', '9 requests wait'));
    const refused = await harness.post(chat, ask);
    expect(refused.headers.get('retry-after')).toBe('4');
    expect(await problem(refused)).toEqual([429, 'contended', null]);
  });

  it('refuses a strict budget that cannot be met with 504, before the engine hears of it', async () => {
    const refused = await harness.post(chat, { ...ask, latency: { total_ms: 5, strict: true } });
    expect(refused.headers.get('x-should-retry')).toBe('false');
    expect(await problem(refused)).toEqual([504, 'deadline_too_short', null]);
    expect(harness.engine.requests).toEqual([]);
  });

  it('takes what tokenising cost from the budget', async () => {
    const { encodeChat } = harness.text;
    harness.text.encodeChat = async function slow(...given) {
      harness.clock.advance(40);
      return encodeChat.apply(harness.text, given);
    };
    const latency = { total_ms: 300, ttft_ms: 100, per_token_ms: 7 };
    await harness.post(chat, { ...ask, latency });
    expect(harness.routed[0]!.budget).toMatchObject({ totalMs: 260, ttftMs: 60, perTokenMs: 7 });
  });
});

describe('the policy is told', () => {
  const timed = { ...ask, latency: { total_ms: 100 } };

  it('whether the engine kept the time, however slowly the client reads', async () => {
    for (const totalMs of [100, 101]) {
      harness.engine.script = async function* (request) {
        harness.clock.advance(500);
        yield startEvent();
        yield pieceEvent('ab', request);
        yield endEvent(2, 'stop', { ttftMs: 50, totalMs });
      };
      await harness.post(chat, timed);
    }
    expect(harness.judged.map(({ met, score }) => [met, score])).toEqual([
      [true, null],
      [false, null],
    ]);
    expect(harness.judged[0]).toMatchObject({
      input: harness.routed[0],
      plan: { rank: 4, reason: 'reduced' },
    });
  });

  it('nothing of answers without a budget', async () => {
    await harness.post(chat, ask);
    expect(harness.judged).toEqual([]);
  });

  it.each([
    [101, [false]],
    [100, []],
  ])('that a request given up after %d of 100 ms was late: %j', async (ms, met) => {
    harness.engine.script = () => new EventFeed();
    const controller = new AbortController();
    const answering = harness.fetch('POST', chat, {
      headers: { 'content-type': 'application/json' },
      body: JSON.stringify(timed),
      signal: controller.signal,
    });
    await settleTasks();
    harness.clock.advance(ms);
    controller.abort();
    expect((await answering).status).toBe(499);
    expect(harness.judged.map((outcome) => outcome.met)).toEqual(met);
  });
});
