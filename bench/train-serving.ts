// What answers notice of a training job, and what the job gives up: the whole gateway over HTTP, streams that are asked for
// again when they end, and in turns no job at all and one that trains. Each round also has seconds in which the job is alone.

import { setTimeout as sleep } from 'node:timers/promises';
import { type GatewayProcess, startGatewayProcess } from '../test/support/gateway-process.ts';
import { readTokens } from '../test/support/idle-oracle.ts';
import type { WeightMode } from './job.ts';
import { median, quantile, round, type Series, seriesOf } from './measure.ts';
import { takeTokens } from './prompts.ts';

export interface ServingSizes {
  readonly streams: number;
  readonly promptTokens: number;
  readonly newTokens: number;
  readonly seconds: number;
  /** Of the job alone. */
  readonly idleSeconds: number;
  /** Of the job: parts of its recipe. */
  readonly recipe: Readonly<Record<string, unknown>>;
}

export interface Gap {
  /** Since the phase began. */
  readonly atMs: number;
  readonly ms: number;
}

export interface ServingPhase {
  readonly gaps: readonly Gap[];
  readonly ttftMs: readonly number[];
  readonly tokens: number;
  readonly ms: number;
}

export interface ServingRound {
  readonly alone: ServingPhase;
  readonly beside: ServingPhase;
  /** Tokens per second that the job learns from beside streams, and without any. */
  readonly trainedBeside: number;
  readonly trainedIdle: number;
}

export interface ServingSettings {
  readonly modelPath: string;
  readonly threads: number;
  readonly weights: WeightMode;
}

/** The supervisor looks at the engine once a second: after two, a job has heard of streams that began. */
const settledMs = 2000;
const pollMs = 100;

export async function measureServing(
  { modelPath, threads, weights }: ServingSettings,
  rounds: number,
  { sizes, trainingText }: { readonly sizes: ServingSizes; readonly trainingText: string },
): Promise<ServingRound[]> {
  await using gateway = await startGatewayProcess({
    modelPath,
    flags: [
      ...['--threads', String(threads), '--weights', weights, '--log', 'none'],
      ...['--adapter-pages', '16', '--speculation', 'off'],
    ],
  });
  const file = await sendFile(gateway, trainingText);
  await serve(gateway, sizes, Math.min(2, sizes.seconds)); // pages touched, kernels chosen
  const measured: ServingRound[] = [];
  for (let index = 0; index < rounds; index++) {
    const beginsAlone = index % 2 === 0; // slow drift falls on both
    const first = beginsAlone ? await serve(gateway, sizes, sizes.seconds) : null;
    const trained = await withJob(gateway, file, sizes);
    measured.push({ alone: first ?? (await serve(gateway, sizes, sizes.seconds)), ...trained });
  }
  return measured;
}

interface JobView {
  readonly id: string;
  readonly status: string;
  readonly error: { readonly message: string } | null;
  readonly rankgate: { readonly progress: { readonly tokens: number } | null };
}

async function sendFile(gateway: GatewayProcess, text: string): Promise<string> {
  const body = new FormData();
  body.set('purpose', 'fine-tune');
  body.set('file', new Blob([text]), 'training.jsonl');
  const answer = await gateway.fetch('/v1/files', { method: 'POST', body });
  return (await jsonOf<{ id: string }>(answer)).id;
}

async function jsonOf<T>(answer: Response): Promise<T> {
  if (!answer.ok) throw new Error(`${answer.status}: ${await answer.text()}`);
  return (await answer.json()) as T;
}

async function withJob(
  gateway: GatewayProcess,
  file: string,
  sizes: ServingSizes,
): Promise<Omit<ServingRound, 'alone'>> {
  const jobs = '/v1/fine_tuning/jobs';
  const request = { model: gateway.modelName, training_file: file, rankgate: sizes.recipe };
  const { id } = await jsonOf<JobView>(await gateway.post(jobs, request));
  const view = async (): Promise<JobView> => jsonOf(await gateway.fetch(`${jobs}/${id}`));
  const until = async (isReached: (job: JobView) => boolean): Promise<void> => {
    for (;;) {
      const job = await view();
      if (isReached(job)) return;
      if (job.error !== null) throw new Error(`the job ended: ${job.error.message}`);
      await sleep(pollMs);
    }
  };
  /** While `work` goes on. */
  const trainedIn = async <T>(work: () => Promise<T>): Promise<readonly [T, number]> => {
    const startMs = performance.now();
    const before = tokensOf(await view());
    const made = await work();
    const tokens = tokensOf(await view()) - before;
    return [made, (1000 * tokens) / (performance.now() - startMs)];
  };
  await until((job) => tokensOf(job) > 0);
  const [beside, trainedBeside] = await trainedIn(() => serve(gateway, sizes, sizes.seconds));
  // A rest that began under a low share ends at the supervisor's next look.
  await sleep(Math.min(settledMs, 1000 * sizes.seconds));
  const [, trainedIdle] = await trainedIn(() => sleep(1000 * sizes.idleSeconds));
  const { status } = await view();
  if (status !== 'running') throw new Error(`the job is ${status}: nothing trained at the end`);
  await jsonOf(await gateway.post(`${jobs}/${id}/cancel`, {}));
  await until((job) => job.status === 'cancelled');
  await sleep(1000); // its process is killed, and its memory given back
  return { beside, trainedBeside, trainedIdle };
}

const tokensOf = ({ rankgate }: JobView): number => rankgate.progress?.tokens ?? 0;

async function serve(
  gateway: GatewayProcess,
  { streams, promptTokens, newTokens }: ServingSizes,
  seconds: number,
): Promise<ServingPhase> {
  const startMs = performance.now();
  const isOver = (): boolean => performance.now() - startMs > 1000 * seconds;
  const gaps: Gap[] = [];
  const ttftMs: number[] = [];
  let tokens = 0;
  const stream = async (index: number): Promise<void> => {
    for (let i = 0; !isOver(); i++) {
      const sentMs = performance.now();
      let lastMs: number | null = null;
      const onChunk = (): void => {
        const nowMs = performance.now();
        if (lastMs === null) ttftMs.push(nowMs - sentMs);
        else gaps.push({ atMs: nowMs - startMs, ms: nowMs - lastMs });
        lastMs = nowMs;
        tokens += 1;
      };
      const response = await gateway.post('/v1/completions', {
        ...{ model: gateway.modelName, prompt: takeTokens(promptTokens, 31 * index + 7 * i) },
        ...{ stream: true, temperature: 0, max_tokens: newTokens, logprobs: 1 },
      });
      if (response.status !== 200) throw new Error(`${response.status}: ${await response.text()}`);
      await readTokens(response, 1, null, onChunk);
    }
  };
  await Promise.all(Array.from({ length: streams }, (_, index) => stream(index)));
  return { gaps, ttftMs, tokens, ms: performance.now() - startMs };
}

export function summariseServing(rounds: readonly ServingRound[]): {
  readonly figures: Readonly<Record<string, number>>;
  readonly series: Readonly<Record<string, Series>>;
} {
  const of = (side: 'alone' | 'beside', figure: (phase: ServingPhase) => number): number[] =>
    rounds.map((one) => figure(one[side]));
  const gapsOf = ({ gaps }: ServingPhase): number[] => gaps.map(({ ms }) => ms);
  const p99 = (phase: ServingPhase): number => quantile(gapsOf(phase), 0.99);
  const p50 = (phase: ServingPhase): number => median(gapsOf(phase));
  const settled = (phase: ServingPhase): number => {
    const late = phase.gaps.filter(({ atMs }) => atMs >= settledMs);
    return quantile(late.length === 0 ? gapsOf(phase) : late.map(({ ms }) => ms), 0.99);
  };
  const speed = ({ tokens, ms }: ServingPhase): number => (1000 * tokens) / ms;
  const ratio = (figure: (phase: ServingPhase) => number): number =>
    round(median(of('beside', figure)) / median(of('alone', figure)));
  const trained = {
    beside: median(rounds.map(({ trainedBeside }) => trainedBeside)),
    idle: median(rounds.map(({ trainedIdle }) => trainedIdle)),
  };
  if (trained.idle === 0) throw new Error('the job learnt nothing while it was alone');
  return {
    figures: {
      serving_p99_ratio: ratio(p99),
      serving_p99_ratio_settled: ratio(settled),
      serving_p50_ratio: ratio(p50),
      serving_ttft_p50_ratio: ratio(({ ttftMs }) => median(ttftMs)),
      serving_tokens_ratio: ratio(speed),
      training_share_kept: round(trained.beside / trained.idle),
    },
    series: {
      gap_p99_alone: seriesOf('ms', of('alone', p99)),
      gap_p99_beside: seriesOf('ms', of('beside', p99)),
      served_alone: seriesOf('tokens/s', of('alone', speed)),
      served_beside: seriesOf('tokens/s', of('beside', speed)),
      trained_beside: seriesOf(
        'tokens/s',
        rounds.map(({ trainedBeside }) => trainedBeside),
      ),
      trained_idle: seriesOf(
        'tokens/s',
        rounds.map(({ trainedIdle }) => trainedIdle),
      ),
    },
  };
}
