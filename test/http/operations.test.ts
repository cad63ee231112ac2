import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { publish } from '../../src/channels.ts';
import { GatewayError } from '../../src/errors.ts';
import { scoresPerCandidate } from '../../src/router/archive-scores.ts';
import {
  createHarness,
  generationA,
  type Harness,
  type Json,
  settleTasks,
} from '../support/http-harness.ts';
import { EventFeed, endEvent, pieceEvent, startEvent } from '../support/scripted-engine.ts';

const chat = '/v1/chat/completions';
const ask = { model: 'support', messages: [{ role: 'user', content: 'Secret words' }] };

let harness: Harness;
beforeEach(() => {
  harness = createHarness();
});
afterEach(() => harness.close());

async function ready(): Promise<[number, string | undefined]> {
  const response = await harness.fetch('GET', '/readyz');
  return [response.status, ((await response.json()) as Json).reason];
}

describe('/readyz', () => {
  it('is ready while tokens are fresh, without making one', async () => {
    expect(await ready()).toEqual([200, undefined]);
    expect(harness.engine.requests).toEqual([]);
  });

  it('makes one token when the last is old, once for all who ask', async () => {
    harness.clock.advance(60_001);
    const feed = new EventFeed();
    harness.engine.script = () => feed;
    const asking = [ready(), ready(), ready()];
    await settleTasks();
    feed.push(startEvent(), endEvent(1));
    expect(await Promise.all(asking)).toEqual([
      [200, undefined],
      [200, undefined],
      [200, undefined],
    ]);
    expect(harness.engine.requests).toHaveLength(1);
    expect(harness.engine.requests[0]).toMatchObject({ tokensMax: 1, adapter: null });
  });

  it('is not ready when that token does not come', async () => {
    harness.engine.lastTokenMs = null;
    harness.engine.script = () => new EventFeed();
    const asking = ready();
    await settleTasks();
    harness.clock.advance(2000);
    expect(await asking).toEqual([503, 'engine stalled']);
  });

  it('is not ready when requests wait and no token comes, and adds none to the queue', async () => {
    const feed = new EventFeed();
    harness.engine.script = () => feed;
    const answering = harness.post(chat, ask);
    await settleTasks();
    harness.engine.lastTokenMs = 0;
    feed.push(startEvent());
    await settleTasks();
    const { timers } = harness.leftovers() as { timers: number };
    expect(timers).toBe(0);
    harness.clock.advance(60_001);
    expect(await ready()).toEqual([503, 'engine stalled']);
    expect(harness.engine.requests).toHaveLength(1);
    feed.push(endEvent(0));
    await answering;
  });

  it('says what is missing', async () => {
    harness.engine.ready = false;
    expect(await ready()).toEqual([503, 'engine not ready']);
    harness.engine.ready = true;
    harness.registry.isClosed = true;
    expect(await ready()).toEqual([503, 'registry closed']);
    harness.registry.isClosed = false;
    harness.lifecycle.isDraining = true;
    expect(await ready()).toEqual([503, 'draining']);
    expect((await harness.fetch('GET', '/livez')).status).toBe(200);
  });
});

async function metrics(): Promise<string> {
  const response = await harness.fetch('GET', '/metrics');
  expect(response.headers.get('content-type')).toBe('text/plain; version=0.0.4; charset=utf-8');
  return response.text();
}

describe('/metrics', () => {
  it('has the names that a scheduler reads', async () => {
    harness.registry.create('alias', generationA);
    harness.engine.figures = {
      running: 5,
      waiting: 3,
      kvCellsUsed: 430,
      kvCellsMax: 1000,
      residents: [{ generation: generationA, rank: 16, bytes: 1, uses: 0 }],
      prefixTokensQueried: 70,
      prefixTokensHit: 30,
      preemptions: 6,
      prewarms: 4,
      prewarmsUsed: 3,
    };
    const page = await metrics();
    for (const line of [
      '# TYPE vllm:num_requests_waiting gauge',
      'vllm:num_requests_waiting{model_name="tiny-base"} 3',
      'vllm:num_requests_running{model_name="tiny-base"} 5',
      'vllm:kv_cache_usage_perc{model_name="tiny-base"} 0.43',
      'vllm:prefix_cache_queries_total{model_name="tiny-base"} 70',
      'vllm:prefix_cache_hits_total{model_name="tiny-base"} 30',
      '# TYPE vllm:num_preemptions_total counter',
      'vllm:num_preemptions_total{model_name="tiny-base"} 6',
      'rankgate_prewarms_total{model_name="tiny-base"} 4',
      'rankgate_prewarms_used_total{model_name="tiny-base"} 3',
      'rankgate_adapters{tier="slot"} 2',
    ]) {
      expect(page.split('\n')).toContain(line);
    }
    // Residents by name, stamped with the time of the scrape.
    const stamp = harness.clock.unixMs() / 1000;
    expect(page).toContain(
      `vllm:lora_requests_info{max_lora="8",running_lora_adapters="alias,support",waiting_lora_adapters=""} ${stamp}\n`,
    );
    harness.clock.advance(5000);
    expect(await metrics()).toContain(`waiting_lora_adapters=""} ${stamp + 5}\n`);
  });

  it('shows an adapter that is waited for and not resident', async () => {
    const feed = new EventFeed();
    harness.engine.script = () => feed;
    const answering = harness.post(chat, ask);
    await settleTasks();
    expect(await metrics()).toContain('running_lora_adapters="",waiting_lora_adapters="support"');
    // Resident and waited for (for cells): it counts as resident.
    const residents = [{ generation: generationA, rank: 16, bytes: 1, uses: 0 }];
    harness.engine.figures = { residents };
    expect(await metrics()).toContain('running_lora_adapters="support",waiting_lora_adapters=""');
    harness.engine.figures = {};
    feed.push(startEvent(), endEvent(0));
    await answering;
    expect(await metrics()).toContain('waiting_lora_adapters=""');
  });

  it('counts what requests came to', async () => {
    harness.engine.script = async function* (request) {
      harness.clock.advance(20);
      yield startEvent(0, 20);
      harness.clock.advance(30);
      yield pieceEvent('abc', request);
      harness.clock.advance(200);
      yield endEvent(3, 'stop', { ttftMs: 50, totalMs: 250 });
    };
    const prompt = 'user: Secret words\n'.length;
    await harness.post(chat, { ...ask, latency: { total_ms: 1000 } });
    await harness.post(chat, { ...ask, latency: { ttft_ms: 10 } });
    await (await harness.post(chat, { ...ask, stream: true })).text();
    await harness.post(chat, { ...ask, model: 'nope' });
    publish('engine-restart', { reason: 'hang' });
    const lines = (await metrics()).split('\n');
    for (const line of [
      'rankgate_requests_total{route="/v1/chat/completions",status="200"} 3',
      'rankgate_requests_total{route="/v1/chat/completions",status="404"} 1',
      'vllm:request_success_total{model_name="tiny-base",finished_reason="stop"} 3',
      `vllm:prompt_tokens_total{model_name="tiny-base"} ${3 * prompt}`,
      'vllm:generation_tokens_total{model_name="tiny-base"} 9',
      'vllm:time_to_first_token_seconds_bucket{model_name="tiny-base",le="0.04"} 0',
      'vllm:time_to_first_token_seconds_bucket{model_name="tiny-base",le="0.06"} 3',
      'vllm:time_to_first_token_seconds_count{model_name="tiny-base"} 3',
      // 200 ms for the two tokens after the first.
      'vllm:time_per_output_token_seconds_bucket{model_name="tiny-base",le="0.075"} 0',
      'vllm:time_per_output_token_seconds_bucket{model_name="tiny-base",le="0.1"} 3',
      'vllm:e2e_request_latency_seconds_sum{model_name="tiny-base"} 0.75',
      'rankgate_rank_chosen_bucket{model_name="tiny-base",le="4"} 1',
      'rankgate_rank_chosen_bucket{model_name="tiny-base",le="16"} 3',
      'rankgate_plans_total{reason="reduced"} 1',
      'rankgate_plans_total{reason="full"} 2',
      'rankgate_budget_total{tier="",outcome="met"} 1',
      'rankgate_budget_total{tier="",outcome="missed"} 1',
      // 250 ms against a prediction of 120.5 ms.
      'rankgate_prediction_error_ratio_bucket{model_name="tiny-base",le="1"} 0',
      'rankgate_prediction_error_ratio_bucket{model_name="tiny-base",le="2"} 3',
      'rankgate_engine_restarts_total{reason="hang"} 1',
    ]) {
      expect(lines).toContain(line);
    }
  });

  /** Of one family. */
  async function samples(family: string): Promise<string[]> {
    return (await metrics()).split('\n').filter((line) => line.startsWith(`${family}{`));
  }

  it('counts by tier whether stated times were kept', async () => {
    let tookMs = 200;
    harness.engine.script = async function* (request) {
      harness.clock.advance(tookMs);
      yield startEvent();
      yield pieceEvent('ab', request);
      yield endEvent(2);
    };
    const instant = '/v1/tiers/instant/chat/completions'; // 300 ms
    await harness.post(instant, ask);
    await harness.post(chat, { ...ask, service_tier: 'quality' }); // states no time
    await harness.post(chat, { ...ask, service_tier: 'nonesuch' });
    tookMs = 400;
    await harness.post(instant, ask);
    await harness.post(chat, { ...ask, model: 'support:instant' });
    const strict = { ...ask, latency: { total_ms: 5, strict: true } };
    await harness.post(chat, strict);
    await harness.post(instant, strict);
    expect(await samples('rankgate_budget_total')).toEqual([
      'rankgate_budget_total{tier="instant",outcome="met"} 1',
      'rankgate_budget_total{tier="instant",outcome="missed"} 2',
      'rankgate_budget_total{tier="",outcome="refused"} 1',
      'rankgate_budget_total{tier="instant",outcome="refused"} 1',
    ]);
  });

  it.each([
    [300, []],
    [301, ['rankgate_budget_total{tier="instant",outcome="missed"} 1']],
  ])('counts an answer that is given up after %d of 300 ms as %j', async (ms, lines) => {
    harness.engine.script = () => new EventFeed();
    const controller = new AbortController();
    const answering = harness.fetch('POST', chat, {
      headers: { 'content-type': 'application/json' },
      body: JSON.stringify({ ...ask, service_tier: 'instant' }),
      signal: controller.signal,
    });
    await settleTasks();
    harness.clock.advance(ms);
    controller.abort();
    expect((await answering).status).toBe(499);
    expect(await samples('rankgate_budget_total')).toEqual(lines);
  });

  it('counts the ranks that were changed on the way, also of an answer that failed', async () => {
    harness.engine.script = async function* (request) {
      yield startEvent();
      yield { kind: 'rank', rank: 2, reason: 'late' };
      yield pieceEvent('a', request);
      yield { kind: 'rank', rank: 1, reason: 'late' };
      yield { kind: 'rank', rank: 4, reason: 'slack' };
      if (request.tokensMax === 1) throw new GatewayError('ENGINE_FAILED', 'down');
      yield endEvent(1);
    };
    await harness.post(chat, ask);
    await harness.post(chat, { ...ask, max_tokens: 1 });
    expect(await samples('rankgate_rank_changes_total')).toEqual([
      'rankgate_rank_changes_total{reason="late"} 4',
      'rankgate_rank_changes_total{reason="slack"} 2',
    ]);
    expect(JSON.parse(harness.logs[0]!)).toMatchObject({ rankFalls: 2, rankRises: 1 });
  });

  it('counts what was offered to the archive, and how cells were read', async () => {
    const candidate = { domain: 'law', adapter: 'support', rank: 8, latency_ms: 100 };
    for (const objective of [0.5, 0.9, 0.2]) {
      await harness.post('/v1/adapters/archive', { candidates: [{ ...candidate, objective }] });
    }
    const base = { ...ask, model: 'tiny-base' };
    for (const [domain, ms] of [
      ['law', 100],
      ['law', 5000],
      ['law', 100],
      ['code', 100],
    ] as const) {
      await harness.post(chat, { ...base, domain, latency: { total_ms: ms } });
    }
    for (let i = 0; i < scoresPerCandidate; i++) {
      const answer = (await (await harness.post(chat, { ...ask, domain: 'law' })).json()) as Json;
      await harness.post('/v1/feedback', { request_id: answer.id, score: 1 });
    }
    expect(await samples('rankgate_archive_offers_total')).toEqual([
      'rankgate_archive_offers_total{from="evaluation",status="new"} 1',
      'rankgate_archive_offers_total{from="evaluation",status="improved"} 1',
      'rankgate_archive_offers_total{from="evaluation",status="not-better"} 1',
      'rankgate_archive_offers_total{from="feedback",status="new"} 1',
    ]);
    expect(await samples('rankgate_archive_reads_total')).toEqual([
      'rankgate_archive_reads_total{match="exact"} 2',
      'rankgate_archive_reads_total{match="nearest"} 1',
      'rankgate_archive_reads_total{match="none"} 1',
    ]);
  });

  it('tells how far off predictions were, of all and of the adapters that one may see', async () => {
    for (const totalMs of [120.5, 241, 361.5]) {
      harness.engine.script = async function* () {
        yield startEvent();
        yield endEvent(1, 'stop', { ttftMs: 1, totalMs });
      };
      await harness.post(chat, ask);
    }
    harness.engine.script = async function* () {
      yield startEvent();
      yield endEvent(1, 'stop', { ttftMs: 1, totalMs: 120.5 });
    };
    await harness.post(chat, { ...ask, model: 'tiny-base' });
    const lines = (await metrics()).split('\n');
    for (const line of [
      'rankgate_prediction_error{quantile="0.5"} 0',
      'rankgate_prediction_error{quantile="0.9"} 2',
      'rankgate_adapter_prediction_error{adapter="support",quantile="0.5"} 1',
      'rankgate_adapter_prediction_error{adapter="support",quantile="0.9"} 2',
    ]) {
      expect(lines).toContain(line);
    }
  });

  it('is well-formed, and names no prompt, tenant or unknown path', async () => {
    await harness.post(chat, ask);
    await harness.fetch('GET', '/nope/secret');
    const page = await metrics();
    const sample =
      /^[a-zA-Z_:][a-zA-Z0-9_:]*(?:\{(?:[a-z_]+="(?:[^"\\\n]|\\.)*",?)*\})? -?[0-9.e+-]+$/;
    for (const line of page.trimEnd().split('\n')) {
      expect(line.startsWith('# ') || sample.test(line), line).toBe(true);
    }
    const types = page.match(/^# TYPE (\S+)/gm)!;
    expect(new Set(types).size).toBe(types.length);
    expect(page).not.toMatch(/secret|local|Secret/);
    expect(page).toContain('rankgate_requests_total{route="unknown",status="404"} 1');
  });
});

describe('the log', () => {
  it('has one line per request, with the plan and without the prompt', async () => {
    await harness.post(chat, ask, { 'x-request-id': 'abc' });
    await (await harness.post(chat, { ...ask, stream: true })).text();
    expect(harness.logs).toHaveLength(2);
    expect(harness.logs.join('')).not.toMatch(/\n|Secret/);
    expect(JSON.parse(harness.logs[0]!)).toMatchObject({
      time: expect.stringMatching(/^\d{4}-\d\d-\d\dT/),
      level: 'info',
      event: 'request-end',
      requestId: 'abc',
      method: 'POST',
      route: chat,
      status: 200,
      code: null,
      stream: false,
      tenant: 'local',
      adapter: 'support',
      generation: generationA,
      rank: 16,
      rankMax: 16,
      reason: 'full',
      predictedMs: 120.5,
      promptTokens: 19,
      finishReasons: ['stop'],
    });
  });

  it('cannot be forged by what a client sends', async () => {
    const evil = 'x\n{"level":"error"}\u001b[31m';
    await harness.post(chat, { ...ask, model: evil, user: evil });
    await harness.fetch('GET', `/${encodeURIComponent(evil)}`);
    for (const line of harness.logs) {
      expect([...line].filter((character) => character < ' ')).toEqual([]);
      expect(JSON.parse(line)).toMatchObject({ level: 'info', status: 404 });
    }
  });
});
