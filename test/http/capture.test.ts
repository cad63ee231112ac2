import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { fakeGeneration, fakeManifest } from '../support/fake-registry.ts';
import {
  type Answer,
  createHarness,
  type Harness,
  type Json,
  tenantKeys,
} from '../support/http-harness.ts';
import { createTestTraining, type TestTraining } from '../support/test-training.ts';

let training: TestTraining;
let harness: Harness;
beforeEach(() => {
  training = createTestTraining({ bytesMax: 1_000_000, filesMax: 50 });
  harness = createHarness({ apiKeys: tenantKeys }, training);
  harness.registry.store(fakeGeneration('c3'), fakeManifest(8), 500);
  harness.registry.create('acme/mine', fakeGeneration('c3'));
});
afterEach(() => {
  expect(training.failures).toEqual([]);
  harness.close();
  training[Symbol.dispose]();
});

const call = (who: string, method: string, path: string, body?: unknown): Promise<Answer> =>
  harness.call(who, method, path, { body });

const turn = (who: string, name: string, capture: string): Promise<Answer> =>
  call(who, 'PUT', `/v1/adapters/${encodeURIComponent(name)}/capture`, { capture });
const state = async (name = 'support', who = 'operator'): Promise<Json> =>
  (await call(who, 'GET', `/v1/adapters/${encodeURIComponent(name)}/capture`)).body;
const chat = (over: object = {}): object => ({
  model: 'support',
  messages: [{ role: 'user', content: 'Hi' }],
  ...over,
});
const ask = async (who: string, over: object = {}, path = '/v1/chat/completions') =>
  (await call(who, 'POST', path, chat(over))).body;
const feedback = (who: string, id: string, over: object = {}): Promise<Answer> =>
  call(who, 'POST', '/v1/feedback', { request_id: id, score: 1, ...over });

describe('capture', () => {
  it('is off until the adapter’s owner switches it on', async () => {
    const { id } = await ask('plain');
    expect((await feedback('plain', id)).body).toMatchObject({ captured: false });
    expect(await state()).toMatchObject({ capture: 'off', waiting: 0 });
    expect((await turn('operator', 'support', 'on')).body).toMatchObject({
      object: 'adapter.capture',
      adapter: 'support',
      capture: 'on',
      ...{ scored: 0, waiting: 0, bytes: 0, seen: 0 },
      refresh: { started_at: null, job: null, on_probation: null, last: null },
    });
    const answer = await ask('plain');
    const said = { score: 0.5, comment: 'rude', correction: 'Good day' };
    expect((await feedback('plain', answer.id, said)).body).toEqual({
      object: 'feedback',
      request_id: answer.id,
      archive: 'counted',
      captured: true,
    });
    expect(training.capture.scored('support')).toMatchObject([
      {
        prompt: { messages: [{ role: 'user', content: 'Hi' }] },
        answer: answer.choices[0].message.content,
        isWhole: answer.choices[0].finish_reason === 'stop',
        score: 0.5,
        correction: 'Good day',
      },
    ]);
    expect((await turn('operator', 'support', 'off')).body).toMatchObject({ capture: 'off' });
    expect(training.capture.scored('support')).toEqual([]);
  });

  it('takes texts as well, and streams', async () => {
    await turn('operator', 'support', 'on');
    const text = { model: 'support', prompt: 'Once' };
    const whole = await call('plain', 'POST', '/v1/completions', text);
    await feedback('plain', whole.body.id);
    const response = await harness.fetch('POST', '/v1/chat/completions', {
      headers: { authorization: 'Bearer plain', 'content-type': 'application/json' },
      body: JSON.stringify(chat({ stream: true })),
    });
    const { id } = JSON.parse((await response.text()).slice('data: '.length).split('\n')[0]!);
    await feedback('plain', id);
    const prompts = training.capture.scored('support').map(({ prompt }) => prompt);
    expect(prompts).toContainEqual({ prompt: 'Once' });
    expect(prompts).toContainEqual({ messages: [{ role: 'user', content: 'Hi' }] });
  });

  it.each([
    ['that says so', { store: false }],
    ['for several answers', { n: 2 }],
    ['at rank 0', { latency: { rank: 0 } }],
    ['for the base', { model: 'tiny-base' }],
    [
      'for a blend',
      {
        model: 'tiny-base',
        adapters: [
          { id: 'support', weight: 1 },
          { id: 'acme/mine', weight: 1 },
        ],
      },
    ],
    ['whose template has arguments', { chat_template_kwargs: { style: 'x' } }],
  ])('keeps nothing of a request %s', async (_, over) => {
    await turn('operator', 'support', 'on');
    const { id } = await ask('operator', over);
    expect(id).toBeDefined();
    training.capture.flush();
    expect(await state()).toMatchObject({ scored: 0, waiting: 0 });
  });

  it('obeys a tenant’s refusal, whoever’s the adapter is', async () => {
    await turn('operator', 'support', 'on');
    const { id } = await ask('acme-use');
    await feedback('acme-use', id);
    expect(await state()).toMatchObject({ scored: 1 });
    const refused = await call('acme-use', 'PUT', '/v1/capture', { refused: true });
    expect(refused).toMatchObject({ status: 200, body: { object: 'capture', refused: true } });
    expect(await state()).toMatchObject({ scored: 0 });
    for (const who of ['acme-use', 'acme-admin']) {
      const answer = await ask(who, { store: true });
      expect((await feedback(who, answer.id)).body).toMatchObject({ captured: false });
    }
    const other = await ask('plain');
    expect((await feedback('plain', other.id)).body).toMatchObject({ captured: true });
  });

  it('is the owner’s alone to see and to switch', async () => {
    expect((await turn('acme-admin', 'acme/mine', 'on')).status).toBe(200);
    expect((await turn('acme-admin', 'support', 'on')).status).toBe(403);
    expect((await turn('rival-admin', 'acme/mine', 'on')).status).toBe(404);
    expect((await turn('plain', 'support', 'on')).status).toBe(403);
    expect((await turn('operator', 'nobody', 'on')).status).toBe(404);
    expect((await turn('operator', 'support', 'maybe')).status).toBe(400);
    expect((await state('support', 'acme-admin')).error.code).toBe('forbidden');
    const path = '/v1/adapters/acme%2Fmine/refresh';
    expect((await call('rival-admin', 'POST', path)).status).toBe(404);
  });

  it('takes a score from whoever got the answer, also later', async () => {
    await turn('operator', 'support', 'on');
    const { id } = await ask('plain');
    expect((await feedback('acme-use', id)).status).toBe(404);
    expect((await feedback('plain', id)).status).toBe(200);
    // The archive has counted it; what is learnt of it may still be corrected.
    const again = await feedback('plain', id, { score: 0, correction: 'better' });
    expect(again.body).toMatchObject({ captured: true });
    expect(training.capture.scored('support')[0]).toMatchObject({ score: 0, correction: 'better' });
    expect((await feedback('plain', 'nothing')).status).toBe(404);
  });
});

describe('a refresh that is asked for', () => {
  it('says what is missing', async () => {
    const start = (): Promise<Answer> => call('operator', 'POST', '/v1/adapters/support/refresh');
    expect((await start()).body.error.message).toBe('no refresh: its traffic is not captured');
    await turn('operator', 'support', 'on');
    const { status, body } = await start();
    expect([status, body.error.code]).toEqual([400, 'invalid_request']);
    expect(body.error.message).toMatch(/^no refresh: 0 accepted examples to train on/);
  });

  it('is a job from the live generation, one at a time', async () => {
    await turn('operator', 'support', 'on');
    for (let i = 0; i < 24; i++) {
      const { id } = await ask('plain', { messages: [{ role: 'user', content: `q ${i}` }] });
      await feedback('plain', id, { correction: `a ${i}` });
    }
    const { body } = await call('operator', 'POST', '/v1/adapters/support/refresh');
    expect(body).toMatchObject({
      object: 'fine_tuning.job',
      status: 'queued',
      model: 'support',
      fine_tuned_model: null,
      rankgate: { adapter: 'support', recipe: { stepsMax: 3, rank: 16 }, verdict: null },
    });
    expect(training.wakes()).toBe(1);
    expect((await state()).refresh.job).toBe(body.id);
    const files = (await call('operator', 'GET', '/v1/files')).body.data;
    expect(files).toHaveLength(2);
    expect(files[0].rankgate.examples + files[1].rankgate.examples).toBe(24);
    const again = await call('operator', 'POST', '/v1/adapters/support/refresh');
    expect(again.body.error.message).toContain('a refresh of it is under way');
    await call('operator', 'POST', `/v1/fine_tuning/jobs/${body.id}/cancel`);
    await training.refresher.look();
    expect((await call('operator', 'GET', '/v1/files')).body.data).toEqual([]);
    expect((await state()).refresh).toMatchObject({
      job: null,
      last: { outcome: 'cancelled', job: body.id },
    });
  });
});
