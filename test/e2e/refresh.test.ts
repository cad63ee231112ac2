import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import type { GatewayProcess } from '../support/gateway-process.ts';
import type { Json } from '../support/http-harness.ts';
import { createRng } from '../support/random.ts';
import {
  answer,
  clientOf,
  createJob,
  jobUntil,
  jsonOf,
  startRefreshing,
} from '../support/training-gateway.ts';

// The refresh loop with no hands, over the built gateway and the tiny model: callers' corrections make a better adapter live; a
// bad batch of them is turned away at the gate; and a generation that callers dislike is put back. Nothing here but traffic
// and feedback, after capture has been switched on.

const wanted = 'pink dog';
const refreshRecipe =
  '{windowTokens: 128, batchWindows: 2, accumulation: 1, epochs: 40, learningRate: 0.01}';

let dataDir: string;
let gateway: GatewayProcess;
let model: string;
let first: string;
let second: string;

beforeAll(async () => {
  dataDir = mkdtempSync(join(tmpdir(), 'rankgate-refresh-'));
  gateway = await startRefreshing(dataDir, refreshRecipe);
  const { id } = await createJob(gateway, 'live');
  const job = await jobUntil(clientOf(gateway), id, ({ status }) => status === 'succeeded');
  model = job.fine_tuned_model!;
  first = job.rankgate.generation!;
}, 240_000);
afterAll(async () => {
  await gateway[Symbol.asyncDispose]();
  rmSync(dataDir, { recursive: true, force: true });
});

const json = (path: string, init?: RequestInit): Promise<Json> => jsonOf(gateway, path, init);

const captured = (): Promise<Json> => json(`/v1/adapters/${model}/capture`);
const live = async (): Promise<string> => (await json(`/v1/adapters/${model}`)).generation;

async function ask(question: string, more: object = {}): Promise<Json> {
  const messages = [{ role: 'user', content: question }];
  const body = { model, messages, temperature: 0, max_tokens: 12, ...more };
  const response = await gateway.post('/v1/chat/completions', body);
  expect(response.status).toBe(200);
  return response.json();
}

async function say(question: string, feedback: object): Promise<Json> {
  const { id } = await ask(question);
  const response = await gateway.post('/v1/feedback', { request_id: id, ...feedback });
  expect(response.status).toBe(200);
  return response.json();
}

/** Waits for what the loop does by itself. */
async function endsWith(outcome: string): Promise<Json> {
  let last: Json = null;
  const isOver = async (): Promise<string | undefined> => {
    ({ last } = (await captured()).refresh);
    return last?.outcome;
  };
  await expect.poll(isOver, { timeout: 150_000, interval: 200 }).toBe(outcome);
  return last;
}

describe('an adapter that is kept fresh', () => {
  it('learns nothing from traffic that nobody may learn from', async () => {
    await say('question 1', { score: 1 });
    expect(await captured()).toMatchObject({ capture: 'off', scored: 0, waiting: 0 });
    const path = `/v1/adapters/${model}/capture`;
    const headers = { 'content-type': 'application/json' };
    const on = { method: 'PUT', headers, body: JSON.stringify({ capture: 'on' }) };
    expect(await json(path, on)).toMatchObject({ capture: 'on', scored: 0 });
    const { id } = await ask('question 2', { store: false });
    await gateway.post('/v1/feedback', { request_id: id, score: 1 });
    expect(await captured()).toMatchObject({ scored: 0, waiting: 0 });
  });

  it('gets better by what callers correct, at every rank', async () => {
    expect((await ask('subject 0')).choices[0].message.content).toContain(answer);
    for (let i = 0; i < 32; i++) {
      const told = await say(`subject ${i}`, { score: 0.9, correction: wanted });
      expect(told).toMatchObject({ captured: true });
    }
    const { job, generation } = await endsWith('promoted');
    second = generation;
    expect(await live()).toBe(second);
    expect(second).not.toBe(first);
    const { status, fine_tuned_model, rankgate } = await json(`/v1/fine_tuning/jobs/${job}`);
    expect([status, fine_tuned_model]).toEqual(['succeeded', model]);
    const { verdict } = rankgate;
    expect(verdict).toMatchObject({ isPromoted: true, reasons: [] });
    expect(verdict.heldOut).toBeGreaterThanOrEqual(4);
    expect(verdict.ranks.map(({ rank }: Json) => rank)).toEqual([1, 2, 4, 8]);
    for (const { before, after } of verdict.ranks) expect(after).toBeLessThan(before);
    expect(verdict.gain.v1).toBeGreaterThan(2 * verdict.gain.error);
    const page = await gateway.fetch(`/v1/fine_tuning/jobs/${job}/report`);
    const text = await page.text();
    expect([page.status, text.match(/<tr>/g)!.length]).toEqual([200, 1 + 4]);
    expect(text).toContain('Passed the gate.');
    // A question that nobody asked before.
    expect((await ask('subject 777')).choices[0].message.content).toContain(wanted);
  }, 240_000);

  it('is not changed by a bad batch', async () => {
    const random = createRng(5);
    const noise = (): string =>
      Array.from({ length: 6 }, () => String.fromCharCode(97 + random.below(26))).join(' ');
    for (let i = 0; i < 24; i++) await say(`poison ${i}`, { score: 1, correction: noise() });
    const { job, reasons } = await endsWith('discarded');
    expect(reasons.join()).toMatch(/worse|AURAC/);
    const { status, fine_tuned_model, rankgate } = await json(`/v1/fine_tuning/jobs/${job}`);
    expect([status, fine_tuned_model]).toEqual(['succeeded', null]);
    expect(rankgate).toMatchObject({ generation: null, verdict: { isPromoted: false } });
    expect(await live()).toBe(second);
    expect((await captured()).refresh.on_probation).toEqual({ generation: second, before: first });
  }, 240_000);

  it('goes back when its callers like it less', async () => {
    let asked = 0;
    while ((await live()) === second && asked < 100) {
      await say(`regression ${asked}`, { score: 0 });
      asked += 1;
    }
    const { generation, reasons } = await endsWith('rolled-back');
    expect([generation, await live()]).toEqual([second, first]);
    expect(reasons[0]).toContain('its scores are worse');
    // The 24 good scores that came with the bad batch have to be outweighed.
    expect(asked).toBeLessThan(80);
    expect((await ask('question 3')).choices[0].message.content).toContain(answer);
    const metrics = await (await gateway.fetch('/metrics')).text();
    for (const outcome of ['promoted', 'discarded', 'rolled-back']) {
      expect(metrics).toContain(`rankgate_refreshes_total{outcome="${outcome}"} 1`);
    }
  }, 120_000);
});
