import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { parseRecipe } from '../../src/jobs/recipe.ts';
import {
  type Answer,
  createHarness,
  generationA,
  generationB,
  type Harness,
  type Json,
  tenantKeys,
} from '../support/http-harness.ts';
import { progressAt } from '../support/job-stores.ts';
import { createTestTraining, type TestTraining } from '../support/test-training.ts';

let training: TestTraining;
let harness: Harness;
beforeEach(() => {
  training = createTestTraining();
  harness = createHarness({ apiKeys: tenantKeys }, training);
  const insert = training.db.sql("INSERT INTO files VALUES (?, ?, ?, 'f', 1, 1, 'x', 0)");
  insert.run(1, 'file-1', '');
  insert.run(2, 'file-acme', 'acme');
});
afterEach(() => {
  harness.close();
  training[Symbol.dispose]();
});

const call = (who: string, method: string, path: string, body?: unknown): Promise<Answer> =>
  harness.call(who, method, path, { body });

const jobs = '/v1/fine_tuning/jobs';

const minimal = { model: 'tiny-base', training_file: 'file-1' };
const create = (more: object = {}, who = 'operator'): Promise<Answer> =>
  call(who, 'POST', jobs, { ...minimal, ...more });

describe('a fine-tuning job', () => {
  it('is made of a file and the base, with every default shown', async () => {
    const { status, body } = await create();
    expect(status).toBe(200);
    expect(body).toMatchObject({
      object: 'fine_tuning.job',
      status: 'queued',
      model: 'tiny-base',
      training_file: 'file-1',
      validation_file: null,
      fine_tuned_model: null,
      finished_at: null,
      trained_tokens: null,
      error: null,
      hyperparameters: { n_epochs: 3, batch_size: 4, learning_rate_multiplier: 1 },
      rankgate: { recipe: parseRecipe({}, 'recipe'), progress: null, attempts: 0 },
    });
    expect(body.id).toMatch(/^ftjob-/);
    expect(body.rankgate.adapter).toMatch(/^ft\.tiny-base\.[a-z0-9]+$/);
    expect(training.wakes()).toBe(1);
    expect((await call('operator', 'GET', `${jobs}/${body.id}`)).body).toEqual(body);
  });

  it('takes OpenAI’s hyperparameters as parts of a recipe, wherever they stand', async () => {
    const hyperparameters = { n_epochs: 2, batch_size: 6, learning_rate_multiplier: 0.5 };
    for (const more of [
      { hyperparameters },
      { method: { type: 'supervised', supervised: { hyperparameters } } },
    ]) {
      const { body } = await create({ ...more, seed: 7, suffix: 'my-talk' });
      expect(body.rankgate.recipe).toMatchObject({
        epochs: 2,
        batchWindows: 2,
        accumulation: 3,
        learningRate: 0.0005,
        seed: 7,
      });
      expect(body).toMatchObject({ hyperparameters, seed: 7 });
      expect(body.rankgate.adapter).toMatch(/^ft\.tiny-base\.my-talk\.[a-z0-9]+$/);
    }
    const odd = await create({ hyperparameters: { batch_size: 5 } });
    expect(odd.body.rankgate.recipe).toMatchObject({ batchWindows: 1, accumulation: 5 });
    const auto = await create({ hyperparameters: { n_epochs: 'auto', batch_size: 'auto' } });
    expect(auto.body.rankgate.recipe).toEqual(parseRecipe({}, 'recipe'));
  });

  it('takes the rest of a recipe as rankgate', async () => {
    const rankgate = { kind: 'lora', rank: 4, objective: 'plain', optimizer: { name: 'sgd' } };
    const { body } = await create({ rankgate });
    expect(body.rankgate.recipe).toEqual(parseRecipe(rankgate, 'recipe'));
    expect(body.method.type).toBe('supervised');
  });

  it('by scores instead of examples is what OpenAI calls reinforcement', async () => {
    const method = { kind: 'eggroll', reward: { kind: 'expected' } };
    const { body } = await create({ rankgate: { method }, hyperparameters: { n_epochs: 7 } });
    expect(body.rankgate.recipe).toEqual(parseRecipe({ method, epochs: 7 }, 'recipe'));
    expect(body.method).toMatchObject({
      ...{ type: 'reinforcement', reinforcement: { hyperparameters: { n_epochs: 7 } } },
    });
  });

  it.each([
    ['an unknown field', { integrations: [] }, 400, 'integrations'],
    ['an unknown hyperparameter', { hyperparameters: { beta: 1 } }, 400, 'hyperparameters.beta'],
    ['too many epochs', { hyperparameters: { n_epochs: 101 } }, 400, 'hyperparameters.n_epochs'],
    ['epochs as text', { hyperparameters: { n_epochs: '3' } }, 400, 'hyperparameters.n_epochs'],
    ['another method', { method: { type: 'dpo', dpo: {} } }, 400, 'method.type'],
    ['a long suffix', { suffix: 'a'.repeat(25) }, 400, 'suffix'],
    ['a suffix that is a path', { suffix: '../x' }, 400, 'suffix'],
    ['one thing said twice', { seed: 1, rankgate: { seed: 2 } }, 400, 'rankgate.seed'],
    ['another model', { model: 'nope' }, 404, 'model'],
    ['a tier', { model: 'tiny-base:instant' }, 404, 'model'],
    ['a file that is not there', { training_file: 'file-x' }, 404, 'training_file'],
    ['no such validation file', { validation_file: 'file-x' }, 404, 'validation_file'],
  ])('with %s is refused', async (_, more, status, param) => {
    const answer = await create(more);
    expect([answer.status, answer.body.error.param]).toEqual([status, param]);
    expect(training.jobs.list(null, { after: null, limit: 1, order: 'asc' }).items).toEqual([]);
  });

  it('with a recipe that this build does not have is refused by name', async () => {
    const { status, body } = await create({ rankgate: { kind: 'sara' } });
    expect([status, body.error.code]).toEqual([400, 'unsupported']);
    expect(body.error.param).toBe('rankgate.kind');
    expect(body.error.message).toContain('sara is not in this build');
    const { error } = (await create({ rankgate: { ranks: [3, 2] } })).body;
    expect([error.code, error.param]).toEqual(['invalid_request', 'rankgate.ranks']);
    expect((await create({ rankgate: { rnak: 3 } })).status).toBe(400);
  });

  it('goes on from an adapter, as it is now or from a fixed generation', async () => {
    for (const model of ['support', `support@${generationA}`]) {
      const { body } = await create({ model });
      expect(body.model).toBe(model);
      expect(training.jobs.find(body.id, null)!.request.startFrom).toBe(generationA);
    }
    expect(training.jobs.find((await create()).body.id, null)!.request.startFrom).toBeNull();
    harness.registry.create('rival/own', generationB);
    const hidden = await create({ model: 'rival/own', training_file: 'file-acme' }, 'acme-admin');
    expect(hidden.status).toBe(404);
  });

  it('shows how it goes, and what it made', async () => {
    const { id, rankgate } = (await create()).body;
    const claim = training.jobs.claim()!;
    training.jobs.start(claim, 100, 'training has begun');
    training.jobs.progress(claim, progressAt(7));
    const running = (await call('operator', 'GET', `${jobs}/${id}`)).body;
    expect(running).toMatchObject({ status: 'running', trained_tokens: null });
    expect(running.rankgate.progress).toMatchObject({ step: 7, steps: 100, loss: 0.125 });
    const losses = [{ rank: 1, loss: 2 }];
    const generation = `sha256:${'a'.repeat(64)}` as const;
    training.jobs.succeed(claim, { generation, losses, baseLoss: 3, aurac: 0.5 });
    expect((await call('operator', 'GET', `${jobs}/${id}`)).body).toMatchObject({
      status: 'succeeded',
      fine_tuned_model: rankgate.adapter,
      trained_tokens: 70,
      rankgate: { generation, losses, base_loss: 3, aurac: 0.5 },
    });
  });

  it('says why it failed', async () => {
    const { id } = (await create()).body;
    const error = { code: 'INVALID_REQUEST', message: 'training diverged' } as const;
    training.jobs.fail(training.jobs.claim()!, error);
    expect((await call('operator', 'GET', `${jobs}/${id}`)).body).toMatchObject({
      status: 'failed',
      fine_tuned_model: null,
      error: { code: 'invalid_request', message: 'training diverged', param: null },
    });
  });

  it('is cancelled at once, again without harm, and not after its end', async () => {
    const { id } = (await create()).body;
    const claim = training.jobs.claim()!;
    for (let i = 0; i < 2; i++) {
      expect((await call('operator', 'POST', `${jobs}/${id}/cancel`)).body.status).toBe(
        'cancelled',
      );
    }
    expect(training.wakes()).toBe(3);
    expect(training.jobs.isHeld(claim)).toBe(false);
    const other = (await create()).body.id;
    training.jobs.fail(training.jobs.claim()!, { code: 'INTERNAL', message: 'x' });
    expect((await call('operator', 'POST', `${jobs}/${other}/cancel`)).status).toBe(400);
  });

  it('tells its events and checkpoints in pages, the newest first', async () => {
    const { id } = (await create()).body;
    const claim = training.jobs.claim()!;
    for (const step of [1, 2, 3]) training.jobs.checkpoint(claim, `p/${step}`, progressAt(step));
    const events = (await call('operator', 'GET', `${jobs}/${id}/events?limit=3`)).body;
    expect(events.data.map(({ message }: Json) => message)).toEqual([
      'checkpoint at step 3',
      'checkpoint at step 2',
      'checkpoint at step 1',
    ]);
    expect(events.data[0]).toMatchObject({ object: 'fine_tuning.job.event', level: 'info' });
    const rest = `${jobs}/${id}/events?after=${events.last_id}`;
    expect((await call('operator', 'GET', rest)).body).toMatchObject({ has_more: false });
    expect((await call('operator', 'GET', rest)).body.data).toHaveLength(2);
    const checkpoints = (await call('operator', 'GET', `${jobs}/${id}/checkpoints?limit=2`)).body;
    expect(checkpoints.has_more).toBe(true);
    expect(checkpoints.data.map((one: Json) => one.step_number)).toEqual([3, 2]);
    expect(checkpoints.data[0]).toMatchObject({
      object: 'fine_tuning.job.checkpoint',
      fine_tuning_job_id: id,
      fine_tuned_model_checkpoint: null,
      metrics: { step: 3, train_loss: 0.25 },
    });
    for (const query of ['after=x', 'order=asc', 'limit=0']) {
      expect((await call('operator', 'GET', `${jobs}/${id}/events?${query}`)).status).toBe(400);
    }
  });

  it('belongs to its tenant, and so does its adapter', async () => {
    const { body } = await create({ training_file: 'file-acme' }, 'acme-admin');
    expect(body.rankgate.adapter).toMatch(/^acme\/ft\./);
    expect(body.organization_id).toBe('acme');
    for (const path of ['', '/events', '/checkpoints']) {
      const { status, body: refused } = await call(
        'rival-admin',
        'GET',
        `${jobs}/${body.id}${path}`,
      );
      expect([status, refused.error.code]).toEqual([404, 'job_not_found']);
    }
    expect((await call('rival-admin', 'POST', `${jobs}/${body.id}/cancel`)).status).toBe(404);
    expect((await call('rival-admin', 'GET', jobs)).body.data).toEqual([]);
    expect((await call('acme-use', 'POST', jobs, minimal)).status).toBe(403);
    expect((await create({ training_file: 'file-acme' }, 'rival-admin')).status).toBe(404);
    expect((await create({}, 'acme-admin')).status, 'the operator’s file').toBe(404);
    expect((await call('operator', 'GET', jobs)).body.data).toHaveLength(1);
    expect((await call('acme-admin', 'GET', jobs)).body.data).toHaveLength(1);
  });

  it('is not taken while the gateway closes', async () => {
    harness.lifecycle.isDraining = true;
    expect((await create()).status).toBe(503);
  });

  it('is counted by its state', async () => {
    await create();
    await create();
    training.jobs.claim();
    const page = await harness.fetch('GET', '/metrics', {
      headers: { authorization: 'Bearer operator' },
    });
    const text = await page.text();
    expect(text).toContain('rankgate_jobs{state="queued"} 1');
    expect(text).toContain('rankgate_jobs{state="validating_files"} 1');
  });
});
