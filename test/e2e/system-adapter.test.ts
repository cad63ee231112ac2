import { mkdirSync, mkdtempSync, rmSync, truncateSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { createPacker, generationOf, openPacked } from '../../src/adapters/pack.ts';
import { packedConfig } from '../../src/adapters/packed-import.ts';
import { servedPair } from '../../src/adapters/served.ts';
import { sha256OfFile } from '../../src/model/file-hash.ts';
import { type GatewayProcess, startGatewayProcess } from '../support/gateway-process.ts';
import { type MadeFile, makePacked } from '../support/make-packed.ts';
import { runAsScript } from '../support/run-command.ts';

// A gateway whose system adapter is configured and not there, then there, then there and broken: /readyz sends nobody to it
// while every request would fail.

const modelPath = join(import.meta.dirname, '../golden/tiny/tiny-f32.gguf');
let dataDir: string;
let gateway: GatewayProcess;

beforeAll(async () => {
  dataDir = mkdtempSync(join(tmpdir(), 'rankgate-system-'));
  gateway = await startGatewayProcess({
    ...{ modelPath, dataDir },
    flags: [
      '--threads',
      '1',
      '--adapter-pages',
      '4',
      '--kv-cells',
      '512',
      '--system-adapter',
      'repair',
    ],
  });
}, 180_000);
afterAll(async () => {
  await gateway[Symbol.asyncDispose]();
  rmSync(dataDir, { recursive: true, force: true });
});

async function ready(): Promise<{ status: number; reason?: string }> {
  const response = await gateway.fetch('/readyz');
  const { reason } = (await response.json()) as { reason?: string };
  return { status: response.status, ...(reason === undefined ? {} : { reason }) };
}

const ask = async (): Promise<number> => {
  const body = { model: gateway.modelName, prompt: [294, 71], max_tokens: 2 };
  const response = await gateway.post('/v1/completions', body);
  await response.text();
  return response.status;
};

/** What `adapters compensate` writes, of seeded numbers and for the file that is served. */
async function writeRepair(folder: string, seed: number): Promise<string> {
  const { bytes, generation }: MadeFile = makePacked({ kind: 'eora', rank: 8, seed });
  const { manifest, page } = openPacked(bytes, generation);
  const packer = createPacker();
  for (const { block, projection, in: width, out } of manifest.modules) {
    const { a, b } = page({ block, projection }, 0)!;
    const small = (halves: Uint16Array): Float64Array =>
      Float64Array.from(halves, (half) => (half % 7) / 1000);
    const pair = { rank: 8, a: small(a), b: small(b) };
    expect([pair.a.length, pair.b.length]).toEqual([8 * width, 8 * out]);
    packer.add(servedPair({ block, projection }, pair));
  }
  const { modules, ...about } = manifest;
  const made = packer.finish({ ...about, baseHash: await sha256OfFile(modelPath) });
  mkdirSync(folder);
  writeFileSync(join(folder, 'adapter_model.safetensors'), made.bytes);
  writeFileSync(join(folder, 'rankgate.json'), packedConfig);
  return generationOf(made.bytes);
}

const cli = (...args: string[]) =>
  runAsScript(['adapters', ...args, '--json'], { RANKGATE_URL: gateway.url });

describe('a configured system adapter', () => {
  it('that is missing makes a gateway not ready, and its requests refused', async () => {
    expect(await ready()).toEqual({ status: 503, reason: 'system adapter missing' });
    expect(await ask()).toBe(503);
    expect((await gateway.fetch('/livez')).status).toBe(200);
  });

  it('that comes makes it ready, when a token was made with it', async () => {
    await writeRepair(join(dataDir, 'first'), 1);
    const added = await cli('add', 'repair', join(dataDir, 'first'));
    expect(added.err).toBe('');
    await expect.poll(ready, { timeout: 10_000 }).toEqual({ status: 200 });
    expect(await ask()).toBe(200);
  });

  it('whose next generation is broken on disk makes it not ready, and going back ready again', async () => {
    const generation = await writeRepair(join(dataDir, 'second'), 2);
    expect((await cli('add', 'repair', join(dataDir, 'second'), '--replace')).err).toBe('');
    truncateSync(join(dataDir, 'blobs', `${generation.slice('sha256:'.length)}.safetensors`), 1000);
    const broken = { status: 503, reason: 'system adapter cannot be used: ADAPTER_CORRUPT' };
    await expect.poll(ready, { timeout: 10_000 }).toEqual(broken);
    expect(await ask()).not.toBe(200);
    expect((await cli('rollback', 'repair')).err).toBe('');
    expect(await ready()).toEqual({ status: 200 });
    expect(await ask()).toBe(200);
  });
});
