// `rankgate train` and `rankgate jobs`: a file is sent, a job is made of it, and followed to its end. ^C ends the following,
// never the job.

import { openAsBlob } from 'node:fs';
import { readFile, stat } from 'node:fs/promises';
import { basename } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import {
  type Command,
  clientCommand,
  clientOf,
  type Invocation,
  json,
  numberOf,
  text,
  uploadProgress,
  usageError,
} from './adapter-commands.ts';
import { type Call, CommandError } from './gateway-client.ts';
import { renderBar, sparkline } from './terminal.ts';

/** What is read of the server's answers. */
interface JobView {
  readonly id: string;
  readonly status: string;
  readonly fine_tuned_model: string | null;
  readonly error: { readonly code: string; readonly message: string } | null;
  readonly rankgate: {
    readonly adapter: string;
    readonly progress: {
      readonly step: number;
      readonly steps: number;
      readonly loss: number | null;
    } | null;
    readonly losses: readonly { readonly rank: number; readonly loss: number }[] | null;
    readonly base_loss: number | null;
    readonly aurac: number | null;
  };
}

interface EventView {
  readonly id: string;
  readonly type: string;
  readonly level: string;
  readonly message: string;
  readonly data: { readonly train_loss?: number } | null;
}

type Send = (call: Call) => Promise<Response>;

const pollMs = 1000;
const files = '/v1/files';
const jobs = '/v1/fine_tuning/jobs';
const hasEnded = ({ status }: JobView): boolean =>
  ['succeeded', 'failed', 'cancelled'].includes(status);
const jsonOf = async <T>(answer: Promise<Response>): Promise<T> =>
  (await (await answer).json()) as T;

const trainFlags = {
  ...json,
  url: { type: 'string' },
  model: { type: 'string' },
  suffix: { type: 'string' },
  validation: { type: 'string' },
  epochs: { type: 'string' },
  'batch-size': { type: 'string' },
  'learning-rate': { type: 'string' },
  seed: { type: 'string' },
  kind: { type: 'string' },
  rank: { type: 'string' },
  objective: { type: 'string' },
  recipe: { type: 'string' },
} as const;

async function train(invocation: Invocation): Promise<void> {
  const { flags, terminal, positionals } = invocation;
  const recipe = await recipeOf(invocation);
  const send = clientOf(invocation);
  const trainingFile = await sendFile(invocation, send, positionals[0]!);
  const validation = text(flags.validation);
  const validationFile =
    validation === undefined ? undefined : await sendFile(invocation, send, validation);
  const [epochs, batchSize] = [
    numberOf(flags.epochs, '--epochs'),
    numberOf(flags['batch-size'], '--batch-size'),
  ];
  const body = {
    model: text(flags.model) ?? (await baseModel(send)),
    training_file: trainingFile,
    validation_file: validationFile,
    suffix: text(flags.suffix),
    seed: numberOf(flags.seed, '--seed'),
    hyperparameters: { n_epochs: epochs, batch_size: batchSize },
    rankgate: recipe,
  };
  const job = await jsonOf<JobView>(send({ method: 'POST', path: jobs, body }));
  if (!flags.json) terminal.err(`${job.id} will make ${job.rankgate.adapter}\n`);
  await follow(invocation, send, job);
}

/** The recipe's file, and over it what flags say. */
async function recipeOf({ flags }: Invocation): Promise<object> {
  const path = text(flags.recipe);
  const given =
    path === undefined ? {} : parseObject(await readFile(path, 'utf8').catch(unreadable(path)));
  return {
    ...given,
    ...defined({
      kind: text(flags.kind),
      rank: numberOf(flags.rank, '--rank'),
      objective: text(flags.objective),
      learningRate: numberOf(flags['learning-rate'], '--learning-rate'),
    }),
  };
}

const defined = (values: Readonly<Record<string, unknown>>): object =>
  Object.fromEntries(Object.entries(values).filter(([, value]) => value !== undefined));

function parseObject(source: string): object {
  try {
    const value: unknown = JSON.parse(source);
    if (typeof value === 'object' && value !== null && !Array.isArray(value)) return value;
  } catch {
    // As below.
  }
  throw usageError('--recipe: no JSON object');
}

const unreadable =
  (path: string) =>
  (error: NodeJS.ErrnoException): never => {
    throw new CommandError(1, 'FILE_NOT_FOUND', `${path} cannot be read (${error.code})`);
  };

async function sendFile(invocation: Invocation, send: Send, path: string): Promise<string> {
  const { size } = await stat(path).catch(unreadable(path));
  const body = new FormData();
  body.set('purpose', 'fine-tune');
  body.set('file', await openAsBlob(path), basename(path));
  const progress = uploadProgress(invocation, basename(path), size);
  const answer = send({ method: 'POST', path: files, body, ...progress });
  return (await jsonOf<{ id: string }>(answer)).id;
}

async function baseModel(send: Send): Promise<string> {
  const answer = send({ method: 'GET', path: '/v1/models' });
  const { data } = await jsonOf<{ data: { id: string; parent: string | null }[] }>(answer);
  return data.find(({ parent }) => parent === null)!.id;
}

async function follow(invocation: Invocation, send: Send, created: JobView): Promise<void> {
  const { flags, terminal } = invocation;
  const controller = new AbortController();
  const stop = (): void => controller.abort();
  process.once('SIGINT', stop);
  const show = flags.json ? () => {} : createFollower(terminal, () => performance.now());
  try {
    const path = `${jobs}/${created.id}`;
    for (;;) {
      const job = await jsonOf<JobView>(send({ method: 'GET', path }));
      const answer = send({ method: 'GET', path: `${path}/events?limit=100` });
      show(job, (await jsonOf<{ data: EventView[] }>(answer)).data);
      if (hasEnded(job)) return conclude(job, invocation);
      await sleep(pollMs, undefined, { signal: controller.signal });
    }
  } catch (error) {
    if (!controller.signal.aborted) throw error;
    terminal.err(`\n${created.id} goes on. rankgate jobs show|cancel ${created.id}\n`);
  } finally {
    process.off('SIGINT', stop);
  }
}

/** Draws one line on a terminal; writes messages, and a line a tenth, into a log. */
export function createFollower(
  { err, isTerminal }: Invocation['terminal'],
  nowMs: () => number,
): (job: JobView, events: readonly EventView[]) => void {
  const seen = new Set<string>();
  const losses: number[] = [];
  let first: { readonly step: number; readonly ms: number } | null = null;
  let stage = '';
  return (job, events) => {
    const fresh = [...events].reverse().filter(({ id }) => !seen.has(id));
    for (const event of fresh) {
      seen.add(event.id);
      if (event.type === 'message') err(`${isTerminal ? '\r\u001b[K' : ''}${event.message}\n`);
      const loss = event.data?.train_loss;
      if (typeof loss === 'number') losses.push(loss);
    }
    const { progress } = job.rankgate;
    if (progress === null || progress.steps === 0 || hasEnded(job)) return;
    const { step, steps, loss } = progress;
    first ??= { step, ms: nowMs() };
    const share = step / steps;
    const now = `${Math.floor(share * (isTerminal ? 1000 : 10))}`;
    if (now === stage) return;
    stage = now;
    const msPerStep = step > first.step ? (nowMs() - first.ms) / (step - first.step) : null;
    const left = msPerStep === null ? '' : `  ${timeText((steps - step) * msPerStep)} left`;
    const curve = loss === null ? '' : `  loss ${loss.toFixed(4)} ${sparkline(losses)}`;
    const line = `${renderBar(share)} step ${step} of ${steps}${curve}${left}`;
    err(isTerminal ? `\r\u001b[K${line}` : `${line}\n`);
  };
}

export function timeText(ms: number): string {
  const seconds = Math.round(ms / 1000);
  if (seconds < 60) return `${seconds} s`;
  const minutes = Math.floor(seconds / 60);
  return minutes < 60
    ? `${minutes} min ${seconds % 60} s`
    : `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}

function conclude(job: JobView, { flags, terminal }: Invocation): void {
  if (job.status !== 'succeeded') {
    const { code = job.status, message = `the job was ${job.status}` } = job.error ?? {};
    throw new CommandError(1, code.toUpperCase(), message);
  }
  if (flags.json) terminal.out(`${JSON.stringify(job)}\n`);
  else terminal.out(summaryOf(job));
}

function summaryOf({ fine_tuned_model: model, rankgate }: JobView): string {
  const { losses, base_loss: base, aurac } = rankgate;
  const curve = (losses ?? []).map(({ rank, loss }) => `  rank ${rank}: ${loss.toFixed(4)}\n`);
  const held = base === null ? '' : `held-out loss, base ${base.toFixed(4)}\n${curve.join('')}`;
  return `${held}${aurac === null ? '' : `AURAC ${aurac.toFixed(4)}\n`}${model}\n`;
}

function lineOf({ id, status, rankgate }: JobView): string {
  const { progress, adapter } = rankgate;
  const step = progress === null ? '' : `  step ${progress.step} of ${progress.steps}`;
  return `${id}  ${status}${step}  ${adapter}\n`;
}

async function showJobs(answer: Response, { flags, terminal }: Invocation): Promise<void> {
  const body = (await answer.json()) as JobView | { readonly data: readonly JobView[] };
  if (flags.json) terminal.out(`${JSON.stringify(body)}\n`);
  else for (const job of 'data' in body ? body.data : [body]) terminal.out(lineOf(job));
}

const jobPath = ({ positionals }: Invocation): string =>
  `${jobs}/${encodeURIComponent(positionals[0]!)}`;

export const trainCommands: Readonly<Record<string, Command>> = {
  train: { flags: trainFlags, positionals: ['FILE'], run: train },
  'jobs list': clientCommand(
    [],
    { after: { type: 'string' } },
    ({ flags }) => {
      const after = text(flags.after);
      const query = after === undefined ? '' : `?after=${encodeURIComponent(after)}`;
      return { method: 'GET', path: `${jobs}${query}` };
    },
    showJobs,
  ),
  'jobs show': clientCommand(
    ['ID'],
    {},
    (invocation) => ({ method: 'GET', path: jobPath(invocation) }),
    showJobs,
  ),
  'jobs cancel': clientCommand(
    ['ID'],
    {},
    (invocation) => ({ method: 'POST', path: `${jobPath(invocation)}/cancel` }),
    showJobs,
  ),
};
