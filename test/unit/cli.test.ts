import { createHash } from 'node:crypto';
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { createServer, type Server } from 'node:http';
import type { AddressInfo } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { usage } from '../../src/commands.ts';
import { curlOf } from '../../src/serve.ts';
import { createProgress, renderProgress } from '../../src/terminal.ts';
import { type Ran, runAsScript } from '../support/run-command.ts';

interface Seen {
  readonly method: string | undefined;
  readonly path: string | undefined;
  readonly authorization: string | undefined;
  readonly ifMatch: string | undefined;
  readonly body: unknown;
}

const generation = `sha256:${'a'.repeat(64)}`;
const adapter = {
  name: 'support',
  generation,
  rank_max: 16,
  bytes: 9_800_000,
  kind: 'lora',
  leases: 0,
  aliases: [],
  pinned: false,
  residency: { tier: 'disk' },
};

let server: Server;
let seen: Seen[];
let reply: { status: number; body: string };
let environment: NodeJS.ProcessEnv;
let dir: string;

beforeEach(async () => {
  seen = [];
  reply = { status: 200, body: JSON.stringify(adapter) };
  dir = mkdtempSync(join(tmpdir(), 'cli-'));
  server = createServer((request, response) => {
    const chunks: Buffer[] = [];
    request.on('data', (chunk: Buffer) => chunks.push(chunk));
    request.on('end', () => {
      const text = Buffer.concat(chunks).toString();
      const isJson = request.headers['content-type'] === 'application/json';
      seen.push({
        method: request.method,
        path: request.url,
        authorization: request.headers.authorization,
        ifMatch: request.headers['if-match'],
        body: isJson ? JSON.parse(text) : text === '' ? null : text,
      });
      response.writeHead(reply.status).end(reply.body);
    });
  });
  await new Promise<void>((done) => server.listen(0, '127.0.0.1', done));
  environment = { RANKGATE_URL: `http://127.0.0.1:${(server.address() as AddressInfo).port}` };
});
afterEach(() => {
  server.closeAllConnections();
  server.close();
  rmSync(dir, { recursive: true, force: true });
});

const run = (...args: string[]): Promise<Ran> => runAsScript(args, environment);

describe('the adapters commands', () => {
  it.each<[string[], Partial<Seen>]>([
    [['list'], { method: 'GET', path: '/v1/adapters' }],
    [['show', 'support'], { method: 'GET', path: '/v1/adapters/support' }],
    [
      ['add', 'support', 'some/where', '--on-server', '--accept-base-name', 'org/base'],
      {
        method: 'POST',
        path: '/v1/adapters',
        body: { name: 'support', source: 'some/where', accept_base_name: 'org/base' },
      },
    ],
    [
      ['add', 'support', 'hf:org/a@v1', '--replace', '--expect', generation, '--levels', 'uniform'],
      {
        body: {
          name: 'support',
          source: 'hf:org/a@v1',
          replace: true,
          if_generation: generation,
          levels: 'uniform',
        },
      },
    ],
    [
      ['swap', 'support', generation, '--expect', generation],
      {
        method: 'PUT',
        path: '/v1/adapters/support',
        ifMatch: generation,
        body: { generation },
      },
    ],
    [['pin', 'acme/support'], { method: 'POST', path: '/v1/adapters/acme%2Fsupport/pin' }],
    [['unpin', 'support'], { method: 'POST', path: '/v1/adapters/support/unpin' }],
    [
      ['alias', 'second', 'support'],
      { method: 'PUT', path: '/v1/adapters/second/alias', body: { target: 'support' } },
    ],
    [['rollback', 'support'], { method: 'POST', path: '/v1/adapters/support/rollback' }],
    [
      ['squeeze', 'support', '--rank', '4', '--expect', generation],
      {
        method: 'POST',
        path: '/v1/adapters/support/squeeze',
        body: { rank: 4 },
        ifMatch: generation,
      },
    ],
    [
      ['squeeze', 'support', '--variance', '0.95'],
      { method: 'POST', path: '/v1/adapters/support/squeeze', body: { variance: 0.95 } },
    ],
    [
      ['rm', 'support', '--expect', generation],
      { method: 'DELETE', path: '/v1/adapters/support', ifMatch: generation },
    ],
    [['show', '../admin?x'], { path: '/v1/adapters/..%2Fadmin%3Fx' }],
  ])('%j makes the call %j', async (args, wanted) => {
    environment.RANKGATE_API_KEY = 'a-key-of-sixteen-or-more';
    const { exitCode, err } = await run('adapters', ...args);
    expect({ exitCode, err }).toEqual({ exitCode: 0, err: '' });
    expect(seen).toHaveLength(1);
    expect(seen[0]).toMatchObject({ authorization: 'Bearer a-key-of-sixteen-or-more', ...wanted });
  });

  it('print one line an adapter, or the answer itself as JSON', async () => {
    reply.body = JSON.stringify({ object: 'list', data: [adapter, { ...adapter, name: 'sales' }] });
    const plain = await run('adapters', 'list');
    expect(plain.out.trim().split('\n')).toHaveLength(2);
    expect(plain.out).toContain('sales  sha256:aaaaaaaaaaaa…  lora  rank 16  9.8 MB  disk');
    expect((await run('adapters', 'list', '--json')).out).toBe(`${reply.body}\n`);
  });

  it('show the warnings of an import beside its result', async () => {
    reply.body = JSON.stringify({ ...adapter, warnings: ['3 modules did not match'] });
    const { out, err } = await run('adapters', 'add', 'support', '/a', '--on-server');
    expect(out).toContain('support');
    expect(err).toBe('warning: 3 modules did not match\n');
  });

  it('add sends the files of a directory with its progress, and compares what arrived', async () => {
    const weights = Buffer.alloc(300_000, 'w');
    writeFileSync(join(dir, 'adapter_config.json'), '{"r": 8}');
    writeFileSync(join(dir, 'adapter_model.safetensors'), weights);
    writeFileSync(join(dir, 'README.md'), 'stays here');
    const sha256 = createHash('sha256').update(weights).digest('hex');
    reply.body = JSON.stringify({ ...adapter, upload: { bytes: weights.length, sha256 } });
    const sent = await run('adapters', 'add', 'acme/support', dir, '--replace');
    expect(sent).toMatchObject({ exitCode: 0, out: expect.stringContaining('support  sha256:') });
    const bars = sent.err.trim().split('\n');
    expect(bars.length).toBeGreaterThan(1);
    expect(bars.at(-1)).toMatch(/100 % 0\.3 of 0\.3 MB$/);
    const body = String(seen[0]!.body);
    expect([...body.matchAll(/ name="([^"]+)"/g)].map((match) => match[1])).toEqual([
      'name',
      'replace',
      'adapter_config.json',
      'adapter_model.safetensors',
    ]);
    expect(body).toContain('\r\n\r\nacme/support\r\n');
    expect(body).toContain(weights.toString());
    const quiet = await run('adapters', 'add', 'support', dir, '--json');
    expect(quiet).toEqual({ exitCode: 0, out: `${reply.body}\n`, err: '' });
    reply.body = JSON.stringify({ ...adapter, upload: { bytes: 1, sha256: '0'.repeat(64) } });
    expect(await run('adapters', 'add', 'support', dir)).toMatchObject({
      exitCode: 1,
      err: expect.stringContaining('the server got other weights'),
    });
  });

  it('add sends nothing of a directory without weights', async () => {
    const { exitCode, err } = await run('adapters', 'add', 'support', join(dir, 'nothing'));
    expect([exitCode, seen]).toEqual([1, []]);
    expect(err).toContain('there is no adapter_model.safetensors');
  });

  it('show says what is pinned, what follows, and what was before', async () => {
    const past = { generation: `sha256:${'b'.repeat(64)}`, kind: 'fly', rank_max: 32 };
    reply.body = JSON.stringify({
      ...adapter,
      pinned: true,
      aliases: ['second', 'third'],
      generations: [adapter, past],
    });
    const { out } = await run('adapters', 'show', 'support');
    expect(out.split('\n').slice(0, 2)).toEqual([
      expect.stringMatching(/in use 0 {2}pinned {2}also second, third$/),
      `  before: ${past.generation}  fly  rank 32`,
    ]);
  });

  it('export to a file, and never over one that is there', async () => {
    reply.body = 'a tar';
    const output = join(dir, 'out.tar');
    const first = await run('adapters', 'export', 'support', '--rank', '8', '--output', output);
    expect(first).toMatchObject({ exitCode: 0, out: `${output}: 5 bytes\n` });
    expect(seen[0]?.path).toBe('/v1/adapters/support/export?rank=8');
    expect(readFileSync(output, 'utf8')).toBe('a tar');
    reply.body = 'another';
    expect(await run('adapters', 'export', 'support', '--output', output)).toMatchObject({
      exitCode: 1,
    });
    expect(readFileSync(output, 'utf8')).toBe('a tar');
  });

  it('exit with 1 and the reason when the server refuses', async () => {
    const error = { message: 'another generation', code: 'generation_mismatch', type: 'x' };
    reply = { status: 409, body: JSON.stringify({ error }) };
    const plain = await run('adapters', 'rollback', 'support');
    expect(plain).toEqual({ exitCode: 1, out: '', err: 'another generation\n' });
    const json = await run('adapters', 'rollback', 'support', '--json');
    expect(JSON.parse(json.err)).toEqual({
      error: { code: 'generation_mismatch', message: 'another generation' },
    });
    reply = { status: 502, body: '<html>' };
    expect((await run('adapters', 'list')).err).toBe('the server answered 502\n');
  });

  it('exit with 3 when no server answers', async () => {
    const { exitCode, err } = await run('adapters', 'list', '--url', 'http://127.0.0.1:1');
    expect(exitCode).toBe(3);
    expect(err).toContain('no rankgate answers at http://127.0.0.1:1');
  });
});

describe('the command line', () => {
  it.each([
    [[]],
    [['fly']],
    [['adapters']],
    [['adapters', 'fly']],
    [['toString']],
    [['adapters', 'list', '--fast']],
    [['adapters', 'list', 'extra']],
    [['adapters', 'show']],
    [['adapters', 'swap', 'support']],
    [['adapters', 'list', '--url', 'nowhere']],
    [['serve', '--api-keys', 'a-key-of-sixteen-or-more']],
    [['serve', '--port']],
    [['serve', 'model.gguf']],
  ])('%j is wrong usage: exit code 2, nothing done', async (args) => {
    const { exitCode, out, err } = await run(...args);
    expect({ exitCode, out }).toEqual({ exitCode: 2, out: '' });
    expect(err).toContain('rankgate serve');
    expect(seen).toEqual([]);
  });

  it('a wrong setting stops serve before anything is fetched', async () => {
    const { exitCode, err } = await run('serve', '--port', 'http', '--data-dir', dir);
    expect({ exitCode, err }).toEqual({
      exitCode: 1,
      err: 'configuration: port: want a whole number (--port)\n',
    });
  });

  it('a model that is not there stops serve with its reason', async () => {
    const { exitCode, err } = await run(
      'serve',
      '--model',
      '/no/x.gguf',
      '--data-dir',
      dir,
      '--json',
    );
    expect(exitCode).toBe(1);
    expect(JSON.parse(err)).toEqual({
      error: { code: 'INVALID_REQUEST', message: 'model: there is no file /no/x.gguf' },
    });
  });

  it('shows its usage and its version', async () => {
    expect(await run('help')).toEqual({ exitCode: 0, out: usage, err: '' });
    expect(await run('adapters', 'add', '--help')).toEqual({ exitCode: 0, out: usage, err: '' });
    expect((await run('--version')).out).toMatch(/^\d+\.\d+\.\d+\n$/);
  });
});

describe('progress', () => {
  it('is a bar with bytes', () => {
    expect(renderProgress({ label: 'a.gguf', done: 30_000_000, total: 60_000_000 })).toBe(
      `a.gguf [${'#'.repeat(15)}${'-'.repeat(15)}]  50 % 30.0 of 60.0 MB`,
    );
  });

  it('is redrawn per percent on a terminal and written per tenth in a log', () => {
    for (const [isTerminal, lines] of [
      [true, 101],
      [false, 11],
    ] as const) {
      const written: string[] = [];
      const report = createProgress((text) => written.push(text), isTerminal);
      for (let done = 0; done <= 100_000; done++) report({ label: 'a', done, total: 100_000 });
      expect(written).toHaveLength(lines);
      expect(written.at(-1)).toMatch(/100 % .*\n$/);
    }
  });
});

it('the curl that serve prints quotes its body for a shell', () => {
  const curl = curlOf('http://127.0.0.1:8080', 'smollm2-135m-instruct', true);
  expect(curl).toContain('$RANKGATE_API_KEY');
  const body = /-d '([^']*)'$/.exec(curl)?.[1];
  expect(JSON.parse(body!)).toMatchObject({ model: 'smollm2-135m-instruct', stream: true });
});
