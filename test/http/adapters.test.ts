import { mkdirSync, mkdtempSync, rmSync, symlinkSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, it } from 'vitest';
import { GatewayError } from '../../src/errors.ts';
import { fakeGeneration, fakeManifest } from '../support/fake-registry.ts';
import {
  createHarness,
  generationA,
  generationB,
  type Harness,
  type Json,
} from '../support/http-harness.ts';

let directory: string;
let root: string;
beforeAll(() => {
  directory = mkdtempSync(join(tmpdir(), 'rankgate-adapters-'));
  root = join(directory, 'root');
  for (const folder of ['root/one', 'root/deep/two', 'outside', 'root-twin/three']) {
    mkdirSync(join(directory, folder), { recursive: true });
  }
  symlinkSync(join(directory, 'outside'), join(root, 'escape'));
  symlinkSync(join(root, 'one'), join(root, 'inward'));
});
afterAll(() => rmSync(directory, { recursive: true }));

let harness: Harness;
beforeEach(() => {
  harness = createHarness({ adaptersRoot: root, runtimeLoraUpdating: true });
});
afterEach(() => harness.close());

async function call(
  method: string,
  path: string,
  body?: unknown,
  headers: Record<string, string> = {},
): Promise<{ status: number; body: Json; headers: Headers }> {
  const response = await harness.fetch(method, path, {
    headers: { 'content-type': 'application/json', ...headers },
    ...(body === undefined ? {} : { body: JSON.stringify(body) }),
  });
  const text = await response.text();
  const isJson = response.headers.get('content-type')?.startsWith('application/json');
  return {
    status: response.status,
    body: isJson ? JSON.parse(text) : text,
    headers: response.headers,
  };
}

describe('POST /v1/adapters', () => {
  it('imports from inside the root and shows the adapter at once', async () => {
    const added = await call('POST', '/v1/adapters', { name: 'new', source: 'one' });
    expect(added.status).toBe(201);
    expect(added.body).toMatchObject({
      object: 'adapter',
      name: 'new',
      generation: generationB,
      previous: [],
      kind: 'lora',
      rank_max: 8,
      rank_curve: fakeManifest(8).rankCurve,
      modules: 1,
      bytes: 999,
      residency: { tier: 'disk' },
      leases: 0,
      warnings: [],
    });
    expect(harness.importer.directories).toEqual([join(root, 'one')]);
    const models = await call('GET', '/v1/models');
    expect(models.body.data.map((model: Json) => model.id)).toEqual([
      'tiny-base',
      'support',
      'new',
    ]);
  });

  it.each(['one', './one', 'deep/two', 'inward', 'deep/../one'])('takes %s', async (source) => {
    expect((await call('POST', '/v1/adapters', { name: 'new', source })).status).toBe(201);
  });

  it('takes an absolute path inside the root', async () => {
    const source = join(root, 'deep', 'two');
    expect((await call('POST', '/v1/adapters', { name: 'new', source })).status).toBe(201);
  });

  const outside = [
    '..',
    '../outside',
    '/etc',
    '/',
    '.',
    'escape',
    'one/../../outside',
    '../root-twin/three',
    '/nowhere/at/all',
  ];
  it.each(outside)('refuses %s, outside the root, without a look at it', async (source) => {
    const refused = await call('POST', '/v1/adapters', { name: 'new', source });
    expect(refused).toMatchObject({
      status: 403,
      body: {
        error: {
          code: 'forbidden',
          param: 'source',
          message: 'the source is outside the adapters root',
        },
      },
    });
    expect(harness.importer.directories).toEqual([]);
  });

  it('says neither path nor root when nothing is there', async () => {
    const refused = await call('POST', '/v1/adapters', { name: 'new', source: 'missing' });
    expect(refused).toMatchObject({ status: 422, body: { error: { code: 'invalid_adapter' } } });
    expect(JSON.stringify(refused.body)).not.toContain(directory);
  });

  it.each(['http://169.254.169.254/', 'file:///etc', 's3://x'])(
    'refuses %s: no fetching',
    async (source) => {
      const refused = await call('POST', '/v1/adapters', { name: 'new', source });
      expect(refused).toMatchObject({ status: 400, body: { error: { code: 'unsupported' } } });
    },
  );

  it('refuses a NUL', async () => {
    expect((await call('POST', '/v1/adapters', { name: 'new', source: 'a\0b' })).status).toBe(400);
  });

  it('is closed with a root that does not exist', async () => {
    harness.close();
    harness = createHarness();
    const refused = await call('POST', '/v1/adapters', { name: 'new', source: 'one' });
    expect(refused.status).toBe(403);
    expect(JSON.stringify(refused.body)).not.toContain('nowhere');
  });

  it.each(['New', 'a/b/c', 'a/', '/a', '..', 'a..b', 'x,y', '', 'a'.repeat(65), 'é', 'a:b', 'a@b'])(
    'refuses the name %j',
    async (name) => {
      const refused = await call('POST', '/v1/adapters', { name, source: 'one' });
      expect(refused).toMatchObject({ status: 400, body: { error: { param: 'name' } } });
    },
  );

  it('refuses a taken name, the base model among them, before the import', async () => {
    for (const name of ['support', 'tiny-base']) {
      const refused = await call('POST', '/v1/adapters', { name, source: 'one' });
      expect(refused).toMatchObject({ status: 409, body: { error: { code: 'adapter_exists' } } });
      expect(refused.headers.get('x-should-retry')).toBe('false');
    }
    const base = await call('POST', '/v1/adapters', {
      name: 'tiny-base',
      source: 'one',
      replace: true,
    });
    expect(base.status).toBe(409);
    expect(harness.importer.directories).toEqual([]);
  });

  it('replaces when asked, under the expected generation only', async () => {
    const body = { name: 'support', source: 'one', replace: true };
    const lost = await call('POST', '/v1/adapters', { ...body, if_generation: generationB });
    expect(lost).toMatchObject({ status: 409, body: { error: { code: 'generation_mismatch' } } });
    expect(harness.registry.find('support')!.generation).toBe(generationA);
    const won = await call('POST', '/v1/adapters', { ...body, if_generation: generationA });
    expect(won).toMatchObject({
      status: 200,
      body: { generation: generationB, previous: [generationA] },
    });
    expect(harness.engine.unloaded).toEqual([generationA]);
  });

  it('decides a race for a new name after the import, for one', async () => {
    const both = await Promise.all(
      ['one', 'deep/two'].map((source) => call('POST', '/v1/adapters', { name: 'new', source })),
    );
    expect(both.map((answer) => answer.status).sort((a, b) => a - b)).toEqual([201, 409]);
  });

  it('leaves the name as it was when the import fails, and says why', async () => {
    harness.importer.next = new GatewayError('INVALID_ADAPTER', '3 of 7 tensors matched');
    const body = { name: 'support', source: 'one', replace: true };
    expect(await call('POST', '/v1/adapters', body)).toMatchObject({
      status: 422,
      body: { error: { code: 'invalid_adapter', message: '3 of 7 tensors matched' } },
    });
    expect(harness.registry.find('support')!.generation).toBe(generationA);
    harness.importer.next = new GatewayError('DISK_FULL', 'ENOSPC: /data/blobs');
    expect(await call('POST', '/v1/adapters', body)).toMatchObject({
      status: 507,
      body: { error: { message: 'no space left to store this' } },
    });
  });

  it('passes accept_base_name on', async () => {
    await call('POST', '/v1/adapters', {
      name: 'new',
      source: 'one',
      accept_base_name: 'org/other',
    });
    expect(harness.importer.options).toEqual([{ acceptBaseName: 'org/other' }]);
  });
});

describe('the life of an adapter', () => {
  it('is shown with its residency and its leases', async () => {
    harness.engine.figures = {
      residents: [{ generation: generationA, rank: 16, bytes: 4096, uses: 2 }],
    };
    using _lease = harness.registry.lease('support');
    const shown = await call('GET', '/v1/adapters/support');
    expect(shown.body).toMatchObject({
      leases: 1,
      residency: { tier: 'slot', rank: 16, bytes: 4096, uses: 2 },
    });
    const list = await call('GET', '/v1/adapters');
    const { generations, ...listed } = shown.body;
    expect(list.body.data).toEqual([listed]);
    expect(generations).toHaveLength(1);
    expect(JSON.stringify(list.body)).not.toContain(directory);
  });

  it('is shown with what it shares with others of its base', async () => {
    const { options, ...plain } = fakeManifest(4);
    harness.registry.store(
      fakeGeneration('ba'),
      { ...plain, kind: 'basis', options, describe: 'half of it' },
      9,
    );
    const needs = fakeGeneration('ba');
    const tenant = { ...plain, kind: 'svfit', options: { ...options, needs } } as const;
    harness.registry.store(fakeGeneration('ca'), tenant, 7);
    harness.registry.create('tenant', fakeGeneration('ca'));
    const { body } = await call('GET', '/v1/adapters/tenant');
    expect(body).toMatchObject({ kind: 'svfit', needs, needs_describe: 'half of it' });
    const { body: other } = await call('GET', '/v1/adapters/support');
    expect(other).toMatchObject({ needs: null, needs_describe: null });
  });

  it('is shown in memory when its file is, and no slot has it', async () => {
    const tier = async () => ((await call('GET', '/v1/adapters/support')).body as Json).residency;
    expect(await tier()).toEqual({ tier: 'disk' });
    harness.engine.figures = { hosted: [generationA] };
    expect(await tier()).toEqual({ tier: 'host' });
    const page = await (await harness.fetch('GET', '/metrics')).text();
    expect(page).toContain('rankgate_adapters{tier="host"} 1\n');
    const slot = { generation: generationA, rank: 8, bytes: 1, uses: 0 };
    harness.engine.figures = { hosted: [generationA], residents: [slot] };
    expect(await tier()).toMatchObject({ tier: 'slot', rank: 8 });
  });

  it('is swapped under If-Match, rolled back and removed', async () => {
    const put = (generation: string, headers: Record<string, string> = {}) =>
      call('PUT', '/v1/adapters/support', { generation }, headers);
    expect((await put(generationB, { 'if-match': `"${generationB}"` })).status).toBe(409);
    expect((await put(generationB, { 'if-match': `"${generationA}"` })).body).toMatchObject({
      generation: generationB,
      previous: [generationA],
    });
    const back = await call('POST', '/v1/adapters/support/rollback');
    expect(back.body).toMatchObject({ generation: generationA });
    expect((await call('POST', '/v1/adapters/support/rollback')).status).toBe(409);
    expect(
      (await call('DELETE', '/v1/adapters/support', undefined, { 'if-match': generationB })).status,
    ).toBe(409);
    expect((await call('DELETE', '/v1/adapters/support')).body).toEqual({
      id: 'support',
      object: 'adapter',
      deleted: true,
    });
    expect((await call('GET', '/v1/models/support')).status).toBe(404);
    expect(harness.engine.unloaded).toEqual([generationA, generationB, generationA]);
  });

  it('is shown with every generation that it can go back to', async () => {
    harness.engine.figures = {
      residents: [{ generation: generationB, rank: 8, bytes: 77, uses: 1 }],
    };
    await call('PUT', '/v1/adapters/support', { generation: generationB });
    const { body } = await call('GET', '/v1/adapters/support');
    expect(body.generations.map((one: Json) => one.generation)).toEqual([generationB, generationA]);
    expect(body.generations).toMatchObject([
      { kind: 'lora', rank_max: 8, bytes: 999, residency: { tier: 'slot' }, levels: 'uniform' },
      { kind: 'lora', rank_max: 16, bytes: 1234, residency: { tier: 'disk' }, leases: 0 },
    ]);
    // The fakes' curve is k/R: its trapezoids have the mean of its ends.
    expect(body.aurac.v1).toBeCloseTo((1 / 8 + 1) / 2, 12);
  });

  it('has aliases, pins, and what they forbid', async () => {
    const alias = await call('PUT', '/v1/adapters/second/alias', { target: 'support' });
    expect(alias).toMatchObject({ status: 200, body: { name: 'support', aliases: ['second'] } });
    const models = await call('GET', '/v1/models');
    expect(models.body.data.map((model: Json) => [model.id, model.root]).slice(1)).toEqual([
      ['support', generationA],
      ['second', generationA],
    ]);
    expect((await call('GET', '/v1/models/second')).body).toMatchObject({ id: 'second' });
    expect((await call('GET', '/v1/adapters/second')).body).toMatchObject({ name: 'support' });
    expect(await call('POST', '/v1/adapters/support/pin')).toMatchObject({
      status: 200,
      body: { pinned: true },
    });
    expect(harness.engine.pinned).toEqual([generationA]);
    await call('PUT', '/v1/adapters/support', { generation: generationB });
    expect(harness.engine.pinned).toEqual([generationB]);
    await call('POST', '/v1/adapters/support/rollback');
    expect(harness.engine.pinned).toEqual([generationA]);
    expect((await call('POST', '/v1/adapters/support/unpin')).body.pinned).toBe(false);
    expect(harness.engine.pinned).toEqual([]);
    harness.engine.unloaded.length = 0;
    const base = await call('PUT', '/v1/adapters/tiny-base/alias', { target: 'support' });
    expect(base).toMatchObject({ status: 409, body: { error: { code: 'adapter_exists' } } });
    for (const body of [{}, { target: 'Not A Name' }, { target: 'support', extra: 1 }]) {
      expect((await call('PUT', '/v1/adapters/third/alias', body)).status).toBe(400);
    }
    expect((await call('PUT', '/v1/adapters/third/alias', { target: 'none' })).status).toBe(404);
    const removed = await call('DELETE', '/v1/adapters/second');
    expect(removed.body).toEqual({ id: 'second', object: 'adapter', deleted: true });
    expect((await call('GET', '/v1/adapters/support')).body.aliases).toEqual([]);
    expect(harness.engine.unloaded).toEqual([]);
  });

  it('is not unloaded from the engine while another name points at the generation', async () => {
    harness.registry.create('alias', generationA);
    await call('DELETE', '/v1/adapters/support');
    expect(harness.engine.unloaded).toEqual([]);
    await call('DELETE', '/v1/adapters/alias');
    expect(harness.engine.unloaded).toEqual([generationA]);
  });

  it.each([
    ['sha256:abc', 400],
    ['SHA256', 400],
    [`sha256:${'A'.repeat(64)}`, 400],
    ['sha256:../../etc/passwd', 400],
    [fakeGeneration('9'), 404],
  ])('is not swapped to %s', async (generation, status) => {
    expect((await call('PUT', '/v1/adapters/support', { generation })).status).toBe(status);
  });

  it.each(['nope', '..', 'a%2Fb', 'Support', '%00', 'x'.repeat(300)])(
    'is a 404 under %s, with every method',
    async (name) => {
      for (const [method, suffix] of [
        ['GET', ''],
        ['DELETE', ''],
        ['POST', '/rollback'],
        ['GET', '/export'],
      ] as const) {
        expect((await call(method, `/v1/adapters/${name}${suffix}`)).status).toBe(404);
      }
    },
  );

  it('refuses an If-Match that is no generation', async () => {
    const headers = { 'if-match': '"x"' };
    const put = await call('PUT', '/v1/adapters/support', { generation: generationB }, headers);
    expect(put).toMatchObject({ status: 400, body: { error: { param: 'if-match' } } });
  });
});

describe('GET /v1/adapters/{name}/export', () => {
  it('is a tar of the PEFT directory of that prefix', async () => {
    const response = await harness.fetch('GET', '/v1/adapters/support/export?rank=4');
    expect(response.status).toBe(200);
    expect(response.headers.get('content-type')).toBe('application/x-tar');
    expect(response.headers.get('content-disposition')).toBe(
      'attachment; filename="support-r4.tar"',
    );
    expect(response.headers.get('x-adapter-generation')).toBe(generationA);
    const bytes = new Uint8Array(await response.arrayBuffer());
    expect(Buffer.from(bytes).includes('support-r4/adapter_model.safetensors')).toBe(true);
    expect(Buffer.from(bytes).includes('"r":4')).toBe(true);
  });

  it.each(['0', '17', '-1', '4.5', '1e1', 'x', '', '4&rank=8'])('refuses rank=%s', async (rank) => {
    const refused = await call('GET', `/v1/adapters/support/export?rank=${rank}`);
    expect(refused).toMatchObject({ status: 400, body: { error: { param: 'rank' } } });
  });

  it('refuses parameters that it does not know', async () => {
    expect((await call('GET', '/v1/adapters/support/export?level=4')).status).toBe(400);
  });
});

describe("vLLM's calls", () => {
  it('load and unload with its answers', async () => {
    const loaded = await call('POST', '/v1/load_lora_adapter', {
      lora_name: 'v',
      lora_path: 'one',
    });
    expect(loaded).toMatchObject({
      status: 200,
      body: "Success: LoRA adapter 'v' added successfully.",
    });
    expect(loaded.headers.get('content-type')).toMatch(/^text\/plain/);
    const again = await call('POST', '/v1/load_lora_adapter', { lora_name: 'v', lora_path: 'one' });
    expect(again).toMatchObject({
      status: 400,
      body: { error: { message: "The lora adapter 'v' has already been loaded." } },
    });
    const inPlace = { lora_name: 'v', lora_path: 'one', load_inplace: true };
    expect((await call('POST', '/v1/load_lora_adapter', inPlace)).status).toBe(200);
    const unloaded = await call('POST', '/v1/unload_lora_adapter', { lora_name: 'v' });
    expect(unloaded.body).toBe("Success: LoRA adapter 'v' removed successfully.");
    expect((await call('POST', '/v1/unload_lora_adapter', { lora_name: 'v' })).status).toBe(404);
  });

  it('stay inside the root and refuse what they do not know', async () => {
    const outside = await call('POST', '/v1/load_lora_adapter', {
      lora_name: 'v',
      lora_path: '/etc',
    });
    expect(outside).toMatchObject({ status: 403, body: { error: { param: 'lora_path' } } });
    const extra = { lora_name: 'support', lora_int_id: 1 };
    expect(await call('POST', '/v1/unload_lora_adapter', extra)).toMatchObject({
      status: 400,
      body: { error: { param: 'lora_int_id' } },
    });
    const name = { lora_name: 'Not A Name', lora_path: 'one' };
    expect(await call('POST', '/v1/load_lora_adapter', name)).toMatchObject({
      status: 400,
      body: { error: { param: 'lora_name' } },
    });
  });

  it('are off unless the configuration turns them on', async () => {
    harness.close();
    harness = createHarness({ adaptersRoot: root });
    for (const path of ['/v1/load_lora_adapter', '/v1/unload_lora_adapter']) {
      const refused = await call('POST', path, {});
      expect(refused.status).toBe(404);
      expect(refused.body.error.code).toBe('runtime_lora_updating_disabled');
      expect(refused.body.error.message).toContain('runtimeLoraUpdating');
    }
  });
});

describe('GET /v1/models', () => {
  it('shows root, parent, generation and ranks', async () => {
    const list = await call('GET', '/v1/models');
    expect(list.body).toEqual({
      object: 'list',
      data: [
        {
          id: 'tiny-base',
          object: 'model',
          created: 1_700_000_000,
          owned_by: 'rankgate',
          root: 'tiny-base',
          parent: null,
          generation: `sha256:${'b'.repeat(64)}`,
          ranks: { min: 0, max: 0 },
          max_model_len: 4096,
        },
        {
          id: 'support',
          object: 'model',
          created: 1_700_000_000,
          owned_by: 'rankgate',
          root: generationA,
          parent: 'tiny-base',
          generation: generationA,
          ranks: { min: 0, max: 16 },
          max_model_len: 4096,
        },
      ],
    });
    for (const card of list.body.data) {
      expect((await call('GET', `/v1/models/${card.id}`)).body).toEqual(card);
    }
    expect((await call('GET', '/v1/models/nope')).body.error.code).toBe('model_not_found');
  });
});
