import { execFileSync } from 'node:child_process';
import { mkdirSync, mkdtempSync, rmSync, symlinkSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import fc from 'fast-check';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { createPacker, generationOf, openPacked, readPacked } from '../../../src/adapters/pack.ts';
import { roundToOdd } from '../../../src/adapters/pack-numbers.ts';
import { packPeft, unpackPeft } from '../../../src/adapters/pack-peft.ts';
import { readPeft } from '../../../src/adapters/peft.ts';
import { servedPair } from '../../../src/adapters/served.ts';
import { f16Values, f32ToF16Bits } from '../../../src/kernels/half.ts';
import { readSafetensors, toFloat32, writeSafetensors } from '../../../src/model/safetensors.ts';
import { goldenAdapters, goldenConfig, goldenWeights, tinyBase } from '../../support/tiny-base.ts';

const accept = 'rankgate/tiny-random';

function pack(name: string) {
  const files = { config: goldenConfig(name), weights: goldenWeights(name) };
  return packPeft({ ...files, base: tinyBase, acceptBaseName: accept });
}

describe('packPeft', () => {
  it('gives the same bytes for the same files', () => {
    expect(generationOf(pack('patterns-r16').bytes)).toBe(generationOf(pack('patterns-r16').bytes));
  });

  it('writes a manifest that says what is there', () => {
    const { manifest, bytes } = pack('patterns-r16');
    expect(manifest).toMatchObject({ rankMax: 24, baseHash: tinyBase.hash });
    expect(manifest.modules).toHaveLength(14);
    expect(manifest.rankCurve).toHaveLength(24);
    expect(manifest.rankCurve.at(-1)).toBe(1);
    expect(openPacked(bytes, generationOf(bytes)).manifest).toEqual(manifest);
  });

  it('leaves zeros beyond a module’s ranks, and no page beyond its last', () => {
    const { bytes } = pack('patterns-r16');
    const packed = openPacked(bytes, generationOf(bytes));
    expect(packed.pages).toBe(3);
    const k = { block: 0, projection: 'attn_k' } as const; // rank 2
    const page = packed.page(k, 0)!;
    expect(page.a.subarray(2 * 64).every((bits) => bits === 0)).toBe(true);
    expect(page.a.subarray(0, 2 * 64).some((bits) => bits !== 0)).toBe(true);
    expect(page.b.every((bits, i) => i < 2 * 32 || bits === 0)).toBe(true);
    expect(packed.page(k, 1)).toBeNull();
    expect(packed.page({ block: 9, projection: 'attn_k' }, 0)).toBeNull();
  });

  it('says when an adapter changes nothing', () => {
    const tensors = new Map(readSafetensors(goldenWeights('qv-r8')).tensors);
    for (const [key, tensor] of tensors) {
      if (key.includes('lora_B')) {
        tensors.set(key, { ...tensor, data: new Uint8Array(tensor.data.length) });
      }
    }
    const files = { config: goldenConfig('qv-r8'), weights: writeSafetensors(tensors) };
    const { manifest, warnings } = packPeft({ ...files, base: tinyBase, acceptBaseName: accept });
    expect(manifest).toMatchObject({ rankMax: 1, rankCurve: [1] });
    expect(warnings).toEqual(['every B·A is zero: the adapter changes nothing']);
  });

  it('refuses what f16 cannot hold, naming the module', () => {
    const config = JSON.stringify({ ...JSON.parse(goldenConfig('qv-r8')), lora_alpha: 1e12 });
    const files = { config, weights: goldenWeights('qv-r8') };
    expect(() => packPeft({ ...files, base: tinyBase, acceptBaseName: accept })).toThrow(
      expect.objectContaining({
        code: 'INVALID_ADAPTER',
        message: expect.stringMatching(/layers\.0\.self_attn\.q_proj: .*beyond ±65504/),
      }),
    );
  });
});

describe('unpackPeft', () => {
  for (const name of goldenAdapters) {
    it(`gives PEFT files that equal what is served (${name})`, () => {
      const { bytes, manifest } = pack(name);
      const packed = openPacked(bytes, generationOf(bytes));
      for (const rank of [1, Math.ceil(manifest.rankMax / 2), manifest.rankMax]) {
        const files = unpackPeft(packed, rank, tinyBase.config);
        const again = readPeft({ ...files, base: tinyBase, acceptBaseName: accept });
        expect(again.warnings).toEqual([]);
        expect(again.modules).toHaveLength(manifest.modules.length);
        for (const module of manifest.modules) {
          const { rank: kept, scale, a, b } = again.read(module);
          expect(scale).toBe(1);
          expect(kept).toBe(Math.min(rank, module.rank));
          for (let r = 0; r < kept; r++) {
            const page = packed.page(module, Math.floor(r / 8))!;
            const served = page.a.subarray((r % 8) * module.in, ((r % 8) + 1) * module.in);
            const row = a.subarray(r * module.in, (r + 1) * module.in);
            expect(row).toEqual(Float64Array.from(served, (bits) => f16Values[bits]!));
            const column = b.filter((_, i) => i % kept === r);
            const servedB = page.b.subarray((r % 8) * module.out, ((r % 8) + 1) * module.out);
            expect(column).toEqual(Float64Array.from(servedB, (bits) => f16Values[bits]!));
          }
        }
      }
    });
  }

  it('refuses ranks that are not there', () => {
    const { bytes } = pack('plain-r4');
    const packed = openPacked(bytes, generationOf(bytes));
    for (const rank of [0, 5, 1.5, Number.NaN]) {
      expect(() => unpackPeft(packed, rank, tinyBase.config)).toThrow('the adapter has 1 … 4');
    }
  });

  it('names modules one by one when short names would name others too', () => {
    const tensors = new Map(readSafetensors(goldenWeights('qv-r8')).tensors);
    for (const key of [...tensors.keys()]) if (key.includes('layers.1')) tensors.delete(key);
    const files = { config: goldenConfig('qv-r8'), weights: writeSafetensors(tensors) };
    const { bytes } = packPeft({ ...files, base: tinyBase, acceptBaseName: accept });
    const exported = unpackPeft(openPacked(bytes, generationOf(bytes)), 2, tinyBase.config);
    expect(JSON.parse(exported.config).target_modules).toEqual([
      'model.layers.0.self_attn.q_proj',
      'model.layers.0.self_attn.v_proj',
    ]);
  });
});

describe('roundToOdd', () => {
  const nearest = (value: number): number => {
    const bits = new Uint16Array(1);
    f32ToF16Bits(Float32Array.of(roundToOdd(value)), bits);
    return f16Values[bits[0]!]!;
  };

  it('rounds f64 to the nearest f16, ties to even, once', () => {
    fc.assert(
      fc.property(fc.nat(0x7bfe), fc.integer({ min: -8, max: 8 }), (bits, ulps) => {
        const low = f16Values[bits]!;
        const high = f16Values[bits + 1]!;
        const tie = (low + high) / 2; // exact in f64
        const value = tie + ulps * tie * 2 ** -52;
        const wanted = value < tie ? low : value > tie ? high : bits % 2 === 0 ? low : high;
        expect(nearest(value)).toBe(wanted);
        expect(nearest(-value)).toBe(-wanted);
      }),
      { numRuns: 2000 },
    );
  });

  it('differs from rounding twice', () => {
    const aboveTie = 1 + 2 ** -11 + 2 ** -40; // Math.fround drops the last term, and the tie goes to 1.
    expect(nearest(aboveTie)).toBe(1 + 2 ** -10);
  });

  it('refuses to pack what would round to infinity, and keeps 65504', () => {
    const module = { block: 0, projection: 'attn_q' } as const;
    const served = (value: number) =>
      servedPair(module, { rank: 1, a: Float64Array.of(value), b: Float64Array.of(1) });
    expect(() => createPacker().add(served(65_519.99))).not.toThrow();
    expect(() => createPacker().add(served(-65_520))).toThrow('beyond ±65504');
  });
});

describe('readPacked', () => {
  let directory: string;
  let path: string;
  const { bytes } = pack('plain-r4');
  const generation = generationOf(bytes);
  const isCorrupt = expect.objectContaining({ code: 'ADAPTER_CORRUPT' });

  beforeEach(() => {
    directory = mkdtempSync(join(tmpdir(), 'rankgate-pack-'));
    path = join(directory, 'blob');
    writeFileSync(path, bytes);
  });
  afterEach(() => rmSync(directory, { recursive: true }));

  it('reads what was packed', async () => {
    const { manifest } = await readPacked(path, generation);
    expect(manifest).toEqual(pack('plain-r4').manifest);
  });

  it('refuses any flipped bit', async () => {
    for (let at = 0; at < bytes.length; at += 997) {
      const flipped = bytes.slice();
      flipped[at]! ^= 1 << (at % 8);
      writeFileSync(path, flipped);
      await expect(readPacked(path, generation)).rejects.toEqual(isCorrupt);
    }
  });

  it.each<[string, () => void]>([
    ['cut', () => writeFileSync(path, bytes.slice(0, -1))],
    ['empty', () => writeFileSync(path, '')],
    ['longer', () => writeFileSync(path, Buffer.concat([bytes, Buffer.from([0])]))],
    [
      'a link to itself',
      () => {
        writeFileSync(join(directory, 'real'), bytes);
        rmSync(path);
        symlinkSync(join(directory, 'real'), path);
      },
    ],
    [
      'a directory',
      () => {
        rmSync(path);
        mkdirSync(path);
      },
    ],
    [
      'a pipe',
      () => {
        rmSync(path);
        execFileSync('mkfifo', [path]);
      },
    ],
  ])('refuses a blob that is %s', async (_, break_) => {
    break_();
    await expect(readPacked(path, generation)).rejects.toEqual(isCorrupt);
  });

  it('knows one that is not there', async () => {
    rmSync(path);
    await expect(readPacked(path, generation)).rejects.toMatchObject({ code: 'ADAPTER_NOT_FOUND' });
  });

  it('never says a path', async () => {
    rmSync(path);
    mkdirSync(path);
    const error = await readPacked(path, generation).catch((reason: Error) => reason);
    expect(String(error)).not.toContain(directory);
  });
});

describe('openPacked', () => {
  const { bytes, manifest } = pack('plain-r4');
  const { tensors } = readSafetensors(bytes);

  function rewritten(change: (manifest: Record<string, unknown>) => void): Uint8Array {
    const copy = structuredClone(manifest) as unknown as Record<string, unknown>;
    change(copy);
    return writeSafetensors(tensors, new Map([['manifest', JSON.stringify(copy)]]));
  }

  it.each<[string, Uint8Array]>([
    ['no manifest', writeSafetensors(tensors)],
    ['a manifest that is no JSON', writeSafetensors(tensors, new Map([['manifest', '{']]))],
    ['another format', rewritten((m) => (m.format = 'rankgate-adapter/1'))],
    ['another kind', rewritten((m) => (m.kind = 'fly'))],
    ['a field more', rewritten((m) => (m.extra = 1))],
    ['a rank too large', rewritten((m) => (m.rankMax = 8))],
    ['a curve that falls', rewritten((m) => (m.rankCurve = [0.9, 0.5, 0.95, 1]))],
    ['a curve that ends early', rewritten((m) => (m.rankCurve = [0.1, 0.5, 0.8, 0.9]))],
    ['a module less', rewritten((m) => (m.modules as unknown[]).pop())],
    [
      'a module twice',
      rewritten((m) => ((m.modules as unknown[])[1] = (m.modules as unknown[])[0])),
    ],
    ['another shape', rewritten((m) => ((m.modules as { in: number }[])[0]!.in = 32))],
  ])('refuses %s', (_, broken) => {
    expect(() => openPacked(broken, generationOf(broken))).toThrow(
      expect.objectContaining({ code: 'ADAPTER_CORRUPT' }),
    );
  });

  it('hands out views, not copies', () => {
    const packed = openPacked(bytes, generationOf(bytes));
    const page = packed.page({ block: 0, projection: 'attn_q' }, 0)!;
    expect(page.a.buffer).toBe(bytes.buffer);
    const stored = tensors.get('blk.0.attn_q.a')!;
    const values = toFloat32({ ...stored, shape: [512] });
    expect(Float32Array.from(page.a, (bits) => f16Values[bits]!)).toEqual(values);
  });
});
