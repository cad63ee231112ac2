// MODELS=a,b,c,d GENERATIONS=sha256:…,sha256:… k6 run loadtest/hot-swap.ts: sixteen clients stream from the adapters while
// another one swaps the first adapter between two generations every 50 ms. No stream and no swap may fail.

import { check, sleep } from 'k6';
import http from 'k6/http';
import type { Options } from 'k6/options';
import { baseUrl, headers, models, streamChat } from './server.ts';

const generations: readonly string[] = (__ENV.GENERATIONS ?? '').split(',').filter(Boolean);
const duration: string = __ENV.DURATION ?? '60s';

export const options: Options = {
  scenarios: {
    streams: { executor: 'constant-vus', vus: 16, duration, exec: 'stream' },
    swaps: { executor: 'constant-vus', vus: 1, duration, exec: 'swap' },
  },
  thresholds: { http_req_failed: ['rate==0'], checks: ['rate==1'] },
};

export function setup(): void {
  if (generations.length < 2) {
    throw new Error('GENERATIONS must name two generations of the first model in MODELS');
  }
}

export function stream(): void {
  const model = models[__VU % models.length]!;
  streamChat({ model, prompt: `Client ${__VU}: tell me about lighthouses.`, tokensMax: 64 });
}

export function swap(): void {
  const generation = generations[__ITER % generations.length]!;
  const url = `${baseUrl}/v1/adapters/${models[0]}`;
  const response = http.put(url, JSON.stringify({ generation }), { headers });
  check(response, { 'swap is accepted': (got) => got.status === 200 });
  sleep(0.05);
}
