// Callers of `bench deadline`: requests as the simulator's traffic draws them, over HTTP, and what became of each. In an open
// loop a time counts from the moment at which a request was due, so that this process being late is no excuse; in a closed
// one from when it was sent.

import type { Arrival } from '../test/support/simulator/traffic.ts';
import { createRandom } from './adapter-numbers.ts';
import { takeTokens } from './prompts.ts';

export interface Caller {
  readonly post: (
    path: string,
    body: unknown,
    headers: Record<string, string>,
    signal: AbortSignal,
  ) => Promise<Response>;
  readonly keyOf: (tenant: string) => string;
  readonly endToken: number;
  readonly vocabSize: number;
}

/** What a caller asks of every request of its traffic. */
export interface Wish {
  /** Fixed for all; null: the gateway chooses. */
  readonly rankOf: ((adapter: string) => number) | null;
  readonly hasBudget: boolean;
  readonly signal: AbortSignal;
}

/** What one caller had. */
export interface Heard {
  /** `answered`, or the error's code, or `aborted`. */
  readonly outcome: string;
  readonly tokens: number;
  readonly ttftMs: number;
  readonly totalMs: number;
  readonly rank: number;
  readonly rankMean: number;
  readonly predictedMs: number | null;
  readonly cachedTokens: number;
  /** On the clock of performance.now. */
  readonly endedMs: number;
}

interface Body {
  readonly error?: { readonly code: string };
  readonly usage: { readonly completion_tokens: number };
  readonly rankgate: {
    readonly rank: number;
    readonly rank_mean: number;
    readonly predicted_ms: number | null;
    readonly ttft_ms: number;
    readonly total_ms: number;
    readonly cached_tokens: number;
  };
}

/** Every request when it is due, whatever became of those before it. */
export async function sendOpen(
  caller: Caller,
  arrivals: readonly Arrival[],
  wish: Wish,
): Promise<Heard[]> {
  const startMs = performance.now();
  return await Promise.all(
    arrivals.map(async (arrival, index) => {
      const dueMs = startMs + arrival.atMs;
      await new Promise((resolve) => setTimeout(resolve, dueMs - performance.now()));
      return await send(caller, arrival, index, { ...wish, dueMs });
    }),
  );
}

/** So many callers that ask again as soon as they are answered, until the time is over or the traffic used up. */
export async function sendClosed(
  caller: Caller,
  arrivals: readonly Arrival[],
  wish: Wish,
  { callers, untilMs }: { readonly callers: number; readonly untilMs: number },
): Promise<Heard[]> {
  const heard: Heard[] = [];
  let next = 0;
  const work = async (): Promise<void> => {
    while (performance.now() < untilMs && next < arrivals.length) {
      const index = next++;
      const dueMs = performance.now();
      heard.push(await send(caller, arrivals[index]!, index, { ...wish, dueMs }));
    }
  };
  await Promise.all(Array.from({ length: callers }, work));
  return heard;
}

async function send(
  { post, keyOf, ...model }: Caller,
  arrival: Arrival,
  index: number,
  wish: Wish & { readonly dueMs: number },
): Promise<Heard> {
  const { signal, dueMs } = wish;
  const failed = (outcome: string): Heard => {
    const endedMs = performance.now();
    const times = { ttftMs: 0, totalMs: endedMs - dueMs, endedMs };
    return { ...nothing, ...times, outcome };
  };
  let body: Body;
  try {
    const headers = { authorization: `Bearer ${keyOf(arrival.tenant)}` };
    const response = await post(
      '/v1/completions',
      bodyOf(model, arrival, index, wish),
      headers,
      signal,
    );
    body = (await response.json()) as Body;
  } catch (error) {
    if (signal.aborted) return failed('aborted');
    throw error;
  }
  if (body.error !== undefined) return failed(body.error.code);
  const endedMs = performance.now();
  const totalMs = endedMs - dueMs;
  const { usage, rankgate } = body;
  return {
    outcome: 'answered',
    tokens: usage.completion_tokens,
    // The gateway's, and what came before it.
    ttftMs: totalMs - (rankgate.total_ms - rankgate.ttft_ms),
    totalMs,
    rank: rankgate.rank,
    rankMean: rankgate.rank_mean,
    predictedMs: rankgate.predicted_ms,
    cachedTokens: rankgate.cached_tokens,
    endedMs,
  };
}

const nothing = { tokens: 0, rank: 0, rankMean: 0, predictedMs: null, cachedTokens: 0 } as const;

function bodyOf(
  { endToken, vocabSize }: Pick<Caller, 'endToken' | 'vocabSize'>,
  { adapter, promptTokens, tokensMax, answerTokens, tier, budget }: Arrival,
  index: number,
  { rankOf, hasBudget }: Wish,
): object {
  const rank = rankOf === null ? { min_rank: budget.rankMin } : { rank: rankOf(adapter!) };
  return {
    model: adapter,
    prompt: promptOf(index, promptTokens, vocabSize),
    max_tokens: tokensMax,
    temperature: 0,
    ...(answerTokens < tokensMax ? endsAfter(answerTokens, endToken) : {}),
    ...(hasBudget ? { service_tier: tier } : {}),
    latency: { ...rank, ...(hasBudget ? { total_ms: budget.totalMs } : {}) },
  };
}

const ownTokens = 4;

/** English that no other request's prompt begins like: nothing of it is in the prefix cache. */
function promptOf(index: number, length: number, vocabSize: number): number[] {
  const random = createRandom(promptsMade++);
  const own = Array.from({ length: Math.min(ownTokens, length) }, () => random());
  const english = takeTokens(length - own.length, 7 * index);
  return [...own, ...english].map((token) => token % vocabSize);
}

let promptsMade = 1;
const wantedToken = 260;
const penalty = 2;
/** By so many times the model wants that token more than the end anyway (seen: 4 to 6). */
const wantedMore = 5;

/** An answer of about so many tokens whatever the model would say: one token is wanted above all others, and less each time
 *  it has been said, until the end is wanted more. */
function endsAfter(tokens: number, endToken: number): object {
  const said = 100;
  return {
    frequency_penalty: penalty,
    logit_bias: {
      [wantedToken]: said,
      [endToken]: said - penalty * Math.max(0, tokens - wantedMore),
    },
  };
}
