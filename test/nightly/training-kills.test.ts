import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, beforeAll, expect, it } from 'vitest';
import type { GatewayProcess } from '../support/gateway-process.ts';
import { createRng } from '../support/random.ts';
import {
  clientOf,
  createJob,
  jobUntil,
  startTraining,
  trainWithKills,
} from '../support/training-gateway.ts';

// faults.md S2: a hundred kill -9 of trainers at random moments. Every job ends with the bytes of one that nobody killed.

const kills = 100;
let dataDir: string;
let gateway: GatewayProcess;
beforeAll(async () => {
  dataDir = mkdtempSync(join(tmpdir(), 'rankgate-kills-'));
  gateway = await startTraining(dataDir);
}, 180_000);
afterAll(async () => {
  await gateway[Symbol.asyncDispose]();
  rmSync(dataDir, { recursive: true, force: true });
});

it('a hundred deaths change no byte', async () => {
  const { id } = await createJob(gateway, 'undisturbed');
  const whole = await jobUntil(clientOf(gateway), id, ({ status }) => status === 'succeeded');
  const random = createRng(2026);
  for (let killed = 0; killed < kills; ) {
    const run = await trainWithKills(gateway, {
      suffix: `after-${killed}`,
      kills: Math.min(5, kills - killed),
      random: random.next,
    });
    expect(run.job.rankgate.generation).toBe(whole.rankgate.generation);
    killed += run.killed;
  }
}, 3_600_000);
