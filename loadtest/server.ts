// What the k6 scripts share: where the server is, which models to ask for, and one streamed chat completion with its checks.
// Runs inside k6 (not Node): only k6's modules and its global __ENV exist.

import { check } from 'k6';
import http, { type RefinedResponse } from 'k6/http';
import { Trend } from 'k6/metrics';

export const baseUrl: string = __ENV.BASE_URL ?? 'http://127.0.0.1:8080';
/** Model ids as `GET /v1/models` lists them: adapters, or the base model. */
export const models: readonly string[] = (__ENV.MODELS ?? '').split(',').filter(Boolean);
if (models.length === 0) throw new Error('MODELS must name at least one model, comma-separated');
/** Of an admin key, when the server wants one for the adapter routes. */
export const headers: Record<string, string> = {
  'content-type': 'application/json',
  ...(__ENV.API_KEY === undefined ? {} : { authorization: `Bearer ${__ENV.API_KEY}` }),
};

/** Active ranks as a share of all, from `x-adapter-rank: k/R`: falls when budgets are tight. */
const rankShare: Trend = new Trend('rank_share');

export interface ChatOptions {
  readonly model: string;
  readonly prompt: string;
  readonly tokensMax: number;
  readonly budgetMs?: number;
}

/** A stream is right when it ends with [DONE] and carries no error event: a cut stream has status 200 too. */
export function streamChat(options: ChatOptions): RefinedResponse<'text'> {
  const body = {
    model: options.model,
    messages: [{ role: 'user', content: options.prompt }],
    max_tokens: options.tokensMax,
    stream: true,
  };
  const budget =
    options.budgetMs === undefined ? {} : { 'x-latency-budget-ms': String(options.budgetMs) };
  const response = http.post(`${baseUrl}/v1/chat/completions`, JSON.stringify(body), {
    headers: { ...headers, ...budget },
    responseType: 'text',
    timeout: '120s',
    tags: { model: options.model },
  });
  check(response, {
    'status is 200': (got) => got.status === 200,
    'stream ends with [DONE]': (got) => got.body.trimEnd().endsWith('data: [DONE]'),
    'no error event': (got) => !got.body.includes('data: {"error"'),
  });
  const [active, all] = (response.headers['X-Adapter-Rank'] ?? '').split('/').map(Number);
  if (active !== undefined && all !== undefined && all > 0) rankShare.add(active / all);
  return response;
}
