import { mkdirSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { baseModelPath } from '../support/base-model.ts';
import {
  type GatewayProcess,
  readEvents,
  startGatewayProcess,
} from '../support/gateway-process.ts';
import { smolShape, writePeftAdapter } from '../support/make-peft-adapter.ts';
import { runOpenAiSuite } from '../support/openai-suite.ts';

// The built gateway with the real base model, in its own processes. One thread: the tests' own process needs a core.

let gateway: GatewayProcess;
const question = [{ role: 'user', content: 'What is the capital of France?' }];

beforeAll(async () => {
  const modelPath = await baseModelPath();
  gateway = await startGatewayProcess({
    modelPath,
    flags: ['--threads', '1', '--runtime-lora-updating'],
  });
  writePeftAdapter(join(gateway.adaptersRoot, 'support'), {
    shape: smolShape,
    seed: 11,
    rank: 32,
    alpha: 32,
    targets: ['attn_q', 'attn_v', 'ffn_down'],
    gain: 0.6,
  });
  const added = await gateway.post('/v1/adapters', { source: 'support', name: 'support' });
  expect(added.status, await added.clone().text()).toBe(201);
}, 180_000);

afterAll(async () => {
  await gateway[Symbol.asyncDispose]();
});

interface ChatAnswer {
  readonly choices: ReadonlyArray<{ message: { content: string }; finish_reason: string }>;
  readonly error?: { code: string; param: string | null; message: string };
}

async function ask(
  body: Record<string, unknown>,
  headers: Record<string, string> = {},
): Promise<Response> {
  const defaults = { model: gateway.modelName, messages: question, temperature: 0, max_tokens: 24 };
  return gateway.post('/v1/chat/completions', { ...defaults, ...body }, headers);
}

async function textOf(response: Response): Promise<string> {
  return ((await response.json()) as ChatAnswer).choices[0]!.message.content;
}

describe('the gateway with the default model', () => {
  it('answers what the weights say', async () => {
    const answer = await ask({});
    expect(answer.status).toBe(200);
    expect(await textOf(answer)).toBe('The capital of France is Paris.');
  });

  it('says which adapter, generation and rank made an answer', async () => {
    const answer = await ask({ model: 'support' });
    expect(answer.headers.get('x-adapter-id')).toBe('support');
    expect(answer.headers.get('x-adapter-generation')).toMatch(/^sha256:[0-9a-f]{64}$/);
    expect(answer.headers.get('x-adapter-rank')).toBe('32/32');
    expect(answer.headers.get('x-rank-reason')).toBe('full');
    expect(await textOf(answer)).not.toBe('The capital of France is Paris.');
  });

  it('blends adapters by weight: alone at 1 it is itself, at 0 the base, and merges are others', async () => {
    const weighted = async (weight: number, rest: object = {}): Promise<string> =>
      textOf(await ask({ adapters: [{ id: 'support', weight }], ...rest }));
    expect(await weighted(1)).toBe(await textOf(await ask({ model: 'support' })));
    expect(await weighted(0)).toBe('The capital of France is Paris.');
    expect(await weighted(1, { merge: 'ties', density: 1 })).toBe(await weighted(1));
    expect(await weighted(1, { merge: 'dare_linear', density: 0.5 })).not.toBe(await weighted(1));
    const adapters = [
      { id: 'support', weight: 0.5 },
      { id: 'nobody', weight: 0.5 },
    ];
    const missing = await ask({ adapters });
    expect(missing.status).toBe(404);
    expect(((await missing.json()) as ChatAnswer).error).toMatchObject({ param: 'adapters[1].id' });
  });

  it('a tight budget lowers the rank, a loose one gives all of it, and rank 0 is the base', async () => {
    // Until the latency model has seen steps with and without ranks it predicts nothing.
    for (let i = 0; i < 3; i++) {
      await (await ask({ model: 'support', latency: { rank: 32 }, max_tokens: 32 })).text();
      await (await ask({ model: 'support', latency: { rank: 4 }, max_tokens: 32 })).text();
    }
    const rankAt = async (perTokenMs: number): Promise<number> => {
      const answer = await ask({
        model: 'support',
        latency: { per_token_ms: perTokenMs },
        max_tokens: 8,
      });
      await answer.text();
      return Number(answer.headers.get('x-adapter-rank')!.split('/')[0]);
    };
    expect(await rankAt(3_000)).toBe(32);
    expect(await rankAt(0.01)).toBeLessThan(32);
    const fixed = await ask({ model: 'support', latency: { rank: 0 } });
    expect(await textOf(fixed)).toBe('The capital of France is Paris.');
    const strict = await ask({ model: 'support', latency: { per_token_ms: 0.01, strict: true } });
    expect(strict.status).toBe(504);
    await strict.text();
  });

  it('reads the budget from headers, body and tiers, and reports the decision in the last chunk and the log', async () => {
    const answer = await ask(
      { model: 'support:quality', stream: true, max_tokens: 6 },
      { 'x-latency-budget-ms': '60000', 'x-request-id': 'e2e-budget' },
    );
    const events: string[] = [];
    for await (const data of readEvents(answer)) events.push(data);
    expect(events.at(-1)).toBe('[DONE]');
    const last = JSON.parse(events.at(-2)!) as { rankgate: { rank: number; rank_max: number } };
    expect(last.rankgate).toMatchObject({ adapter: 'support', rank: 32, rank_max: 32 });
    await expect
      .poll(() => gateway.log.find(({ requestId }) => requestId === 'e2e-budget'))
      .toMatchObject({ event: 'request-end', adapter: 'support', rank: 32, reason: 'fits' });
  });

  it.each([0, -1, 'NaN', '1e308', 'soon', '', null])('a budget of %j is a 400', async (total) => {
    const answer = await ask({ latency: { total_ms: total } });
    expect(answer.status).toBe(400);
    expect(((await answer.json()) as ChatAnswer).error!.param).toMatch(/latency/);
    const header = await ask({}, { 'x-latency-budget-ms': String(total) });
    expect(header.status).toBe(400);
    await header.text();
  });

  it('unknown models, adapters, tiers and fields are refused, never answered by the base', async () => {
    for (const [body, status] of [
      [{ model: 'suport' }, 404],
      [{ model: `support@sha256:${'0'.repeat(64)}` }, 404],
      [{ model: 'support:never' }, 404],
      [{ tools: [] }, 400],
      [{ n_ctx: 5 }, 400],
    ] as const) {
      const answer = await ask(body);
      expect(answer.status, JSON.stringify(body)).toBe(status);
      await answer.text();
    }
  });

  it('hostile adapter files are refused with the reason while a good stream goes on, in the same processes', async () => {
    const [gatewayPid, enginePid] = [gateway.pid, await gateway.enginePid()];
    const undisturbed = await textOf(await ask({ model: 'support', max_tokens: 100 }));
    const stream = await ask({ model: 'support', max_tokens: 100, stream: true });
    const reading = (async () => {
      let text = '';
      for await (const data of readEvents(stream)) {
        if (data === '[DONE]') return text;
        const chunk = JSON.parse(data) as { choices: Array<{ delta: { content?: string } }> };
        text += chunk.choices[0]?.delta.content ?? '';
      }
      throw new Error('the stream ended without [DONE]');
    })();
    const config = {
      peft_type: 'LORA',
      r: 8,
      lora_alpha: 8,
      target_modules: ['q_proj'],
      bias: 'none',
    };
    const hostile: Array<[string, object | string, Uint8Array]> = [
      ['truncated', config, Uint8Array.of(255, 0, 0, 0, 0, 0, 0, 0, 123)],
      ['bomb', config, new Uint8Array(16).fill(255)],
      ['pickle', config, Buffer.from('\u0080\u0002ctorch._utils\n')],
      ['empty', config, new Uint8Array(0)],
      ['dora', { ...config, use_dora: true }, new Uint8Array(8)],
      ['rank', { ...config, r: -1 }, new Uint8Array(8)],
      ['text', 'not json', new Uint8Array(8)],
    ];
    for (const [name, fields, weights] of hostile) {
      const directory = join(gateway.adaptersRoot, name);
      mkdirSync(directory, { recursive: true });
      writeFileSync(
        join(directory, 'adapter_config.json'),
        typeof fields === 'string' ? fields : JSON.stringify(fields),
      );
      writeFileSync(join(directory, 'adapter_model.safetensors'), weights);
      const answer = await gateway.post('/v1/adapters', { source: name, name });
      const body = (await answer.json()) as ChatAnswer;
      expect(answer.status, name).toBeGreaterThanOrEqual(400);
      expect(answer.status, name).toBeLessThan(500);
      expect(body.error!.message, name).not.toContain(gateway.dataDir);
    }
    for (const source of ['../..', '/etc', 'support/../../..', 'no-such-directory']) {
      const answer = await gateway.post('/v1/adapters', { source, name: 'x' });
      expect([400, 403, 404, 422], source).toContain(answer.status);
      await answer.text();
    }
    expect(await reading).toBe(undisturbed);
    expect(gateway.pid).toBe(gatewayPid);
    expect(await gateway.enginePid()).toBe(enginePid);
    const listed = (await (await gateway.fetch('/v1/models')).json()) as {
      data: Array<{ id: string }>;
    };
    expect(new Set(listed.data.map(({ id }) => id))).toEqual(
      new Set([gateway.modelName, 'support']),
    );
  });

  it('vLLM’s load and unload calls work, and a loaded adapter is listed at once', async () => {
    const load = await gateway.post('/v1/load_lora_adapter', {
      lora_name: 'second',
      lora_path: 'support',
    });
    expect(await load.text()).toMatch(/^Success: LoRA adapter 'second' added successfully/);
    const listed = await (await gateway.fetch('/v1/models')).text();
    expect(listed).toContain('"second"');
    const unload = await gateway.post('/v1/unload_lora_adapter', { lora_name: 'second' });
    expect(await unload.text()).toMatch(/removed successfully/);
    expect((await ask({ model: 'second' })).status).toBe(404);
  });

  it('is live, ready and measured', async () => {
    expect((await gateway.fetch('/livez')).status).toBe(200);
    expect((await gateway.fetch('/readyz')).status).toBe(200);
    const page = await (await gateway.fetch('/metrics')).text();
    for (const name of [
      'vllm:num_requests_running',
      'vllm:lora_requests_info',
      'vllm:kv_cache_usage_perc',
    ]) {
      expect(page).toContain(name);
    }
  });

  it('a killed engine is a pause: the stream goes on and equals an undisturbed one', async () => {
    const body = { model: 'support', max_tokens: 60 };
    const undisturbed = await textOf(await ask(body));
    const stream = await ask({ ...body, stream: true });
    let text = '';
    let isKilled = false;
    let isDone = false;
    for await (const data of readEvents(stream)) {
      if (data === '[DONE]') {
        isDone = true;
        break;
      }
      const chunk = JSON.parse(data) as { choices: Array<{ delta: { content?: string } }> };
      text += chunk.choices[0]?.delta.content ?? '';
      if (!isKilled && text.length > 20) {
        isKilled = true;
        process.kill(await gateway.enginePid(), 'SIGKILL');
      }
    }
    expect(isKilled).toBe(true);
    expect(isDone).toBe(true);
    expect(text).toBe(undisturbed);
  }, 120_000);
});

runOpenAiSuite({
  baseUrl: () => `${gateway.url}/v1`,
  apiKey: 'unused',
  models: { base: 'smollm2-135m-instruct', adapter: 'support' },
});
