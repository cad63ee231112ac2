import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { parseRecipe } from '../../src/jobs/recipe.ts';
import { createHarness, type Harness, type Json } from '../support/http-harness.ts';
import { createTestTraining, type TestTraining } from '../support/test-training.ts';

// OpenAI's `method: reinforcement`: its graders as rewards of a run by scores.

let training: TestTraining;
let harness: Harness;
beforeEach(() => {
  training = createTestTraining();
  harness = createHarness({}, training);
  training.db.sql("INSERT INTO files VALUES (1, 'file-1', '', 'f', 1, 1, 'x', 0)").run();
});
afterEach(() => {
  harness.close();
  training[Symbol.dispose]();
});

async function create(method: object, more: object = {}): Promise<{ status: number; body: Json }> {
  const body = JSON.stringify({ model: 'tiny-base', training_file: 'file-1', method, ...more });
  const headers = { 'content-type': 'application/json' };
  const response = await harness.fetch('POST', '/v1/fine_tuning/jobs', { headers, body });
  return { status: response.status, body: await response.json() };
}

const byGrader = (grader: unknown, hyperparameters: object = {}): object => ({
  type: 'reinforcement',
  reinforcement: { grader, hyperparameters },
});
const check = {
  type: 'string_check',
  name: 'right',
  input: '{{sample.output_text}}',
  reference: '{{ item.reference_answer }}',
  operation: 'ilike',
};
const alike = {
  type: 'text_similarity',
  name: 'alike',
  input: '{{ sample.output_text }}',
  reference: '{{item.completion}}',
  evaluation_metric: 'rouge_l',
};
const both = (calculate_output: string): object => ({
  type: 'multi',
  name: 'both',
  graders: { right: check, alike_2: { ...alike, reference: 'Paris' } },
  calculate_output,
});

describe('a fine-tuning job by OpenAI’s graders', () => {
  it.each([
    ['a check', check, { kind: 'check', operation: 'ilike', reference: null }],
    [
      'a similarity',
      { ...alike, reference: 'Paris' },
      { kind: 'similarity', metric: 'rouge_l', reference: 'Paris' },
    ],
    [
      'several',
      both('0.5 * right + alike_2 / 4 + alike_2*0.125'),
      {
        kind: 'weighted',
        parts: [
          { weight: 0.5, reward: { kind: 'check', operation: 'ilike', reference: null } },
          {
            weight: 0.375,
            reward: { kind: 'similarity', metric: 'rouge_l', reference: 'Paris' },
          },
        ],
      },
    ],
  ])('is a run by scores: %s', async (_, grader, reward) => {
    const { status, body } = await create(byGrader(grader));
    expect(status, JSON.stringify(body)).toBe(200);
    const recipe = parseRecipe({ method: { kind: 'eggroll', reward } }, 'recipe');
    expect(body.rankgate.recipe).toEqual(recipe);
    expect(body.method).toEqual({
      type: 'reinforcement',
      reinforcement: {
        grader,
        hyperparameters: { n_epochs: 100, batch_size: 4, learning_rate_multiplier: 1 },
      },
    });
  });

  it('takes the hyperparameters, a batch in prompts', async () => {
    const own = { n_epochs: 2, batch_size: 6, learning_rate_multiplier: 2, eval_interval: 5 };
    const { body } = await create(byGrader(check, own), { seed: 7, rankgate: { rank: 8 } });
    expect(body.rankgate.recipe).toMatchObject({
      ...{ epochs: 2, stepsMax: null, learningRate: 0.1, evaluateEvery: 5, seed: 7, rank: 8 },
      method: { population: 24, groupSize: 4 },
    });
    const { eval_interval: _, ...shown } = own;
    expect(body.hyperparameters).toEqual(shown);
    const auto = byGrader(check, { n_epochs: 'auto', batch_size: 'auto', eval_interval: 'auto' });
    expect((await create(auto)).body.rankgate.recipe).toMatchObject({ epochs: 100, stepsMax: 50 });
  });

  const at = 'method.reinforcement.grader';
  it.each([
    ['no grader', undefined, at],
    ['another grader', { type: 'python', source: 'x' }, `${at}.type`],
    ['a judge', { type: 'score_model', model: 'x', input: [] }, `${at}.type`],
    ['another metric', { ...alike, evaluation_metric: 'bleu' }, `${at}.evaluation_metric`],
    ['another operation', { ...check, operation: 'has' }, `${at}.operation`],
    ['another input', { ...check, input: 'x' }, `${at}.input`],
    ['JSON of the sample', { ...check, input: '{{sample.output_json.x}}' }, `${at}.input`],
    ['another field', { ...check, reference: '{{item.category}}' }, `${at}.reference`],
    ['text around it', { ...check, reference: 'So {{item.completion}}' }, `${at}.reference`],
    ['a long text', { ...check, reference: 'x'.repeat(1025) }, `${at}.reference`],
    ['a threshold', { ...alike, pass_threshold: 0.5 }, `${at}.pass_threshold`],
    ['several in several', { ...both('m'), graders: { m: both('right') } }, `${at}.graders.m.type`],
    ['a function', both('max(right, alike_2)'), `${at}.calculate_output`],
    ['an unknown name', both('right + alike'), `${at}.calculate_output`],
    ['a name of every object', both('right + constructor'), `${at}.calculate_output`],
    ['one without a weight', both('0.5 * right'), `${at}.calculate_output`],
    ['no weight', both('right + 0 * alike_2'), `${at}.calculate_output`],
    ['more than 1', both('right + alike_2'), `${at}.calculate_output`],
    ['a division by 0', both('right + alike_2 / 0'), `${at}.calculate_output`],
  ])('is refused by name: %s', async (_, grader, param) => {
    const { status, body } = await create(byGrader(grader));
    expect([status, body.error.param], JSON.stringify(body)).toEqual([400, param]);
    expect(body.error.message).toContain(param);
    expect(training.jobs.list(null, { after: null, limit: 1, order: 'asc' }).items).toEqual([]);
  });

  it.each([
    ['an unknown hyperparameter', byGrader(check, { reasoning_effort: 'low' }), {}],
    ['another method’s part', { ...byGrader(check), supervised: {} }, {}],
    ['a method of one’s own', byGrader(check), { rankgate: { method: 'gradient' } }],
    ['hyperparameters twice', byGrader(check, { n_epochs: 1 }), { hyperparameters: {} }],
  ])('does not take %s', async (_, method, more) => {
    expect((await create(method, more)).status).toBe(400);
  });
});

it('a reward that a recipe cannot have is refused where it is wrong', () => {
  const recipe = (reward: object) => (): unknown =>
    parseRecipe({ method: { kind: 'eggroll', reward } }, 'rankgate');
  expect(recipe({ kind: 'similarity', metric: 'bleu' })).toThrow('rankgate.method.reward.metric: ');
  expect(recipe({ kind: 'judge' })).toThrow('rankgate.method.reward.question: ');
  expect(recipe({ kind: 'feedback' })).toThrow('rankgate.method.reward.kind: ');
  const part = { weight: 0.6, reward: { kind: 'json' } };
  expect(recipe({ kind: 'weighted', parts: [part, part] })).toThrow('add up to more than 1');
  const judge = { weight: 0.2, reward: { kind: 'judge', question: 'Well?' } };
  expect(recipe({ kind: 'weighted', parts: [judge, judge] })).toThrow('more than one judge');
  expect(() => parseRecipe({ learningRate: 11 }, 'rankgate')).toThrow('rankgate.learningRate: ');
});
