import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import type { Worker } from 'node:worker_threads';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { type Generation, noOptions } from '../../../src/adapters/adapter.ts';
import { blendContents } from '../../../src/adapters/blend.ts';
import { blendKey } from '../../../src/adapters/blend-key.ts';
import { blobPath, createBlobStore } from '../../../src/adapters/blobs.ts';
import {
  createPacker,
  packedAdapter,
  readContents,
  readPacked,
} from '../../../src/adapters/pack.ts';
import { createPackReader } from '../../../src/adapters/pack-reader.ts';
import { servedPair } from '../../../src/adapters/served.ts';

const rank = 10; // two pages, the second one not full
const [width, out] = [6, 4];
const ref = { block: 0, projection: 'attn_q' } as const;

function pack(seed: number): Uint8Array {
  const packer = createPacker();
  const a = Float64Array.from({ length: rank * width }, (_, i) => seed + i);
  const b = Float64Array.from({ length: rank * out }, (_, i) => seed - i);
  packer.add(servedPair(ref, { rank, a, b }));
  return packer.finish({
    format: 'rankgate-adapter/3',
    kind: 'lora',
    describe: '',
    levels: null,
    options: noOptions,
    baseHash: '0'.repeat(64),
    rankMax: rank,
    rankCurve: Array.from({ length: rank }, (_, k) => (k + 1) / rank),
    source: {
      format: 'peft',
      rank,
      alpha: rank,
      rslora: false,
      targetModules: ['q_proj'],
      baseName: null,
    },
  }).bytes;
}

describe('createPackReader', () => {
  const folder = mkdtempSync(join(tmpdir(), 'pack-reader-'));
  const generations: Generation[] = [];
  const pathOf = (generation: Generation): string => blobPath(folder, generation);
  beforeAll(async () => {
    const blobs = createBlobStore(folder);
    for (let seed = 1; seed <= 3; seed++) generations.push(await blobs.put(pack(seed)));
  });
  afterAll(() => rmSync(folder, { recursive: true, force: true }));

  it('gives what readPacked gives, each answer to its own question', async () => {
    const read = createPackReader(pathOf);
    const asked = [...generations, ...generations.toReversed()];
    const answers = await Promise.all(asked.map((one) => read(one)));
    for (const [i, answer] of answers.entries()) {
      const want = await readPacked(pathOf(asked[i]!), asked[i]!);
      expect(answer.generation).toBe(want.generation);
      expect(answer.manifest).toEqual(want.manifest);
      expect(answer.pages).toBe(2);
      for (const page of [0, 1, 2]) expect(answer.page(ref, page)).toEqual(want.page(ref, page));
    }
  });

  it('refuses a missing and a changed file by the code, and goes on', async () => {
    const read = createPackReader(pathOf);
    const missing: Generation = `sha256:${'f'.repeat(64)}`;
    const changed: Generation = `sha256:${'e'.repeat(64)}`;
    writeFileSync(pathOf(changed), pack(4));
    const answers = await Promise.allSettled(
      [missing, changed, generations[0]!].map((one) => read(one)),
    );
    expect(answers).toMatchObject([
      { status: 'rejected', reason: { code: 'ADAPTER_NOT_FOUND' } },
      { status: 'rejected', reason: { code: 'ADAPTER_CORRUPT' } },
      { status: 'fulfilled', value: { generation: generations[0] } },
    ]);
  });

  it('merges the files of a blend, and refuses one that lacks a part', async () => {
    const read = createPackReader(pathOf);
    const parts = generations.slice(0, 2).map((generation) => ({ generation, rank: 9, weight: 1 }));
    const key = blendKey({ merge: 'ties', density: 0.5, parts });
    const merged = await read(key);
    expect(merged.generation).toBe(key);
    expect(merged.manifest).toMatchObject({
      rankMax: 9,
      source: { by: 'ties', from: generations.slice(0, 2) },
    });
    const contents = blendContents(
      key,
      parts.map(({ generation }) => readContents(pathOf(generation), generation)),
    );
    for (const page of [0, 1]) {
      expect(merged.page(ref, page)).toEqual(packedAdapter(key, contents).page(ref, page));
    }
    const missing: Generation = `sha256:${'d'.repeat(64)}`;
    const lacking = [...parts, { generation: missing, rank: 1, weight: 1 }];
    await expect(
      read(blendKey({ merge: 'ties', density: 0.5, parts: lacking })),
    ).rejects.toMatchObject({
      code: 'ADAPTER_NOT_FOUND',
    });
  });

  it('fails what a thread that ends was asked for, and starts another', async () => {
    const started = new Promise<Worker>((resolve) => process.once('worker', resolve));
    const read = createPackReader(pathOf);
    const thread = await started;
    const [first] = generations as [Generation];
    const lost = Promise.allSettled([read(first), read(first)]);
    await thread.terminate(); // before it has finished starting, so before it can have answered
    expect(await lost).toMatchObject([
      { status: 'rejected', reason: { code: 'INTERNAL' } },
      { status: 'rejected', reason: { code: 'INTERNAL' } },
    ]);
    expect((await read(first)).generation).toBe(first);
  });
});
