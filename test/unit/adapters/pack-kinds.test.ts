import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { adapterKinds, type PackedKind } from '../../../src/adapters/adapter.ts';
import { sparseA } from '../../../src/adapters/families/fly.ts';
import { openPacked } from '../../../src/adapters/pack.ts';
import { roundToOdd } from '../../../src/adapters/pack-numbers.ts';
import { GatewayError } from '../../../src/errors.ts';
import { f16Values, f32ToF16Bits } from '../../../src/kernels/half.ts';
import { moduleIndex, projectionShape } from '../../../src/model/decoder-config.ts';
import {
  readSafetensors,
  type SafetensorsTensor,
  writeSafetensors,
} from '../../../src/model/safetensors.ts';
import { makePacked, tinyModules } from '../../support/make-packed.ts';
import { tinyBase } from '../../support/tiny-base.ts';

const kinds: readonly PackedKind[] = [...adapterKinds, 'basis', 'bank'];
const rank = 12; // two pages, the second not full
const isCorrupt = expect.objectContaining({ code: 'ADAPTER_CORRUPT' });
const q0 = { block: 0, projection: 'attn_q' } as const;

function halves(values: Float64Array): Float32Array {
  const bits = new Uint16Array(values.length);
  f32ToF16Bits(Float32Array.from(values, roundToOdd), bits);
  return Float32Array.from(bits, (half) => f16Values[half]!);
}

/** Rows of A as they are served: [rank, in]. */
function servedA(packed: ReturnType<typeof openPacked>, module: (typeof tinyModules)[number]) {
  const pages = Array.from({ length: packed.pages }, (_, p) => packed.page(module, p)!);
  const width = projectionShape(tinyBase.config, module.projection).in;
  return Float32Array.from(
    pages.flatMap(({ a }) => [...a]).slice(0, rank * width),
    (bits) => f16Values[bits]!,
  );
}

describe('the packed file of each kind', () => {
  it.each(kinds)('%s: the same bytes again, and what was packed comes back', (kind) => {
    const made = makePacked({ kind, rank, seed: 7 });
    expect(makePacked({ kind, rank, seed: 7 }).generation).toBe(made.generation);
    const packed = openPacked(made.bytes, made.generation);
    expect(packed.manifest).toEqual(made.manifest);
    const hasPages = kind !== 'svfit' && kind !== 'bank';
    expect(packed.pages).toBe(hasPages ? 2 : 0);
    expect(packed.page(q0, 0) === null).toBe(!hasPages);
    expect(packed.page(q0, 2)).toBeNull();
  });

  it('fly: A is made from the seed, module by module, and is not in the file', () => {
    const { bytes, generation, manifest } = makePacked({ kind: 'fly', rank, seed: 0xfeed });
    expect(
      [...readSafetensors(bytes).tensors.keys()].filter((name) => name.endsWith('.a')),
    ).toEqual([]);
    const packed = openPacked(bytes, generation);
    for (const module of tinyModules) {
      const { in: width } = projectionShape(tinyBase.config, module.projection);
      const want = sparseA({
        seed: 0xfeedn,
        module: moduleIndex(module.block, module.projection),
        rank,
        in: width,
        topK: manifest.options.topK!,
      });
      expect(servedA(packed, module)).toEqual(halves(want));
    }
  });

  it('svfit and fly: one number a rank, module after module', () => {
    for (const [kind, name] of [
      ['svfit', 'gates'],
      ['fly', 'bias'],
    ] as const) {
      const { bytes, generation } = makePacked({ kind, rank, seed: 3 });
      const { shape, values } = openPacked(bytes, generation).floats.get(name)!;
      expect(shape).toEqual([14 * rank]);
      expect(new Set(values).size).toBe(14 * rank);
    }
  });

  it('mora: 1/‖a‖ of every rank as it is stored', () => {
    const { bytes, generation } = makePacked({ kind: 'mora', rank, seed: 5 });
    const packed = openPacked(bytes, generation);
    const { values } = packed.floats.get('bias')!;
    for (const [i, module] of tinyModules.entries()) {
      const a = servedA(packed, module);
      const width = a.length / rank;
      for (let r = 0; r < rank; r++) {
        const norm = Math.hypot(...a.subarray(r * width, (r + 1) * width));
        expect(values[i * rank + r]! * norm).toBeCloseTo(1, 6);
      }
    }
  });

  it('refuses to pack what it would refuse to read', () => {
    const pack =
      (options: Parameters<typeof makePacked>[0]['options'], kind: PackedKind = 'fly') =>
      () =>
        makePacked({ kind, rank, seed: 1, ...(options === undefined ? {} : { options }) });
    const isInvalid = (message: string) =>
      expect.objectContaining({
        code: 'INVALID_ADAPTER',
        message: expect.stringContaining(message),
      });
    expect(pack({ topK: 13 })).toThrow(isInvalid('topK 13 of a module with fewer ranks'));
    expect(pack({ seed: null })).toThrow(isInvalid('options.seed'));
    expect(pack({ temperature: 1 })).toThrow(isInvalid('options.temperature'));
    expect(pack({ needs: `sha256:${'1'.repeat(64)}` }, 'lora')).toThrow(isInvalid('options.needs'));
    expect(pack({ topK: null }, 'mora')).toThrow(isInvalid('options.topK'));
  });
});

type Change = (
  tensors: Map<string, SafetensorsTensor>,
  manifest: {
    kind: unknown;
    levels: unknown;
    modules: unknown[];
    options: {
      needs: unknown;
      seed: unknown;
      topK: unknown;
      temperature: unknown;
      labels: unknown;
    };
  },
) => void;

/** The file with its header put right again: only its meaning is wrong. */
function changed(kind: PackedKind, change: Change): Uint8Array {
  const { bytes } = makePacked({ kind, rank, seed: 11 });
  const { tensors, metadata } = readSafetensors(bytes);
  const copy = new Map(tensors);
  const manifest = JSON.parse(metadata.get('manifest')!);
  change(copy, manifest);
  return writeSafetensors(copy, new Map([['manifest', JSON.stringify(manifest)]]));
}

function retyped(
  tensors: Map<string, SafetensorsTensor>,
  name: string,
  at: number,
  bytes: number[],
) {
  const data = new Uint8Array(tensors.get(name)!.data);
  data.set(bytes, at);
  tensors.set(name, { ...tensors.get(name)!, data });
}

const nanF32 = [0, 0, 0xc0, 0x7f];
const infinityF16 = [0, 0x7c];

describe('a packed file whose meaning is wrong', () => {
  it.each<[string, PackedKind, Change]>([
    ['A that is infinite', 'lora', (t) => retyped(t, 'blk.0.attn_q.a', 40, infinityF16)],
    [
      'a number in a rank beyond the module’s',
      'lora',
      (t) => retyped(t, 'blk.0.attn_q.b', 12 * 64 * 2, [1, 0]),
    ],
    ['a gate that is no number', 'svfit', (t) => retyped(t, 'gates', 8, nanF32)],
    ['no gates', 'svfit', (t) => t.delete('gates')],
    [
      'gates and pages',
      'svfit',
      (t) =>
        t.set('blk.0.attn_q.a', { dtype: 'F16', shape: [2, 8, 64], data: new Uint8Array(2048) }),
    ],
    ['svfit without a basis', 'svfit', (_, m) => (m.options.needs = null)],
    ['a basis that is no generation', 'svfit', (_, m) => (m.options.needs = '../../etc/passwd')],
    [
      'a bias too short',
      'fly',
      (t) => t.set('bias', { dtype: 'F32', shape: [3], data: new Uint8Array(12) }),
    ],
    [
      'a bias of halves',
      'fly',
      (t) => t.set('bias', { dtype: 'F16', shape: [168], data: new Uint8Array(336) }),
    ],
    [
      'an A beside the seed',
      'fly',
      (t) =>
        t.set('blk.0.attn_q.a', { dtype: 'F16', shape: [2, 8, 64], data: new Uint8Array(2048) }),
    ],
    ['a seed of 15 digits', 'fly', (_, m) => (m.options.seed = 'f'.repeat(15))],
    ['a seed that is code', 'fly', (_, m) => (m.options.seed = '0x00000000000000')],
    [
      'an A from the seed that no memory would hold',
      'fly',
      (_, m) => {
        for (const module of m.modules as { in: number }[]) module.in = 2 ** 24;
      },
    ],
    ['more kept than there is', 'fly', (_, m) => (m.options.topK = 13)],
    ['a temperature of 0', 'mora', (_, m) => (m.options.temperature = 0)],
    [
      'levels of ranks that are not alone',
      'mora',
      (_, m) => (m.levels = m.modules.map(() => Array.from({ length: 12 }, (__, k) => k + 1))),
    ],
    ['a label more than keys', 'queryable', (_, m) => (m.options.labels = ['a', 'b', 'c', 'd'])],
    ['keys that are no numbers', 'queryable', (t) => retyped(t, 'keys', 0, nanF32)],
    [
      'atoms that are not square',
      'bank',
      (t) =>
        t.set('atoms', { dtype: 'F32', shape: [3, 12, 11], data: new Uint8Array(3 * 12 * 11 * 4) }),
    ],
    [
      'no atoms at all',
      'bank',
      (t) => t.set('atoms', { dtype: 'F32', shape: [0, 12, 12], data: new Uint8Array(0) }),
    ],
    [
      'a context of another key size',
      'bank',
      (t) => t.set('context', { dtype: 'F32', shape: [5, 12], data: new Uint8Array(240) }),
    ],
    ['a bank with modules', 'bank', (_, m) => m.modules.push({ ...q0, rank: 12, in: 64, out: 64 })],
    ['a lora without modules', 'lora', (_, m) => (m.modules = [])],
    ['levels of other modules', 'lora', (_, m) => (m.levels = [[1, 2]])],
    [
      'levels that fall',
      'lora',
      (_, m) => (m.levels = m.modules.map(() => Array.from({ length: 12 }, (__, k) => 12 - k))),
    ],
    [
      'a level above the highest',
      'lora',
      (_, m) => (m.levels = m.modules.map(() => Array.from({ length: 12 }, (__, k) => k + 2))),
    ],
    ['a kind that does not exist', 'lora', (_, m) => (m.kind = 'dora')],
    ['the manifest of another kind', 'lora', (_, m) => (m.kind = 'basis-of-nothing')],
  ])('%s (%s)', (_, kind, change) => {
    const broken = changed(kind, change);
    expect(() => openPacked(broken, `sha256:${'0'.repeat(64)}`)).toThrow(isCorrupt);
  });

  it('is refused by a typed error or read as finite numbers, whatever byte is changed', () => {
    const files = new Map(
      kinds.map((kind) => [kind, makePacked({ kind, rank: 3, seed: 2 }).bytes]),
    );
    let refused = 0;
    fc.assert(
      fc.property(
        fc.constantFrom(...kinds),
        fc.double({ min: 0, max: 1, noNaN: true }),
        fc.nat(255),
        (kind, where, byte) => {
          const bytes = files.get(kind)!.slice();
          bytes[Math.floor(where * (bytes.length - 1))] = byte;
          try {
            const packed = openPacked(bytes, `sha256:${'0'.repeat(64)}`);
            for (const { values } of packed.floats.values()) {
              expect(values.every(Number.isFinite)).toBe(true);
            }
            for (const module of tinyModules) {
              const page = packed.page(module, 0);
              const numbers = [...(page?.a ?? []), ...(page?.b ?? [])];
              expect(numbers.every((bits) => Number.isFinite(f16Values[bits]!))).toBe(true);
            }
          } catch (error) {
            if (!(error instanceof GatewayError)) throw error;
            expect(['ADAPTER_CORRUPT', 'UNSUPPORTED']).toContain(error.code);
            refused += 1;
          }
        },
      ),
      { numRuns: 400 },
    );
    expect(refused).toBeGreaterThan(20);
  });
});
