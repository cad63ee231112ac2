// A request's latency budget from its body, headers or tier, strictly: a budget that is not a plain finite number above
// zero is INVALID_BUDGET and never a default. Times come whole from the first source that states any (body, then
// headers, then tier, then the configured default): mixing sources would tighten a budget that nobody wrote.

import { rankMaxLimit } from '../adapters/adapter.ts';
import { GatewayError } from '../errors.ts';
import type { Budget } from './policy.ts';

/** One hour: a larger figure is a wrong unit, not a budget. */
export const budgetMsMax = 3_600_000;

export interface BudgetTimes {
  readonly totalMs: number | null;
  readonly ttftMs: number | null;
  readonly perTokenMs: number | null;
}

/** What a tier stands for; also the shape of the default for requests that state nothing. */
export interface TierPolicy extends BudgetTimes {
  readonly strict: boolean;
  readonly rankMin: number;
}

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

const noTimes: BudgetTimes = { totalMs: null, ttftMs: null, perTokenMs: null };

const bodyFields = ['total_ms', 'ttft_ms', 'per_token_ms', 'strict', 'rank', 'min_rank'] as const;
type BodyField = (typeof bodyFields)[number];
type Latency = Partial<Record<BodyField, unknown>>;

const headers = {
  totalMs: 'x-latency-budget-ms',
  ttftMs: 'x-llm-d-slo-ttft-ms',
  perTokenMs: 'x-llm-d-slo-tpot-ms',
} as const;

function invalid(param: string, wanted: string): GatewayError {
  return new GatewayError('INVALID_BUDGET', `${param}: want ${wanted}`, { param });
}

function isMs(value: unknown): value is number {
  return typeof value === 'number' && value > 0 && value <= budgetMsMax; // NaN and ±Infinity fail
}

const wantedMs = `a number of milliseconds above 0 and at most ${budgetMsMax}`;

function msOfBody(latency: Latency, field: BodyField): number | null {
  const value = latency[field];
  if (value === undefined) return null;
  if (!isMs(value)) throw invalid(`latency.${field}`, wantedMs);
  return value;
}

/** Plain decimals only: `1e3`, `0x10`, `100ms`, `100, 200` (a repeated header) and the empty text are refused. */
function msOfHeader(header: BudgetSource['header'], name: string): number | null {
  const text = header(name);
  if (text === null) return null;
  const value = /^\d{1,9}(\.\d{1,6})?$/.test(text) ? Number(text) : Number.NaN;
  if (!isMs(value)) throw invalid(name, `${wantedMs}, in plain decimals`);
  return value;
}

function rankOfBody(latency: Latency, field: 'rank' | 'min_rank'): number | null {
  const value = latency[field];
  if (value === undefined) return null;
  if (!Number.isInteger(value) || (value as number) < 0 || (value as number) > rankMaxLimit) {
    throw invalid(`latency.${field}`, `a whole number from 0 to ${rankMaxLimit}`);
  }
  return value as number;
}

function readLatency(value: unknown): Latency {
  if (value === undefined) return {};
  if (typeof value !== 'object' || value === null || Array.isArray(value)) {
    throw invalid('latency', `an object with any of ${bodyFields.join(', ')}`);
  }
  for (const key of Object.keys(value)) {
    if (!bodyFields.some((field) => field === key)) {
      throw invalid(
        `latency.${key.slice(0, 64)}`,
        `no such field; known are ${bodyFields.join(', ')}`,
      );
    }
  }
  return value;
}

function statesTime(times: BudgetTimes): boolean {
  return times.totalMs !== null || times.ttftMs !== null || times.perTokenMs !== null;
}

/** Throws INVALID_BUDGET with the body field or header at fault as `param`. */
export function parseBudget(source: BudgetSource, defaults: BudgetDefaults): Budget {
  const latency = readLatency(source.latency);
  const fromBody: BudgetTimes = {
    totalMs: msOfBody(latency, 'total_ms'),
    ttftMs: msOfBody(latency, 'ttft_ms'),
    perTokenMs: msOfBody(latency, 'per_token_ms'),
  };
  // Read even when the body wins: a broken header is a mistake that its sender should hear of.
  const fromHeaders: BudgetTimes = {
    totalMs: msOfHeader(source.header, headers.totalMs),
    ttftMs: msOfHeader(source.header, headers.ttftMs),
    perTokenMs: msOfHeader(source.header, headers.perTokenMs),
  };
  const tier =
    source.tier === null ? defaults.latencyDefaults : tierOf(source.tier, defaults.tiers);
  const times = [fromBody, fromHeaders, tier].find(statesTime) ?? noTimes;
  const strict = latency.strict === undefined ? tier.strict : latency.strict;
  if (typeof strict !== 'boolean') throw invalid('latency.strict', 'true or false');
  const rank = rankOfBody(latency, 'rank');
  const rankMinOfBody = rankOfBody(latency, 'min_rank');
  if (rank !== null && rankMinOfBody !== null) {
    throw invalid('latency.min_rank', 'it left out when latency.rank fixes the rank');
  }
  return {
    totalMs: times.totalMs,
    ttftMs: times.ttftMs,
    perTokenMs: times.perTokenMs,
    strict,
    rank,
    rankMin: rankMinOfBody ?? tier.rankMin,
    tier: source.tier,
  };
}

function tierOf(name: string, tiers: BudgetDefaults['tiers']): TierPolicy {
  const tier = Object.hasOwn(tiers, name) ? tiers[name] : undefined;
  if (tier !== undefined) return tier;
  throw invalid('service_tier', `one of ${Object.keys(tiers).join(', ')}`);
}
