import { createHash } from 'node:crypto';
import { mkdtempSync, readdirSync, readFileSync, rmSync } from 'node:fs';
import { mkdir, open, rm } from 'node:fs/promises';
import { createServer } from 'node:http';
import { type AddressInfo, connect } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { GatewayError } from '../../src/errors.ts';
import { createAddAdapter } from '../../src/server/add-adapter.ts';
import { type Listening, listen } from '../../src/server/listen.ts';
import {
  apiKeys,
  createHarness,
  generationA,
  generationB,
  type Harness,
  type Json,
  keyPlain,
  settleTasks,
} from '../support/http-harness.ts';

let harness: Harness;
let root: string;
beforeEach(() => {
  root = mkdtempSync(join(tmpdir(), 'rankgate-uploads-'));
  harness = createHarness({ uploadRoot: root });
});
afterEach(() => {
  expect(readdirSync(root), 'a folder was left').toEqual([]);
  harness.close();
  rmSync(root, { recursive: true });
});

const weights = Buffer.alloc(20_000, 'abc\r\n--');
const config = Buffer.from('{"r": 8}');
type Piece = readonly [name: string, body: string | Buffer];
const whole: readonly Piece[] = [
  ['name', 'new'],
  ['adapter_config.json', config],
  ['adapter_model.safetensors', weights],
];
const boundary = 'xyz';
const type = { 'content-type': `multipart/form-data; boundary=${boundary}` };

function encode(pieces: readonly Piece[]): Buffer {
  const parts = pieces.flatMap(([name, body]) => [
    Buffer.from(`--${boundary}\r\nContent-Disposition: form-data; name="${name}"\r\n\r\n`),
    Buffer.from(body),
    Buffer.from('\r\n'),
  ]);
  return Buffer.concat([...parts, Buffer.from(`--${boundary}--\r\n`)]);
}

async function upload(
  pieces: readonly Piece[] | ReadableStream,
  headers: Record<string, string> = {},
): Promise<{ status: number; body: Json; headers: Headers }> {
  const body = pieces instanceof ReadableStream ? pieces : encode(pieces);
  const response = await harness.fetch('POST', '/v1/adapters', {
    headers: { ...type, ...headers },
    body,
  });
  return { status: response.status, body: await response.json(), headers: response.headers };
}

/** What the importer found in the folder that it was sent to. */
function spyOnImport(): Record<string, Buffer>[] {
  const seen: Record<string, Buffer>[] = [];
  const { importer } = harness;
  const real = importer.importPeft.bind(importer);
  importer.importPeft = (directory, options) => {
    const names = readdirSync(directory);
    seen.push(Object.fromEntries(names.map((name) => [name, readFileSync(join(directory, name))])));
    return real(directory, options);
  };
  return seen;
}

/** A body that stays open; `send` adds to it. */
function openBody(): { stream: ReadableStream; send(bytes: Uint8Array): void; cut(): void } {
  let controller: ReadableStreamDefaultController | null = null;
  const stream = new ReadableStream({
    start(opened) {
      controller = opened;
    },
  });
  return {
    stream,
    send: (bytes) => controller!.enqueue(bytes),
    cut: () => controller!.error(new Error('reset')),
  };
}

describe('an upload', () => {
  it('is imported from a folder of its own, with the hash of what arrived', async () => {
    const seen = spyOnImport();
    const added = await upload(whole);
    expect(added).toMatchObject({
      status: 201,
      body: {
        name: 'new',
        generation: generationB,
        warnings: [],
        upload: {
          bytes: weights.length,
          sha256: createHash('sha256').update(weights).digest('hex'),
        },
      },
    });
    expect(seen).toEqual([{ 'adapter_config.json': config, 'adapter_model.safetensors': weights }]);
    expect(JSON.stringify(added.body)).not.toContain(root);
  });

  it('may have a rankgate.json in place of PEFT’s config', async () => {
    const seen = spyOnImport();
    const added = await upload([whole[0]!, ['rankgate.json', '{}'], whole[2]!]);
    expect(added.status).toBe(201);
    expect(new Set(Object.keys(seen[0]!))).toEqual(
      new Set(['adapter_model.safetensors', 'rankgate.json']),
    );
  });

  it('replaces under the expected generation, with the options of the JSON call', async () => {
    const fields: Piece[] = [
      ['name', 'support'],
      ['replace', 'true'],
      ['accept_base_name', 'org/other'],
      ['levels', 'uniform'],
    ];
    const lost = await upload([...fields, ['if_generation', generationB], ...whole.slice(1)]);
    expect(lost).toMatchObject({ status: 409, body: { error: { code: 'generation_mismatch' } } });
    expect(harness.registry.find('support')!.generation).toBe(generationA);
    const won = await upload([...fields, ['if_generation', generationA], ...whole.slice(1)]);
    expect(won).toMatchObject({ status: 200, body: { generation: generationB } });
    expect(harness.importer.options.at(-1)).toEqual({
      acceptBaseName: 'org/other',
      levels: 'uniform',
    });
  });

  it.each<[string, readonly Piece[], number, string | null]>([
    ['no name', whole.slice(1), 400, 'name'],
    ['a taken name', [['name', 'support'], ...whole.slice(1)], 409, 'name'],
    ['the base’s name', [['name', 'tiny-base'], ...whole.slice(1)], 409, 'name'],
    ['a name that is a path', [['name', '../x'], ...whole.slice(1)], 400, 'name'],
    ['an unknown field', [['rank', '8'], ...whole], 400, 'rank'],
    ['a source', [['source', 'one'], ...whole], 400, 'source'],
    ['a field too long', [['name', 'a'.repeat(2000)], ...whole.slice(1)], 400, 'name'],
    ['replace: maybe', [['replace', 'maybe'], ...whole], 400, 'replace'],
    ['if_generation alone', [['if_generation', generationA], ...whole], 400, 'if_generation'],
    ['other levels', [['levels', 'best'], ...whole], 400, 'levels'],
    ['a field after the files', [...whole, ['replace', 'true']], 400, 'replace'],
    ['a file twice', [...whole, whole[1]!], 400, 'adapter_config.json'],
    ['a file of another name', [...whole, ['adapter_model.bin', 'PK']], 400, 'adapter_model.bin'],
    ['a path for a file', [['../../x', 'y'], ...whole], 400, null],
    ['no weights', whole.slice(0, 2), 400, 'adapter_model.safetensors'],
    ['weights alone', [whole[0]!, whole[2]!], 400, 'adapter_model.safetensors'],
    ['two configs', [...whole, ['rankgate.json', '{}']], 400, 'adapter_model.safetensors'],
    ['a prototype', [['__proto__', 'x'], ...whole], 400, '__proto__'],
  ])('is refused with %s', async (_, pieces, status, param) => {
    const refused = await upload(pieces);
    expect(refused).toMatchObject({ status, body: { error: { param } } });
    expect(harness.importer.directories).toEqual([]);
  });

  it.each([
    ['as too large by what it says', { 'content-length': '99999999' }, weights],
    ['when its weights turn out too large', {}, Buffer.alloc(64 * 1024 + 1)],
  ])('is refused %s', async (_, headers, body) => {
    const refused = await upload(
      [...whole.slice(0, 2), ['adapter_model.safetensors', body]],
      headers,
    );
    expect(refused).toMatchObject({ status: 413, body: { error: { code: 'payload_too_large' } } });
  });

  it('is refused compressed, and without a boundary', async () => {
    expect((await upload(whole, { 'content-encoding': 'gzip' })).status).toBe(415);
    expect((await upload(whole, { 'content-type': 'multipart/form-data' })).status).toBe(415);
  });

  it('leaves nothing when its import fails', async () => {
    harness.importer.next = new GatewayError('INVALID_ADAPTER', '3 of 7 tensors matched');
    expect(await upload(whole)).toMatchObject({
      status: 422,
      body: { error: { message: '3 of 7 tensors matched' } },
    });
    expect(harness.registry.find('new')).toBeNull();
  });

  it('leaves nothing when its sender goes away', async () => {
    const { stream, send, cut } = openBody();
    const answer = upload(stream);
    send(encode(whole).subarray(0, 10_000));
    // Its folder is made by another thread: however long that takes, it comes, or the test ends by its own limit.
    while (readdirSync(root).length === 0) await settleTasks();
    expect(readdirSync(root)).toHaveLength(1);
    cut();
    expect(await answer).toMatchObject({ status: 499, body: { error: { code: 'cancelled' } } });
  });

  it.each([
    ['nothing at all', 0, 15_000],
    ['half of it, and then a byte now and then', 10_000, 15_153],
  ])('is cut off after %s', async (_, bytes, waitMs) => {
    const { stream, send } = openBody();
    let ended = false;
    const answer = upload(stream).finally(() => {
      ended = true;
    });
    send(encode(whole).subarray(0, bytes));
    // Each byte is written to a real file: only when the next one is waited for does the clock count.
    const isWaiting = async () => {
      await settleTasks();
      await expect.poll(() => harness.clock.pending(), { interval: 2 }).toBe(1);
    };
    for (let ms = 0; ms < waitMs - 1500; ms += 1000) {
      await isWaiting();
      harness.clock.advance(1000);
      if (bytes > 0) send(Uint8Array.of(ms / 1000));
    }
    await isWaiting();
    expect(ended).toBe(false);
    harness.clock.advance(2500);
    expect(await answer).toMatchObject({
      status: 408,
      body: { error: { code: 'request_timeout' } },
    });
  });

  it('may take long to be written: only the wait for its sender counts', async () => {
    const { importer, clock } = harness;
    const real = importer.importPeft.bind(importer);
    importer.importPeft = (directory, options) => {
      clock.advance(3_600_000);
      return real(directory, options);
    };
    expect((await upload(whole)).status).toBe(201);
  });

  it('waits for no slot: too many at a time are told to come back', async () => {
    harness.close();
    harness = createHarness({ uploadRoot: root, uploadsMax: 3, apiKeys });
    const authorization = `Bearer ${keyPlain.admin}`;
    const bodies = [openBody(), openBody()];
    const open = bodies.map(({ stream }) => upload(stream, { authorization }));
    await settleTasks();
    // Two of three: one tenant's share.
    const refused = await upload(whole, { authorization });
    expect(refused).toMatchObject({ status: 429, body: { error: { code: 'contended' } } });
    expect(refused.headers.get('retry-after')).toBe('5');
    for (const { cut } of bodies) cut();
    expect((await Promise.all(open)).map(({ status }) => status)).toEqual([499, 499]);
    expect((await upload(whole, { authorization })).status).toBe(201);
  });

  it('is turned away while the server drains', async () => {
    harness.lifecycle.isDraining = true;
    expect((await upload(whole)).status).toBe(503);
    harness.lifecycle.isDraining = false;
  });

  it.each(['mkdir', 'open', 'writeFile'] as const)(
    'is told that the disk is full when %s says so, and leaves nothing',
    async (failing) => {
      const full = () => Promise.reject(Object.assign(new Error('ENOSPC: x'), { code: 'ENOSPC' }));
      const files: Parameters<typeof createAddAdapter>[0] = {
        mkdir: (failing === 'mkdir' ? full : mkdir) as typeof mkdir,
        rm,
        open: async (path, flags, mode) => {
          if (failing === 'open') await full();
          const handle = await open(path, flags, mode);
          if (failing === 'writeFile') handle.writeFile = full as typeof handle.writeFile;
          return handle;
        },
      };
      const route = harness.app.routes.find(
        ({ method, path }) => method === 'POST' && path === '/v1/adapters',
      )!;
      // The table's entries are what the app calls.
      (route as { handle: unknown }).handle = createAddAdapter(files);
      expect(await upload(whole)).toMatchObject({
        status: 507,
        body: { error: { code: 'disk_full', message: 'no space left to store this' } },
      });
    },
  );
});

it('a JSON body that does not come is not waited for either', async () => {
  const { stream, send } = openBody();
  const headers = { 'content-type': 'application/json' };
  const answer = harness.fetch('POST', '/v1/chat/completions', { headers, body: stream });
  send(Buffer.from('{"model":'));
  await expect.poll(() => harness.clock.pending()).toBe(1);
  await settleTasks();
  harness.clock.advance(15_001);
  expect((await answer).status).toBe(408);
});

it('a download asks the hub with the operator’s token for the operator alone, and leaves nothing', async () => {
  const tokens: Array<string | undefined> = [];
  const hub = createServer((request, response) => {
    tokens.push(request.headers.authorization);
    response.writeHead(404).end();
  });
  await new Promise<void>((done) => hub.listen(0, '127.0.0.1', done));
  harness.close();
  harness = createHarness({
    uploadRoot: root,
    hubUrl: `http://127.0.0.1:${(hub.address() as AddressInfo).port}`,
    hubToken: 'hf_secret',
    apiKeys: apiKeys
      .map((key) => ({ ...key, tenant: key.access === 'admin' ? null : 'acme' }))
      .concat({
        digest: createHash('sha256').update('acme-admin').digest(),
        access: 'admin',
        tenant: 'acme',
      }),
  });
  for (const [key, name] of [
    [keyPlain.admin, 'new'],
    ['acme-admin', 'acme/new'],
  ]) {
    const body = { name, source: 'hf:org/lora' };
    const refused = await harness.post('/v1/adapters', body, { authorization: `Bearer ${key}` });
    expect(refused.status).toBe(400);
    expect(await refused.json()).toMatchObject({ error: { param: 'source' } });
  }
  expect(tokens).toEqual(['Bearer hf_secret', undefined]);
  hub.close();
});

describe('on a socket', () => {
  let listening: Listening;
  beforeEach(async () => {
    const { app, lifecycle } = harness;
    const limits = { connectionsMax: 8, keepAliveMs: 1000, requestMsMax: 60_000 };
    listening = await listen(app, lifecycle, { host: '127.0.0.1', port: 0, ...limits });
  });
  afterEach(() => listening.close(0));

  it('an upload is streamed in, and a connection that breaks leaves nothing', async () => {
    const form = new FormData();
    form.set('name', 'new');
    form.set('adapter_config.json', new Blob([config]), 'any name');
    form.set('adapter_model.safetensors', new Blob([weights]), 'b.bin');
    const url = `http://127.0.0.1:${listening.port}/v1/adapters`;
    const seen = spyOnImport();
    const response = await fetch(url, { method: 'POST', body: form });
    expect(response.status, await response.text()).toBe(201);
    expect(seen[0]!['adapter_model.safetensors']).toEqual(weights);

    const socket = connect(listening.port, '127.0.0.1');
    const head = `POST /v1/adapters HTTP/1.1\r\nHost: localhost\r\nContent-Type: ${type['content-type']}\r\nContent-Length: 30000\r\n\r\n`;
    socket.write(head);
    socket.write(encode([['name', 'other'], ...whole.slice(1)]).subarray(0, 9000));
    await expect.poll(() => readdirSync(root).length).toBe(1);
    socket.destroy();
    await expect.poll(() => readdirSync(root)).toEqual([]);
    await expect
      .poll(() => harness.logs.map((line) => JSON.parse(line).status))
      .toEqual([201, 499]);
    expect(harness.registry.find('other')).toBeNull();
  });

  it('an upload that is refused half-way gets its answer', async () => {
    const form = new FormData();
    form.set('name', 'new');
    form.set('adapter_config.json', new Blob([config]));
    form.set('adapter_model.safetensors', new Blob([Buffer.alloc(4_000_000)]));
    const url = `http://127.0.0.1:${listening.port}/v1/adapters`;
    const response = await fetch(url, { method: 'POST', body: form });
    expect(response.status).toBe(413);
    await response.text();
  });
});
