import { createHash } from 'node:crypto';
import { mkdtempSync, readdirSync, readFileSync, rmSync } from 'node:fs';
import { createServer, type Server } from 'node:http';
import type { AddressInfo } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { fetchHubAdapter, parseHubAdapter } from '../../../src/adapters/hub-adapter.ts';

// A local stand-in for the hub, as its client asks: the commit of a revision, then each file's size and hash, then bytes.

const commit = 'c0ffee'.padEnd(40, '0');
const config = Buffer.from('{"r": 4}\n');
const weights = Buffer.alloc(300_000, 'weights');
const gitHash = (bytes: Buffer): string =>
  createHash('sha1').update(`blob ${bytes.length}\0`).update(bytes).digest('hex');
const sha256 = (bytes: Buffer): string => createHash('sha256').update(bytes).digest('hex');

interface HubFile {
  body: Buffer;
  headers: Record<string, string>;
}

let server: Server;
let hubUrl: string;
let files: Record<string, HubFile>;
let asked: { path: string; authorization: string | undefined }[];
let folder: string;
/** Bytes after which every download is cut. */
let cutAfter: number | null;

beforeEach(async () => {
  folder = mkdtempSync(join(tmpdir(), 'rankgate-hub-'));
  asked = [];
  cutAfter = null;
  files = {
    'adapter_config.json': { body: config, headers: { etag: `"${gitHash(config)}"` } },
    'adapter_model.safetensors': {
      body: weights,
      headers: { etag: '"0123"', 'x-linked-etag': `"${sha256(weights)}"` },
    },
    'adapter_model.bin': { body: Buffer.from('PK'), headers: { etag: '"1"' } },
  };
  server = createServer((request, response) => {
    const path = request.url!.split('?')[0]!;
    asked.push({ path, authorization: request.headers.authorization });
    if (path.startsWith('/api/models/org/lora/revision/')) {
      const body = { _id: '1', id: 'org/lora', sha: commit, lastModified: '2026-01-01' };
      response.setHeader('content-type', 'application/json');
      response.end(JSON.stringify(body));
      return;
    }
    const file = files[path.replace(`/org/lora/resolve/${commit}/`, '')];
    if (file === undefined) {
      response.writeHead(404, { 'x-error-code': 'EntryNotFound' }).end();
      return;
    }
    const isProbe = request.headers.range === 'bytes=0-0';
    const body = isProbe ? file.body.subarray(0, 1) : file.body;
    const range = `bytes 0-${body.length - 1}/${file.body.length}`;
    response.writeHead(206, {
      ...file.headers,
      'content-range': range,
      'content-length': body.length,
    });
    if (isProbe || cutAfter === null || body.length < cutAfter) response.end(body);
    else response.write(body.subarray(0, cutAfter), () => response.destroy());
  });
  await new Promise<void>((done) => server.listen(0, '127.0.0.1', done));
  hubUrl = `http://127.0.0.1:${(server.address() as AddressInfo).port}`;
});
afterEach(() => {
  server.closeAllConnections();
  server.close();
  rmSync(folder, { recursive: true });
});

const fetchIt = (source: string, more: { hubToken?: string; weightsBytesMax?: number } = {}) =>
  fetchHubAdapter(parseHubAdapter(source), folder, {
    hubUrl,
    weightsBytesMax: 1_000_000,
    ...more,
  });

describe('an adapter on the hub', () => {
  it('is its two files at one commit, checked against the hub’s hashes', async () => {
    expect(await fetchIt('hf:org/lora@v1')).toBe(commit);
    expect(readdirSync(folder).sort()).toEqual([
      'adapter_config.json',
      'adapter_model.safetensors',
    ]);
    expect(readFileSync(join(folder, 'adapter_config.json'))).toEqual(config);
    expect(readFileSync(join(folder, 'adapter_model.safetensors'))).toEqual(weights);
    expect(asked[0]!.path).toBe('/api/models/org/lora/revision/v1');
    // No branch name after that: both files are of the commit.
    const later = asked.slice(1).map(({ path }) => path);
    expect(later.length).toBeGreaterThan(3);
    for (const path of later) expect(path).toMatch(`/org/lora/resolve/${commit}/`);
    expect(asked.every(({ authorization }) => authorization === undefined)).toBe(true);
  });

  it('of a commit asks for no revision, with the token where there is one', async () => {
    await fetchIt(`hf:org/lora@${commit}`, { hubToken: 'hf_secret' });
    expect(asked.some(({ path }) => path.startsWith('/api/'))).toBe(false);
    expect(new Set(asked.map(({ authorization }) => authorization))).toEqual(
      new Set(['Bearer hf_secret']),
    );
  });

  it.each<[string, () => void, string, RegExp]>([
    [
      'has no weights',
      () => delete files['adapter_model.safetensors'],
      'INVALID_ADAPTER',
      /safetensors is missing/,
    ],
    ['has no config', () => delete files['adapter_config.json'], 'INVALID_ADAPTER', /is missing/],
    [
      'has other weights than its hash',
      () => (files['adapter_model.safetensors']!.body = Buffer.alloc(300_000, 'changed')),
      'INVALID_ADAPTER',
      /not what the hub says/,
    ],
    [
      'has another config than its hash',
      () => (files['adapter_config.json']!.body = Buffer.from('{"r": 5}\n')),
      'INVALID_ADAPTER',
      /not what the hub says/,
    ],
    [
      'has no hash',
      () => (files['adapter_config.json']!.headers = { etag: '"abc"' }),
      'INVALID_ADAPTER',
      /states no hash/,
    ],
    [
      'has too large a config',
      () => (files['adapter_config.json']!.body = Buffer.alloc(2 ** 20 + 1)),
      'PAYLOAD_TOO_LARGE',
      /at most 1048576/,
    ],
    ['breaks off', () => (cutAfter = 100_000), 'NO_CAPACITY', /did not send all/],
  ])('that %s is refused', async (_, change, code, message) => {
    change();
    await expect(fetchIt('hf:org/lora')).rejects.toMatchObject({
      code,
      message: expect.stringMatching(message),
    });
  });

  it('that is too large, or of nobody, is refused before it is fetched', async () => {
    await expect(fetchIt('hf:org/lora', { weightsBytesMax: 299_999 })).rejects.toMatchObject({
      code: 'PAYLOAD_TOO_LARGE',
    });
    expect(readdirSync(folder)).toEqual(['adapter_config.json']);
    for (const none of ['hf:org/none', `hf:org/none@${commit}`]) {
      const code = none.includes('@') ? 'INVALID_ADAPTER' : 'INVALID_REQUEST';
      await expect(fetchIt(none)).rejects.toMatchObject({ code });
    }
  });

  it('says so when the hub is not there', async () => {
    hubUrl = 'http://127.0.0.1:1';
    await expect(fetchIt('hf:org/lora')).rejects.toMatchObject({
      code: 'NO_CAPACITY',
      message: expect.stringContaining('is not reachable'),
    });
  });

  it.each([
    'hf:org',
    'hf:org/lora/file.gguf',
    'hf:../lora',
    'hf:org/..',
    'hf:org/lora@',
    'hf:org/lora@../x',
    'hf:org/lora@a..b',
    'hf:org/lo ra',
    'hf:org/lora?x=1',
    'hf:org/lora#x',
    'HF:org/lora',
    `hf:org/${'a'.repeat(97)}`,
  ])('is not named %j', (source) => {
    expect(() => parseHubAdapter(source)).toThrow(
      expect.objectContaining({ code: 'INVALID_REQUEST', param: 'source' }),
    );
  });
});
