// A trace as a file: one JSON object a line, in order of time. What is left out of a line has the default below.

import { z } from 'zod';
import { budgetMsMax } from '../../../src/router/budget.ts';
import { numberTokens } from './simulated-stepper.ts';
import type { Arrival } from './traffic.ts';

const linesMax = 2_000_000;
const ms = z.number().positive().max(budgetMsMax).nullable().default(null);
const tokens = z.int().min(1).max(4096);
const name = z.string().min(1).max(256);
const line = z.strictObject({
  at_ms: z.number().nonnegative(),
  adapter: name.nullable().default(null),
  tenant: name.default('t0'),
  tier: name.default('none'),
  prompt_tokens: tokens.min(numberTokens),
  tokens_max: tokens,
  answer_tokens: tokens,
  total_ms: ms,
  ttft_ms: ms,
  per_token_ms: ms,
  strict: z.boolean().default(false),
  rank_min: z.int().min(0).max(256).default(0),
  priority: z.int().min(0).max(9).default(5),
});

/** Throws an Error that names the line. */
export function parseTrace(text: string): Arrival[] {
  const lines = text.split('\n').filter((one) => one.trim() !== '');
  if (lines.length > linesMax)
    throw new Error(`a trace of ${lines.length} lines, at most ${linesMax}`);
  let lastMs = 0;
  return lines.map((one, index) => {
    const arrival = parseLine(one, index + 1);
    if (arrival.atMs < lastMs) throw new Error(`line ${index + 1}: before the line above it`);
    lastMs = arrival.atMs;
    return arrival;
  });
}

function parseLine(text: string, number: number): Arrival {
  let json: unknown;
  try {
    json = JSON.parse(text);
  } catch {
    throw new Error(`line ${number}: not JSON`);
  }
  const { success, data, error } = line.safeParse(json);
  if (!success) throw new Error(`line ${number}: ${z.prettifyError(error)}`);
  if (data.answer_tokens > data.tokens_max) {
    throw new Error(`line ${number}: an answer beyond its limit`);
  }
  return {
    atMs: data.at_ms,
    adapter: data.adapter,
    tenant: data.tenant,
    tier: data.tier,
    promptTokens: data.prompt_tokens,
    tokensMax: data.tokens_max,
    answerTokens: data.answer_tokens,
    budget: {
      ...{ totalMs: data.total_ms, ttftMs: data.ttft_ms, perTokenMs: data.per_token_ms },
      ...{ strict: data.strict, rank: null, rankMin: data.rank_min, priority: data.priority },
    },
  };
}

export function formatTrace(arrivals: readonly Arrival[]): string {
  const text = ({ budget, ...arrival }: Arrival): string =>
    JSON.stringify({
      at_ms: arrival.atMs,
      adapter: arrival.adapter,
      tenant: arrival.tenant,
      tier: arrival.tier,
      prompt_tokens: arrival.promptTokens,
      tokens_max: arrival.tokensMax,
      answer_tokens: arrival.answerTokens,
      total_ms: budget.totalMs,
      ttft_ms: budget.ttftMs,
      per_token_ms: budget.perTokenMs,
      strict: budget.strict,
      rank_min: budget.rankMin,
      priority: budget.priority,
    } satisfies z.input<typeof line>);
  return arrivals.map((arrival) => `${text(arrival)}\n`).join('');
}
