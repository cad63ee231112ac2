import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, beforeAll, expect, it } from 'vitest';
import type { GatewayProcess } from '../support/gateway-process.ts';
import {
  answer,
  clientOf,
  createJob,
  jobUntil,
  startTraining,
  type TrainedJob,
} from '../support/training-gateway.ts';

// Kinds that are more than a low-rank pair while they are trained, from a file to an answer, by OpenAI's client against the built
// gateway: flexmore's experts; queryable with a bank of its own, over another adapter's, and with more atoms for it.

let dataDir: string;
let gateway: GatewayProcess;
beforeAll(async () => {
  dataDir = mkdtempSync(join(tmpdir(), 'rankgate-families-'));
  gateway = await startTraining(dataDir);
}, 180_000);
afterAll(async () => {
  await gateway[Symbol.asyncDispose]();
  rmSync(dataDir, { recursive: true, force: true });
});

async function train(suffix: string, more: object): Promise<TrainedJob> {
  const { id } = await createJob(gateway, suffix, { ...more });
  return jobUntil(clientOf(gateway), id, ({ status }) => status === 'succeeded');
}

async function say(model: string, more: object = {}): Promise<string> {
  const { choices } = await clientOf(gateway).chat.completions.create({
    ...{ model, temperature: 0, max_tokens: 12, ...more },
    messages: [{ role: 'user', content: 'question 3' }],
  });
  return choices[0]!.message.content!;
}

it('experts of different rank are trained with their weights', async () => {
  const experts = [2, 6].map((rank) => ({ name: `of ${rank}`, rank }));
  const job = await train('experts', { kind: 'flexmore', experts });
  const { losses, base_loss: before } = job.rankgate;
  expect(losses!.map(({ rank }) => rank)).toEqual([1, 2, 4, 8]);
  expect(losses!.at(-1)!.loss).toBeLessThan(before! / 2);
  expect(await say(job.fine_tuned_model!)).toContain(answer);
}, 120_000);

it('a bank is trained, shared and grown', async () => {
  const bank = { atoms: 4, queryWidth: 6, blockLayers: 1, labels: ['law', 'code', 'song', 'talk'] };
  const first = await train('bank', { kind: 'queryable', bank });
  expect(first.rankgate.losses!.map(({ rank }) => rank)).toEqual([8]);
  expect(first.rankgate.losses![0]!.loss).toBeLessThan(first.rankgate.base_loss! / 2);
  const model = first.fine_tuned_model!;
  expect(await say(model)).toContain(answer);
  expect(await say(model, { instruction_prior: 'song', prior_strength: 1 })).not.toBe('');

  const tenant = await train('tenant', { model, kind: 'queryable', bank: {}, stepsMax: 2 });
  expect(tenant.rankgate.losses![0]!.loss).toBeLessThan(2 * first.rankgate.losses![0]!.loss + 0.1);
  // Over one bank, so side by side.
  const both = [model, tenant.fine_tuned_model!].map((name) => say(name));
  for (const said of await Promise.all(both)) expect(said).toContain(answer);

  const grown = await train('grown', {
    ...{ model, kind: 'queryable', bank: { atoms: 6 }, stepsMax: 4 },
  });
  // A bank that has grown serves what was made before.
  const all = [...both, say(grown.fine_tuned_model!), say(model)];
  for (const said of await Promise.all(all)) expect(said).toContain(answer);
}, 240_000);

it('what goes on from an adapter must fit it', async () => {
  const experts = [{ name: 'one', rank: 8 }];
  const pair = await train('pair', { kind: 'lora', stepsMax: 1 });
  const { id } = await createJob(gateway, 'wrong', {
    ...{ model: pair.fine_tuned_model!, kind: 'queryable', stepsMax: 1 },
  });
  await expect(jobUntil(clientOf(gateway), id, () => false)).rejects.toThrow('a lora has no atoms');
  const again = await createJob(gateway, 'anew', {
    ...{ model: pair.fine_tuned_model!, kind: 'flexmore', experts, stepsMax: 1 },
  });
  await expect(jobUntil(clientOf(gateway), again.id, () => false)).rejects.toThrow(
    'a flexmore begins anew',
  );
}, 60_000);
