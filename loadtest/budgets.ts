// k6 run loadtest/budgets.ts: an open arrival rate of streamed chats whose latency budgets cycle from tight to none. Shows
// the share of ranks that budgets leave (rank_share), time to the first byte, and how many answers kept their budget.

import { check } from 'k6';
import type { Options } from 'k6/options';
import { models, streamChat } from './server.ts';

const budgetsMs: readonly (number | undefined)[] = [500, 2000, 10_000, undefined];

export const options: Options = {
  scenarios: {
    chats: {
      executor: 'ramping-arrival-rate',
      startRate: 1,
      timeUnit: '1s',
      preAllocatedVUs: 32,
      maxVUs: 64,
      stages: [
        { target: Number(__ENV.RATE ?? 2), duration: '30s' },
        { target: Number(__ENV.RATE ?? 2), duration: '60s' },
      ],
    },
  },
  thresholds: {
    http_req_failed: ['rate==0'],
    'checks{check:stream ends with [DONE]}': ['rate==1'],
    http_req_waiting: ['p(95)<2000'],
  },
};

export default function chat(): void {
  const budgetMs = budgetsMs[__ITER % budgetsMs.length];
  const model = models[__ITER % models.length]!;
  const prompt = `Number ${__VU}.${__ITER}: name three rivers and one city on each.`;
  const request = { model, prompt, tokensMax: 64 };
  const response = streamChat(budgetMs === undefined ? request : { ...request, budgetMs });
  if (budgetMs === undefined) return;
  check(response, {
    [`kept ${budgetMs} ms`]: (got) => got.timings.duration <= budgetMs,
  });
}
