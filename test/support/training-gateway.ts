import { readdirSync, readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import OpenAI, { toFile } from 'openai';
import { type GatewayProcess, startGatewayProcess } from './gateway-process.ts';
import type { Json } from './http-harness.ts';

// A real gateway over the tiny model, a file of examples and a job that takes some seconds: what the e2e and the nightly tests
// of training share.

export const modelPath: string = join(import.meta.dirname, '../golden/tiny/tiny-f32.gguf');

export const startTraining = (
  dataDir: string,
  more: readonly string[] = [],
): Promise<GatewayProcess> => {
  const flags = ['--threads', '1', '--adapter-pages', '16', '--kv-cells', '512'];
  return startGatewayProcess({
    modelPath,
    dataDir,
    flags: [...flags, '--trainer-nice', '0', ...more],
  });
};

/** Refreshes as soon as there is enough, by a recipe in YAML. */
export const startRefreshing = (dataDir: string, recipe: string): Promise<GatewayProcess> => {
  const config = join(dataDir, 'rankgate.yaml');
  const enough = 'everyS: 0, freshMin: 16, trainingMin: 16, heldOutMin: 4';
  const gate = 'heldOutShare: 0.3, guardNatsMax: 2';
  writeFileSync(config, `refresh: {${enough}, ${gate}, recipe: ${recipe}}`);
  return startTraining(dataDir, ['--config', config]);
};

export async function jsonOf(
  gateway: GatewayProcess,
  path: string,
  init?: RequestInit,
): Promise<Json> {
  return (await gateway.fetch(path, init)).json();
}

export const clientOf = ({ url }: GatewayProcess): OpenAI =>
  new OpenAI({ baseURL: `${url}/v1`, apiKey: 'unused', maxRetries: 0 });

/** One thing to say, whatever is asked. */
export const answer = 'two blue';
export const examples: string = Array.from({ length: 24 }, (_, i) =>
  JSON.stringify({
    messages: [
      { role: 'user', content: `question ${i}` },
      { role: 'assistant', content: answer },
    ],
  }),
).join('\n');

export interface TrainedJob extends OpenAI.FineTuning.FineTuningJob {
  readonly rankgate: {
    readonly generation: string | null;
    readonly base_loss: number | null;
    readonly losses: readonly { rank: number; loss: number }[] | null;
    readonly progress: { readonly step: number; readonly steps: number } | null;
    readonly attempts: number;
  };
}

/** The same bytes at the end, whatever happens on the way. */
export const recipe: object = {
  rank: 8,
  windowTokens: 128,
  batchWindows: 2,
  accumulation: 1,
  epochs: 30,
  learningRate: 0.01,
  checkpointEvery: 5,
};

export async function createJob(
  gateway: GatewayProcess,
  suffix: string,
  {
    model = gateway.modelName,
    ...more
  }: { model?: string; readonly [option: string]: unknown } = {},
): Promise<TrainedJob> {
  const client = clientOf(gateway);
  const file = await client.files.create({
    file: await toFile(Buffer.from(examples), `${suffix}.jsonl`),
    purpose: 'fine-tune',
  });
  const training = { training_file: file.id, suffix, seed: 5, rankgate: { ...recipe, ...more } };
  const body = { model, ...training };
  return (await client.fineTuning.jobs.create(body)) as TrainedJob;
}

/** Asks until the job is so far. Throws when it ends otherwise. */
export async function jobUntil(
  client: OpenAI,
  id: string,
  isReached: (job: TrainedJob) => boolean,
): Promise<TrainedJob> {
  for (;;) {
    const job = (await client.fineTuning.jobs.retrieve(id)) as TrainedJob;
    if (isReached(job)) return job;
    if (job.finished_at !== null) throw new Error(`${job.status}: ${job.error?.message}`);
    await delay(5);
  }
}

/** Of the gateway's trainer; null while there is none. */
export function trainerPid(gateway: GatewayProcess): number | null {
  const children = readFileSync(`/proc/${gateway.pid}/task/${gateway.pid}/children`, 'utf8');
  const found = children
    .trim()
    .split(' ')
    .filter((pid) => pid !== '')
    .find((pid) => commandOf(pid).includes('trainer-process'));
  return found === undefined ? null : Number(found);
}

function commandOf(pid: string): string {
  try {
    return readFileSync(`/proc/${pid}/cmdline`, 'utf8');
  } catch {
    return ''; // It has just ended.
  }
}

interface KillOptions {
  readonly suffix: string;
  readonly kills: number;
  readonly random: () => number;
  readonly more?: Parameters<typeof createJob>[2];
}

/** Kills a job's trainers at random moments, so many times, and answers what it makes in the end. */
export async function trainWithKills(
  gateway: GatewayProcess,
  { suffix, kills, random, more = {} }: KillOptions,
): Promise<{ job: TrainedJob; killed: number }> {
  const client = clientOf(gateway);
  const { id } = await createJob(gateway, suffix, more);
  let [killed, target] = [0, Math.floor(random() * 10)];
  while (killed < kills) {
    // Only a checkpoint that is further than all before makes the attempts count anew: three in a row end the job.
    const { status, rankgate } = await jobUntil(client, id, (job) => {
      const { attempts, progress } = job.rankgate;
      return job.status === 'succeeded' || (attempts === 0 && (progress?.step ?? 0) >= target);
    });
    if (status === 'succeeded') break;
    await delay(random() * 40);
    const pid = trainerPid(gateway);
    if (pid === null) continue;
    process.kill(pid, 'SIGKILL');
    killed += 1;
    target = (rankgate.progress?.step ?? 0) + 1 + Math.floor(random() * 10);
  }
  const job = await jobUntil(client, id, ({ status }) => status === 'succeeded');
  return { job, killed };
}

const delay = (ms: number): Promise<void> => new Promise((resolve) => setTimeout(resolve, ms));

export const foldersOf = (gateway: GatewayProcess): string[] =>
  readdirSync(join(gateway.dataDir, 'jobs'));
