// A request's latency budget from its body, headers or tier, strictly: a budget that is not a plain finite number above
// zero is INVALID_BUDGET and never a default. Times come whole from the first source that states any (body, then
// headers, then tier, then the configured default): mixing sources would tighten a budget that nobody wrote.

import { z } from 'zod';
import { rankMaxLimit } from '../adapters/adapter.ts';
import { GatewayError } from '../errors.ts';
import type { Budget, BudgetTimes, TierPolicy } from './policy.ts';

/** One hour: a larger figure is a wrong unit, not a budget. */
export const budgetMsMax = 3_600_000;

export interface BudgetSource {
  /** The body's `latency` as JSON gave it; undefined when absent. */
  readonly latency: unknown;
  readonly header: (name: string) => string | null;
  /** From service_tier or the model's suffix; null for none. */
  readonly tier: string | null;
}

export interface BudgetDefaults {
  readonly tiers: Readonly<Record<string, TierPolicy>>;
  readonly latencyDefaults: TierPolicy;
}

const wantedMs = `want a number of milliseconds above 0 and at most ${budgetMsMax}`;
const wantedRank = `want a whole number from 0 to ${rankMaxLimit}`;
const ms = z.custom<number>(isMs, wantedMs).exactOptional();
const rank = z.int(wantedRank).min(0, wantedRank).max(rankMaxLimit, wantedRank).exactOptional();
const fields = {
  total_ms: ms,
  ttft_ms: ms,
  per_token_ms: ms,
  strict: z.boolean('want true or false').exactOptional(),
  rank,
  min_rank: rank,
};
const known = Object.keys(fields).join(', ');
const latencySchema = z.strictObject(fields, {
  error: (issue) =>
    issue.code === 'unrecognized_keys'
      ? `no such field; known are ${known}`
      : `want an object with any of ${known}`,
});

function isMs(value: unknown): boolean {
  return typeof value === 'number' && value > 0 && value <= budgetMsMax; // NaN and ±Infinity fail
}

function invalid(param: string, wanted: string): GatewayError {
  return new GatewayError('INVALID_BUDGET', `${param}: ${wanted}`, { param });
}

function readLatency(value: unknown): z.infer<typeof latencySchema> {
  const { success, data, error } = latencySchema.safeParse(value === undefined ? {} : value);
  if (success) return data;
  const issue = error.issues[0]!;
  const unknown = issue.code === 'unrecognized_keys' ? issue.keys[0]!.slice(0, 64) : undefined;
  throw invalid(['latency', ...issue.path, unknown ?? []].flat().join('.'), issue.message);
}

/** Plain decimals only: `1e3`, `0x10`, `100ms`, `100, 200` (a repeated header) and the empty text are refused. */
function msOfHeader(header: BudgetSource['header'], name: string): number | null {
  const text = header(name);
  if (text === null) return null;
  const value = /^\d{1,9}(\.\d{1,6})?$/.test(text) ? Number(text) : Number.NaN;
  if (!isMs(value)) throw invalid(name, `${wantedMs}, in plain decimals`);
  return value;
}

export function statesTime(times: BudgetTimes): boolean {
  return times.totalMs !== null || times.ttftMs !== null || times.perTokenMs !== null;
}

/** What is left of times that count from the arrival, `spentMs` later. At or below zero it cannot be met any more. */
export function remaining<T extends BudgetTimes>(times: T, spentMs: number): T {
  const { totalMs, ttftMs } = times;
  return {
    ...times,
    totalMs: totalMs === null ? null : totalMs - spentMs,
    ttftMs: ttftMs === null ? null : ttftMs - spentMs,
  };
}

/** How long the whole answer may take by the budget; null when nothing bounds it. */
export function wholeMs(
  { totalMs, ttftMs, perTokenMs }: BudgetTimes,
  tokensMax: number,
): number | null {
  if (totalMs !== null) return totalMs;
  return perTokenMs === null ? null : (ttftMs ?? 0) + perTokenMs * tokensMax;
}

/** Whether times (seen, or predicted) are within every one that is stated. */
export function meets(budget: BudgetTimes, times: Record<keyof BudgetTimes, number>): boolean {
  const { totalMs, ttftMs, perTokenMs } = budget;
  return (
    times.totalMs <= (totalMs ?? Number.POSITIVE_INFINITY) &&
    times.ttftMs <= (ttftMs ?? Number.POSITIVE_INFINITY) &&
    times.perTokenMs <= (perTokenMs ?? Number.POSITIVE_INFINITY)
  );
}

/** Whether an answer kept every time that is stated; null: none is. */
export function wasMet(
  budget: BudgetTimes,
  answer: { readonly ttftMs: number; readonly totalMs: number; readonly tokens: number },
): boolean | null {
  if (!statesTime(budget)) return null;
  const { ttftMs, totalMs, tokens } = answer;
  const perTokenMs = (totalMs - ttftMs) / Math.max(1, tokens - 1);
  return meets(budget, { totalMs, ttftMs, perTokenMs });
}

/** Of work that takes none: a budget that even this does not meet is spent. */
export const noTime: Record<keyof BudgetTimes, number> = { totalMs: 0, ttftMs: 0, perTokenMs: 0 };

/** Throws INVALID_BUDGET with the body field or header at fault as `param`. */
export function parseBudget(source: BudgetSource, defaults: BudgetDefaults): Budget {
  const latency = readLatency(source.latency);
  const fromBody: BudgetTimes = {
    totalMs: latency.total_ms ?? null,
    ttftMs: latency.ttft_ms ?? null,
    perTokenMs: latency.per_token_ms ?? null,
  };
  // Read even when the body wins: a broken header is a mistake that its sender should hear of.
  const fromHeaders: BudgetTimes = {
    totalMs: msOfHeader(source.header, 'x-latency-budget-ms'),
    ttftMs: msOfHeader(source.header, 'x-llm-d-slo-ttft-ms'),
    perTokenMs: msOfHeader(source.header, 'x-llm-d-slo-tpot-ms'),
  };
  const tier =
    source.tier === null ? defaults.latencyDefaults : tierOf(source.tier, defaults.tiers);
  const { totalMs, ttftMs, perTokenMs } = [fromBody, fromHeaders].find(statesTime) ?? tier;
  if (latency.rank !== undefined && latency.min_rank !== undefined) {
    throw invalid('latency.min_rank', 'want it left out when latency.rank fixes the rank');
  }
  return {
    totalMs,
    ttftMs,
    perTokenMs,
    strict: latency.strict ?? tier.strict,
    rank: latency.rank ?? null,
    rankMin: latency.min_rank ?? tier.rankMin,
    priority: tier.priority,
  };
}

function tierOf(name: string, tiers: BudgetDefaults['tiers']): TierPolicy {
  const tier = Object.hasOwn(tiers, name) ? tiers[name] : undefined;
  if (tier !== undefined) return tier;
  throw invalid('service_tier', `want one of ${Object.keys(tiers).join(', ')}`);
}
