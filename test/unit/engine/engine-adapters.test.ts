import { mkdirSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, it, vi } from 'vitest';
import type { Generation } from '../../../src/adapters/adapter.ts';
import { blobPath } from '../../../src/adapters/blobs.ts';
import { generationOf, openPacked } from '../../../src/adapters/pack.ts';
import { packPeft } from '../../../src/adapters/pack-peft.ts';
import { systemClock } from '../../../src/engine/clock.ts';
import type { GeneratedToken, GenerateRequest } from '../../../src/engine/messages.ts';
import { Supervisor } from '../../../src/engine/supervisor.ts';
import { f16BitsToF32, f32ToF16Bits } from '../../../src/kernels/half.ts';
import { projections } from '../../../src/model/decoder-config.ts';
import { sha256OfFile } from '../../../src/model/file-hash.ts';
import { entryExecArgv, entryUrl } from '../../../src/model/spawn-entry.ts';
import {
  type AdapterRows,
  type ModuleRef,
  type Stepper,
  uniformRows,
} from '../../../src/model/stepper.ts';
import { blendOf, useOf } from '../../support/adapter-use.ts';
import { makeRequest } from '../../support/loop-harness.ts';
import { openTiny, tinyPath } from '../../support/open-test-decoder.ts';

// The whole way of an adapter: PEFT files → packed blob → engine process → one batch in which every row has another
// adapter or rank. Log-probabilities must be those that PEFT computed for that adapter cut to that rank
// (test/golden/adapters). The adapter memory is smaller than the adapters together, so they also take turns.

const names = ['plain-r4', 'rslora-r8', 'patterns-r16', 'qv-r8', 'bf16-r8', 'regex-r64'];
const folder = join(import.meta.dirname, '../../golden/adapters');
/** Measured: 0.0024 at most. Another adapter's answer is 1.1 away at least. */
const tolerance = 0.005;

interface Case {
  readonly request: GenerateRequest;
  /** Log-probabilities of the token after the prompt, [V]. */
  readonly want: readonly number[];
}

function logSoftmax(logits: Float32Array): number[] {
  const max = Math.max(...logits);
  const total = max + Math.log(logits.reduce((sum, x) => sum + Math.exp(x - max), 0));
  return [...logits].map((x) => x - total);
}

function readCases(name: string, generation: Generation): Case[] {
  const golden = JSON.parse(readFileSync(join(folder, name, 'logits.json'), 'utf8')) as {
    readonly ids: readonly number[];
    readonly rows: ReadonlyArray<number | 'peft'>;
    readonly shape: readonly [number, number, number];
  };
  const bytes = readFileSync(join(folder, name, 'logits.f32'));
  const logits = new Float32Array(new Uint8Array(bytes).buffer);
  const [, tokens, vocab] = golden.shape;
  return golden.rows.flatMap((rank, row) => {
    if (rank === 'peft') return [];
    const last = ((row + 1) * tokens - 1) * vocab;
    const request = makeRequest({
      id: `${name}@${rank}`,
      tokens: Int32Array.from(golden.ids),
      tokensMax: 1,
      topLogprobs: 20,
      adapter: useOf(generation, rank),
    });
    return [{ request, want: logSoftmax(logits.subarray(last, last + vocab)) }];
  });
}

function distance(token: GeneratedToken, want: readonly number[]): number {
  return Math.max(...token.top.map((one) => Math.abs(one.logprob - want[one.token]!)));
}

/** The parts' ranks one after another as one plain adapter, weights folded into B: what a file of them would hold. */
function writeConcatenated(
  stepper: Stepper,
  parts: ReadonlyArray<readonly [name: string, rank: number, weight: number]>,
  bytesOf: (name: string) => Uint8Array,
): AdapterRows {
  let page = 1;
  for (const [name, rank, weight] of parts) {
    const bytes = bytesOf(name);
    const adapter = openPacked(bytes, generationOf(bytes));
    for (let index = 0; index * 8 < rank; index++, page++) {
      for (const module of modulesOf(stepper)) {
        const data = adapter.page(module, index);
        const kept = Math.min(8, rank - 8 * index);
        const cut =
          data === null ? null : { a: scaled(data.a, kept, 1), b: scaled(data.b, kept, weight) };
        stepper.writePage(page, module, cut);
      }
    }
  }
  const pages = Array.from({ length: page - 1 }, (_, i) => i + 1);
  return uniformRows(pages, 8 * pages.length);
}

function modulesOf({ config }: Stepper): ModuleRef[] {
  return Array.from({ length: config.blocks }, (_, block) =>
    projections.map((projection) => ({ block, projection })),
  ).flat();
}

/** The first `kept` of 8 rows, times a power of two, which f16 has exactly. */
function scaled(rows: Uint16Array, kept: number, factor: number): Uint16Array {
  const values = new Float32Array(rows.length);
  f16BitsToF32(rows, values);
  const bits = new Uint16Array(rows.length);
  const width = rows.length / 8;
  f32ToF16Bits(
    values.map((value, i) => (i < kept * width ? factor * value : 0)),
    bits,
  );
  return bits;
}

describe('adapters through the engine process', () => {
  const blobDirectory = join(mkdtempSync(join(tmpdir(), 'rankgate-engine-')), 'blobs');
  const cases: Case[] = [];
  const files = new Map<string, Uint8Array>();
  const packed = (name: string): Uint8Array => files.get(name)!;
  let engine: Supervisor;

  beforeAll(async () => {
    mkdirSync(blobDirectory, { recursive: true });
    const modelHash = await sha256OfFile(tinyPath);
    const { decoder, config } = await openTiny({ backend: 'reference' });
    decoder[Symbol.dispose]();
    for (const name of names) {
      const { bytes } = packPeft({
        config: readFileSync(join(folder, name, 'adapter_config.json'), 'utf8'),
        weights: readFileSync(join(folder, name, 'adapter_model.safetensors')),
        base: { config, hash: modelHash, names: ['tiny-random'] },
        acceptBaseName: null,
      });
      const generation = generationOf(bytes);
      writeFileSync(blobPath(blobDirectory, generation), bytes);
      cases.push(...readCases(name, generation));
      files.set(name, bytes);
    }
    engine = new Supervisor({
      entry: entryUrl(import.meta.url, '../../../src/engine/engine-process'),
      execArgv: entryExecArgv(import.meta.url),
      argument: JSON.stringify({
        modelPath: tinyPath,
        modelHash,
        weights: 'exact',
        backend: 'ggml',
        threads: 1,
        libraryDirectory: null,
        cacheDirectory: null,
        blobDirectory,
        cells: 1024,
        pages: 12, // 11 that count; the six adapters have 14
        tokensMax: 128,
        segmentsMax: 8,
        limits: {
          waitingMax: 100,
          waitingTokensMax: 10_000,
          waitingMsMax: 60_000,
          prefillTokensMax: 128,
        },
        tenantShareMax: 0.5,
      }),
      environment: {},
      clock: systemClock,
      readyMsMax: 60_000,
      silenceMsMax: 30_000,
      backoffMsMin: 1,
      backoffMsMax: 100,
      flightsMax: 100,
      eventsMax: 1000,
      drainMsMax: 5000,
    });
    await engine.start();
  });
  afterAll(async () => {
    await engine.close();
    rmSync(join(blobDirectory, '..'), { recursive: true, force: true });
  });

  async function ask(request: GenerateRequest): Promise<GeneratedToken> {
    for await (const event of engine.submit(request, new AbortController().signal)) {
      if (event.kind === 'piece' && event.tokens[0] !== undefined) return event.tokens[0];
    }
    throw new Error(`${request.id} got no token`);
  }

  it('each row of mixed batches has the log-probabilities of its own adapter and rank', async () => {
    const shuffled = cases
      .filter((_, i) => i % 2 === 0)
      .concat(cases.filter((_, i) => i % 2 === 1));
    const tokens = await Promise.all(shuffled.map((one) => ask(one.request)));
    expect(tokens.length).toBeGreaterThan(25);
    for (const [i, token] of tokens.entries()) {
      const { request, want } = shuffled[i]!;
      expect(token.top, request.id).toHaveLength(20);
      expect(distance(token, want), request.id).toBeLessThan(tolerance);
    }
  });

  it('and would not have those of another adapter, nor of rank 0', async () => {
    const full = names.map((name) => cases.findLast((one) => one.request.id.startsWith(name))!);
    for (const one of full) {
      const token = await ask(one.request);
      for (const other of full) {
        if (other === one || other.request.tokens.join() !== one.request.tokens.join()) continue;
        expect(distance(token, other.want)).toBeGreaterThan(100 * tolerance);
      }
      const base = cases.find((other) => other.request.id === one.request.id.replace(/@.*/, '@0'))!;
      expect(distance(token, base.want), one.request.id).toBeGreaterThan(10 * tolerance);
    }
  });

  it('a blend has the log-probabilities of the adapter that its parts would be as one file', async () => {
    const blends: ReadonlyArray<
      ReadonlyArray<readonly [name: string, rank: number, weight: number]>
    > = [
      [
        ['plain-r4', 4, 0.5],
        ['qv-r8', 8, -2],
      ],
      [
        ['patterns-r16', 16, 1],
        ['bf16-r8', 3, 0.25],
        ['rslora-r8', 5, 1],
      ],
      [['regex-r64', 11, 0.5]],
    ];
    const prompt = Int32Array.from([1, 17, 5, 60, 33, 250, 8]);
    const requests = blends.map((parts, i) =>
      makeRequest({
        ...{ id: `blend${i}`, tokens: prompt, tokensMax: 1, topLogprobs: 20 },
        adapter: blendOf(parts.map(([name, ...rest]) => [generationOf(packed(name)), ...rest])),
      }),
    );
    const { decoder } = await openTiny({ backend: 'ggml', pages: 9 });
    using idle = decoder;
    const wants = blends.map((parts) => {
      const adapter = writeConcatenated(idle, parts, (name) => packed(name));
      const segment = { tokens: prompt, cellBase: 16, position: 0, adapter, wantsLogits: true };
      return logSoftmax(idle.step([segment]).logits(0));
    });
    const got = await Promise.all(requests.map(ask));
    for (const [i, token] of got.entries()) {
      // Measured: 1.2e-6 at most, and 2.5 at least for another blend's.
      expect(distance(token, wants[i]!), requests[i]!.id).toBeLessThan(1e-4);
      for (const other of wants) {
        if (other !== wants[i]) expect(distance(token, other)).toBeGreaterThan(1);
      }
    }
  });

  it('what is prewarmed is resident before anybody asks for it, and answers as it would have', async () => {
    const hot = ['qv-r8', 'regex-r64'].map(
      (name) => cases.findLast((one) => one.request.id.startsWith(name))!,
    );
    for (const { request } of cases) engine.unload(request.adapter!.parts[0]!.generation);
    engine.prewarm(
      hot.map(({ request }) => {
        const { generation, rank } = request.adapter!.parts[0]!;
        return { generation, rank, pages: Math.ceil(rank / 8) };
      }),
    );
    await vi.waitFor(
      () =>
        expect(new Set(engine.stats().residents.map(({ rank }) => rank))).toEqual(new Set([8, 64])),
      { timeout: 30_000 },
    );
    for (const { request, want } of hot) {
      expect(distance(await ask(request), want), request.id).toBeLessThan(tolerance);
    }
  });

  it('a blob with a flipped bit is corrupt to its own requests and to nobody else', async () => {
    const [broken, fine] = [cases.at(-1)!, cases[3]!];
    const { generation } = broken.request.adapter!.parts[0]!;
    engine.unload(generation);
    const path = blobPath(blobDirectory, generation);
    const bytes = readFileSync(path);
    bytes[bytes.length >> 1]! ^= 1;
    writeFileSync(path, bytes);
    const failing = ask(broken.request);
    const going = ask(fine.request);
    await expect(failing).rejects.toMatchObject({ code: 'ADAPTER_CORRUPT' });
    expect(distance(await going, fine.want)).toBeLessThan(tolerance);
  });
});
