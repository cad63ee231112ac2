import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { describe, expect, it } from 'vitest';
import { baseModelPath } from '../support/base-model.ts';
import { startGatewayProcess } from '../support/gateway-process.ts';
import { tensorflowDirectory, whyNoTensorflow } from '../support/tensorflow.ts';
import {
  clientOf,
  createJob,
  jobUntil,
  modelPath as tinyModelPath,
} from '../support/training-gateway.ts';

// `--backend tfjs` end to end. The packages lie elsewhere than rankgate's own, so Node is told by NODE_PATH.

const missing = whyNoTensorflow('@tensorflow/tfjs-node');
const nodePath = join(tensorflowDirectory, 'node_modules');

function start(nodePath: string, ...flags: string[]) {
  return baseModelPath().then((modelPath) =>
    startGatewayProcess({
      modelPath,
      flags: ['--backend', 'tfjs', '--threads', '1', ...flags],
      environment: { NODE_PATH: nodePath },
    }),
  );
}

describe('the gateway on TensorFlow.js', () => {
  it('says what to install where it is not there', async () => {
    await expect(start('')).rejects.toThrow(/TensorFlow\.js: .*Install one of them/);
  }, 120_000);

  const title = 'answers what the weights say';
  if (missing !== null) {
    it.skip(`${title} (skipped: ${missing})`, () => undefined);
    it.skip(`trains on it (skipped: ${missing})`, () => undefined);
    return;
  }
  it(title, async () => {
    await using gateway = await start(nodePath);
    const engine = readFileSync(`/proc/${await gateway.enginePid()}/environ`, 'utf8');
    expect(engine.split('\0')).toContain('TF_NUM_INTRAOP_THREADS=1'); // of --threads
    const answer = await gateway.post('/v1/chat/completions', {
      model: gateway.modelName,
      messages: [{ role: 'user', content: 'What is the capital of France?' }],
      temperature: 0,
      max_tokens: 12,
    });
    expect(answer.status).toBe(200);
    const body = (await answer.json()) as {
      choices: Array<{ message: { content: string } }>;
    };
    expect(body.choices[0]!.message.content).toBe('The capital of France is Paris.');
  }, 300_000);

  it('trains on it, beside an engine on ggml', async () => {
    await using gateway = await startGatewayProcess({
      modelPath: tinyModelPath,
      flags: ['--trainer-backend', 'tfjs', '--threads', '1', '--trainer-nice', '0'],
      environment: { NODE_PATH: nodePath },
    });
    const client = clientOf(gateway);
    const { id } = await createJob(gateway, 'tensorflow', { stepsMax: 20 });
    const job = await jobUntil(client, id, ({ status }) => status === 'succeeded');
    expect(job.rankgate.losses!.at(-1)!.loss).toBeLessThan(job.rankgate.base_loss! - 0.5);
    const { data } = await client.fineTuning.jobs.listEvents(id, { limit: 100 });
    expect(data.find(({ message }) => message.startsWith('training has begun'))!.message).toMatch(
      /on @tensorflow\/tfjs-node.*f32$/,
    );
    expect(await client.models.retrieve(job.fine_tuned_model!)).toMatchObject({
      id: job.fine_tuned_model,
    });
  }, 180_000);
});
