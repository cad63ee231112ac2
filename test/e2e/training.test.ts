import { existsSync, mkdtempSync, readdirSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import OpenAI, { toFile } from 'openai';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import type { GatewayProcess } from '../support/gateway-process.ts';
import { createRng } from '../support/random.ts';
import { runAsScript } from '../support/run-command.ts';
import {
  answer,
  clientOf,
  createJob,
  examples,
  foldersOf,
  jobUntil,
  recipe,
  startTraining,
  type TrainedJob,
  trainerPid,
  trainWithKills,
} from '../support/training-gateway.ts';

// OpenAI's own client against the built gateway over the tiny model: from a file to an answer of the adapter that was trained
// on it; and the same bytes of that adapter after kill -9 of trainers and gateways.

let dataDir: string;
let gateway: GatewayProcess;
let first: TrainedJob;

beforeAll(async () => {
  dataDir = mkdtempSync(join(tmpdir(), 'rankgate-training-'));
  gateway = await startTraining(dataDir);
}, 180_000);
afterAll(async () => {
  await gateway[Symbol.asyncDispose]();
  rmSync(dataDir, { recursive: true, force: true });
});

const say = async (model: string): Promise<string> => {
  const completion = await clientOf(gateway).chat.completions.create({
    model,
    messages: [{ role: 'user', content: 'question 3' }],
    temperature: 0,
    max_tokens: 12,
  });
  return completion.choices[0]!.message.content!;
};

describe('training, from a file to an answer', () => {
  it('is driven by OpenAI’s client alone', async () => {
    const client = clientOf(gateway);
    const { id } = await createJob(gateway, 'first');
    first = await jobUntil(client, id, ({ status }) => status === 'succeeded');
    expect(first.fine_tuned_model).toMatch(/^ft\..+\.first\.[a-z0-9]+$/);
    expect(first.trained_tokens).toBeGreaterThan(0);
    const { base_loss: base, losses } = first.rankgate;
    expect(losses!.at(-1)!.loss).toBeLessThan(base! / 2);
    const events = [];
    for await (const event of client.fineTuning.jobs.listEvents(id, { limit: 5 }))
      events.push(event);
    expect(events.at(-1)!.message).toContain('waits for a trainer');
    expect(events[0]!.message).toContain('can be asked for');
    expect(events.some(({ type }) => type === 'metrics')).toBe(true);
    const checkpoints = await client.fineTuning.jobs.checkpoints.list(id);
    expect(checkpoints.data.length).toBeGreaterThan(1);
    const listed = [];
    for await (const job of client.fineTuning.jobs.list({ limit: 1 })) listed.push(job.id);
    expect(listed).toEqual([id]);
    expect(await say(first.fine_tuned_model!)).toContain(answer);
    expect(await say(gateway.modelName)).not.toContain(answer);
    expect((await client.models.retrieve(first.fine_tuned_model!)).id).toBe(first.fine_tuned_model);
    expect(readdirSync(join(dataDir, 'uploads'))).toEqual([]);
    await expect.poll(() => foldersOf(gateway)).toEqual([]);
  }, 120_000);

  it('goes on from an adapter', async () => {
    const from = { model: first.fine_tuned_model!, stepsMax: 1 };
    const { id } = await createJob(gateway, 'further', from);
    const job = await jobUntil(clientOf(gateway), id, ({ status }) => status === 'succeeded');
    // One step from the base would be far from what a hundred reached.
    const [before, after] = [first, job].map(({ rankgate }) => rankgate.losses!.at(-1)!.loss);
    expect(after).toBeLessThan(2 * before! + 0.1);
  });

  it('by scores is what OpenAI’s client calls reinforcement', async () => {
    const client = clientOf(gateway);
    const prompts = Array.from({ length: 8 }, (_, i) => {
      const messages = [{ role: 'user', content: `question ${i}` }];
      return JSON.stringify({ messages, reference_answer: answer });
    });
    const file = await client.files.create({
      file: await toFile(Buffer.from(prompts.join('\n')), 'prompts.jsonl'),
      purpose: 'fine-tune',
    });
    const grader = {
      type: 'text_similarity',
      name: 'alike',
      input: '{{sample.output_text}}',
      reference: '{{item.reference_answer}}',
      evaluation_metric: 'fuzzy_match',
    } as const;
    const hyperparameters = { n_epochs: 3, batch_size: 4 };
    const { id } = await client.fineTuning.jobs.create({
      ...{ model: gateway.modelName, training_file: file.id, suffix: 'scored', seed: 5 },
      method: { type: 'reinforcement', reinforcement: { grader, hyperparameters } },
    });
    const job = await jobUntil(client, id, ({ status }) => status === 'succeeded');
    expect(job.method).toMatchObject({ reinforcement: { grader, hyperparameters } });
    expect(job.rankgate.progress).toMatchObject({ step: 6, steps: 6 }); // 8 prompts less one held out
    const { losses, base_loss: base } = job.rankgate;
    for (const loss of [base, ...losses!.map((one) => one.loss)]) {
      expect(loss).toBeGreaterThan(0); // what answers lack of the full score
      expect(loss).toBeLessThanOrEqual(1);
    }
    expect((await client.models.retrieve(job.fine_tuned_model!)).id).toBe(job.fine_tuned_model);
  }, 120_000);

  it('is followed by the command line to its model', async () => {
    const [file, recipeFile] = [join(dataDir, 'talk.jsonl'), join(dataDir, 'recipe.json')];
    writeFileSync(file, examples);
    writeFileSync(recipeFile, JSON.stringify({ ...recipe, stepsMax: 3 }));
    const { exitCode, out, err } = await runAsScript(
      ['train', file, '--suffix', 'cli', '--recipe', recipeFile],
      { RANKGATE_URL: gateway.url },
    );
    expect(exitCode, err).toBe(0);
    expect(err).toContain('training has begun: 3 steps');
    const model = out.trim().split('\n').at(-1)!;
    expect(model).toMatch(/^ft\..+\.cli\.[a-z0-9]+$/);
    expect((await clientOf(gateway).models.retrieve(model)).id).toBe(model);
  });

  it('refuses a file with its wrong lines', async () => {
    const file = await toFile(Buffer.from('{"prompt":1}\n'), 'bad.jsonl');
    const error: unknown = await clientOf(gateway)
      .files.create({ file, purpose: 'fine-tune' })
      .catch((thrown: unknown) => thrown);
    expect(error).toBeInstanceOf(OpenAI.UnprocessableEntityError);
    expect((error as { error: { lines: unknown } }).error.lines).toMatchObject([{ line: 1 }]);
  });

  it('makes the same bytes when its trainers are killed', async () => {
    const random = createRng(11);
    const { job, killed } = await trainWithKills(gateway, {
      suffix: 'killed',
      kills: 3,
      random: random.next,
    });
    expect(killed).toBe(3);
    expect(job.rankgate.generation).toBe(first.rankgate.generation);
  }, 180_000);

  it('goes on after kill -9 of the gateway, to the same bytes', async () => {
    const { id } = await createJob(gateway, 'crashed');
    const client = clientOf(gateway);
    await jobUntil(client, id, ({ rankgate }) => (rankgate.progress?.step ?? 0) >= 5);
    const pid = trainerPid(gateway)!;
    const half = sendHalfAFile(gateway);
    await expect.poll(() => readdirSync(join(dataDir, 'uploads'))).toHaveLength(1);
    const files = readdirSync(join(dataDir, 'files'));
    await gateway.stop('SIGKILL');
    await half;
    // The trainer ends by itself: nobody is left to hear it.
    await expect.poll(() => isAlive(pid), { timeout: 10_000 }).toBe(false);
    gateway = await startTraining(dataDir);
    expect(existsSync(join(dataDir, 'uploads'))).toBe(false);
    expect(readdirSync(join(dataDir, 'files'))).toEqual(files);
    const { rankgate } = await jobUntil(
      clientOf(gateway),
      id,
      ({ status }) => status === 'succeeded',
    );
    expect(rankgate.generation).toBe(first.rankgate.generation);
    await expect.poll(() => foldersOf(gateway)).toEqual([]);
  }, 180_000);

  it('takes even a trainer with it that sleeps when the gateway is killed', async () => {
    const { id } = await createJob(gateway, 'slept');
    const sinceStep5 = ({ rankgate }: TrainedJob): boolean => (rankgate.progress?.step ?? 0) >= 5;
    await jobUntil(clientOf(gateway), id, sinceStep5);
    const pid = trainerPid(gateway)!;
    process.kill(pid, 'SIGSTOP'); // It does not see its channel close.
    await gateway.stop('SIGKILL');
    await expect.poll(() => isAlive(pid), { timeout: 10_000 }).toBe(false);
    gateway = await startTraining(dataDir);
    const job = await jobUntil(clientOf(gateway), id, ({ status }) => status === 'succeeded');
    expect(job.rankgate.generation).toBe(first.rankgate.generation);
    expect(await say(job.fine_tuned_model!)).toContain(answer);
  }, 180_000);

  it('is given back by a gateway that closes, and goes on where it was', async () => {
    const { id } = await createJob(gateway, 'closed');
    await jobUntil(clientOf(gateway), id, ({ rankgate }) => (rankgate.progress?.step ?? 0) >= 5);
    expect(await gateway.stop('SIGTERM')).toBe(0);
    gateway = await startTraining(dataDir);
    const client = clientOf(gateway);
    const job = await jobUntil(client, id, ({ status }) => status === 'succeeded');
    expect(job.rankgate.generation).toBe(first.rankgate.generation);
    expect(job.rankgate.attempts).toBe(0);
    const { data } = await client.fineTuning.jobs.listEvents(id, { limit: 100 });
    expect(data.map(({ message }) => message)).toContain(
      'the gateway closes: the job goes on when it is there again',
    );
  }, 180_000);

  it('can be cancelled, and leaves nothing', async () => {
    const client = clientOf(gateway);
    const { id } = await createJob(gateway, 'cancelled');
    await jobUntil(client, id, ({ rankgate }) => (rankgate.progress?.step ?? 0) >= 5);
    expect((await client.fineTuning.jobs.cancel(id)).status).toBe('cancelled');
    await expect.poll(() => trainerPid(gateway)).toBeNull();
    await expect.poll(() => foldersOf(gateway)).toEqual([]);
    const names = (await client.models.list()).data.map((model) => model.id);
    expect(names.filter((name) => name.includes('cancelled'))).toEqual([]);
  }, 60_000);
});

async function sendHalfAFile(to: GatewayProcess): Promise<void> {
  const body = new ReadableStream({
    start(controller) {
      const head = 'Content-Disposition: form-data; name="file"; filename="half.jsonl"';
      controller.enqueue(new TextEncoder().encode(`--x\r\n${head}\r\n\r\n{"prompt":`));
    },
  });
  const headers = { 'content-type': 'multipart/form-data; boundary=x' };
  const init = { method: 'POST', duplex: 'half', headers, body } as RequestInit;
  await to.fetch('/v1/files', init).catch(() => null);
}

function isAlive(pid: number): boolean {
  try {
    process.kill(pid, 0);
    return true;
  } catch {
    return false;
  }
}
