import { mkdtempSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { expect, it } from 'vitest';
import { loadConfig } from '../../src/config.ts';
import { startGateway } from '../../src/main.ts';
import { fetchBaseModel } from '../../src/model/model-source.ts';

const tiny = join(import.meta.dirname, '../golden/tiny/tiny-f32.gguf');

it('an evaluation is on disk when it is acknowledged, outlives the process, and answers a request', async () => {
  const dataDir = mkdtempSync(join(tmpdir(), 'rankgate-archive-'));
  const flags = { model: tiny, 'data-dir': dataDir, port: '0', threads: '1', log: 'none' };
  const config = loadConfig({ flags, environment: {} });
  const model = await fetchBaseModel(config.model, { dir: join(dataDir, 'models') });
  const json = { 'content-type': 'application/json' };
  const post = (url: string, body: unknown): Promise<Response> =>
    fetch(url, { method: 'POST', headers: json, body: JSON.stringify(body) });
  const candidate = { domain: 'law', adapter: null, rank: 0, latency_ms: 100, objective: 0.5 };

  const first = await startGateway(config, model);
  const path = '/v1/adapters/archive';
  const offered = await post(`${first.url}${path}`, { candidates: [candidate] });
  expect(offered.status).toBe(200);
  expect(readFileSync(join(dataDir, 'archive.json'), 'utf8')).toContain('law');
  await first.close();

  const second = await startGateway(config, model);
  const { data } = (await (await fetch(`${second.url}${path}`)).json()) as { data: unknown[] };
  const { latency_ms, ...rest } = candidate;
  expect(data).toMatchObject([{ ...rest, cell: 2, latency_ms, current: true }]);
  const answer = await post(`${second.url}/v1/completions`, {
    ...{ model: second.modelName, prompt: [1, 2, 3], max_tokens: 2, domain: 'law' },
  });
  expect(answer.status).toBe(200);
  expect(answer.headers.get('x-archive-cell')).toBe('law/2');
  await second.close();
  rmSync(dataDir, { recursive: true });
}, 60_000);
