import { join } from 'node:path';
import { beforeEach, describe, expect, it } from 'vitest';
import { GatewayError } from '../../src/errors.ts';
import { chooseDevice, GgmlKernels } from '../../src/kernels/ggml/ggml-kernels.ts';
import { f32ToF16Bits } from '../../src/kernels/half.ts';
import { scrapCells } from '../../src/model/step-inputs.ts';
import type { Segment, Stepper } from '../../src/model/stepper.ts';
import { packDirectory, writeAdapter } from '../support/load-adapter.ts';
import { openTiny, type TestDecoderOptions } from '../support/open-test-decoder.ts';
import { createRng, normals } from '../support/random.ts';
import { registerStandIn } from '../support/stand-in-device.ts';
import { kernelSuite, ownSkips } from './kernels.suite.ts';
import { trainingSuite } from './training.suite.ts';

// Programs through ggml's scheduler, on a stand-in for a GPU: memory of its own and a list of ops that it lacks, but the
// CPU's arithmetic. Every op must give the same wherever it runs, and whatever has to be copied for it.

const device = registerStandIn();
const onDevice = (...lacks: readonly string[]): GgmlKernels => {
  device.lacks.clear();
  for (const op of lacks) device.lacks.add(op);
  return new GgmlKernels({ threads: 1, device: 'cuda' });
};

const ownOnly = ownSkips('pages of q8_0 need our own kernels, which run on the CPU only');
kernelSuite('ggml, a device that has every op', () => onDevice(), ownOnly);
kernelSuite(
  'ggml, a device without products and norms',
  () => onDevice('MUL_MAT', 'MUL_MAT_ID', 'RMS_NORM', 'GET_ROWS'),
  ownOnly,
);
kernelSuite(
  'ggml, a device without attention and elementwise ops',
  () => onDevice('FLASH_ATTN_EXT', 'ROPE', 'ADD', 'MUL', 'SWIGLU', 'CONT'),
  ownOnly,
);
/** Choices inside the bottleneck, as in serving. */
const chosen = ['the softmax of the largest', 'numbers that the sizes of others choose'];
trainingSuite('ggml, a device that has every op', () => onDevice(), chosen);
trainingSuite(
  'ggml, a device without what only training needs',
  () =>
    onDevice(
      'OUT_PROD',
      'RMS_NORM_BACK',
      'SILU_BACK',
      'SOFT_MAX_BACK',
      'GET_ROWS_BACK',
      'REPEAT_BACK',
    ),
  chosen,
);

beforeEach(() => {
  device.lacks.clear();
  device.ran.clear();
  device.parts = 0;
});

describe('a device', () => {
  it('is chosen by name and named in the description', () => {
    expect(chooseDevice({ device: 'auto', bytesNeeded: 1000 })).toMatchObject({
      device: { name: 'CUDA0', kind: 'gpu' },
    });
    expect(chooseDevice({ device: 'cpu' }).device).toBeNull();
    expect(() => chooseDevice({ device: 'cuda', bytesNeeded: 1e18 })).toThrow(/MB free/);
    using kernels = onDevice();
    expect(kernels.description).toMatch(/^ggml [\d.]+, CUDA0 \(.+\), .+, 1 threads, composed/);
    using cpu = new GgmlKernels({ threads: 1 });
    expect(cpu.description).not.toContain('CUDA0');
  });

  it('computes what it has; the CPU gets the rest, and values cross', () => {
    using kernels = onDevice('MUL_MAT', 'ADD');
    const w = kernels.store('f32', [32, 32]);
    using program = kernels.compile(
      (ops) => {
        const x = ops.input('x', 'f32', [2, 32]);
        const inner = ops.mul(ops.linear(ops.mul(x, x), w), x);
        return { y: ops.mul(ops.add(inner, x), x) };
      },
      { segments: 0 },
    );
    program.write('x', normals(createRng(1), 64));
    program.run([]);
    expect(Object.fromEntries(device.ran)).toEqual({ MUL: 3 });
    expect(device.parts).toBe(3); // mul · [linear] · mul · [add] · mul
  });

  it('runs everything in one part when it has every op', () => {
    using kernels = onDevice();
    const w = kernels.store('f32', [32, 32]);
    using program = kernels.compile(
      (ops) => ({ y: ops.linear(ops.input('x', 'f32', [2, 32]), w) }),
      { segments: 0 },
    );
    program.write('x', new Float32Array(64));
    program.run([]);
    program.run([]);
    expect(device.parts).toBe(2);
    expect(device.ran.get('MUL_MAT')).toBe(2);
  });

  it('that cannot write cells is refused before a program runs', () => {
    using kernels = onDevice('SET_ROWS');
    const cache = kernels.store('f16', [8, 32]);
    const compile = (): unknown =>
      kernels.compile(
        (ops) => {
          const x = ops.input('x', 'f32', [1, 32]);
          ops.writeCells(cache, x, ops.input('cells', 'i64', [1]));
          return { x: ops.mul(x, x) };
        },
        { segments: 0 },
      );
    expect(compile).toThrow(GatewayError);
    expect(compile).toThrow(/CUDA0 .* cannot write f16 cells; use --device cpu/);
  });

  it('moves bytes inside its own memory', () => {
    using kernels = onDevice();
    const cache = kernels.store('f16', [16, 8]);
    const bits = new Uint16Array(128);
    f32ToF16Bits(
      Float32Array.from({ length: 128 }, (_, i) => i),
      bits,
    );
    kernels.write(cache, new Uint8Array(bits.buffer), 0);
    kernels.copyWithin(cache, { from: 16, to: 160, bytes: 48 });
    const after = new Uint16Array(128);
    kernels.read(cache, new Uint8Array(after.buffer), 0);
    bits.copyWithin(80, 8, 32);
    expect(after).toEqual(bits);
  });

  it('keeps one program’s values until another runs, and says so afterwards', () => {
    using kernels = onDevice();
    const compile = (rows: number): ReturnType<GgmlKernels['compile']> => {
      const program = kernels.compile(
        (ops) => {
          const x = ops.input('x', 'f32', [rows, 8]);
          return { y: ops.add(x, x) };
        },
        { segments: 0 },
      );
      program.write('x', new Float32Array(rows * 8).fill(rows));
      return program;
    };
    const [small, large] = [compile(1), compile(4000)];
    const y = new Float32Array(8);
    for (let round = 0; round < 3; round++) {
      small.run([]);
      small.read('y', 0, y);
      expect([...y]).toEqual(Array(8).fill(2));
      large.run([]);
      large.read('y', 0, y);
      expect([...y]).toEqual(Array(8).fill(8000));
      expect(() => small.read('y', 0, y)).toThrow(/gone/);
    }
  });
});

describe('a decoder on a device', () => {
  const adapters = join(import.meta.dirname, '../golden/adapters');
  const open = (options: TestDecoderOptions): ReturnType<typeof openTiny> =>
    openTiny({ device: 'cuda', pages: 8, native: false, ...options });

  function segment(tokens: number[], at: Partial<Segment> = {}): Segment {
    const place = { cellBase: scrapCells, position: 0, adapter: null, wantsLogits: true };
    return { tokens: Int32Array.from(tokens), ...place, ...at };
  }

  it.each([
    ['every op', []],
    ['no attention, no low-rank products', ['FLASH_ATTN_EXT', 'MUL_MAT_ID']],
    ['no embedding, no rope, no products', ['GET_ROWS', 'ROPE', 'MUL_MAT']],
  ])('with %s gives the CPU’s logits: mixed prompts, decodes, adapters', async (_, lacks) => {
    const steps = async (device: 'cpu' | 'cuda'): Promise<Float32Array[]> => {
      const { decoder, config } = await open({ device });
      using stepper: Stepper = decoder;
      const packed = packDirectory(join(adapters, 'rslora-r8'), config);
      const rank = writeAdapter(stepper, packed, 1);
      const second = { cellBase: scrapCells + 64 };
      const rows = [
        [segment([5, 80, 21, 300], { adapter: rank(8) }), segment([7, 9, 11], second)],
        [
          segment([42], { position: 4, adapter: rank(3) }),
          segment([40, 41], { ...second, position: 3 }),
        ],
        [segment([43], { ...second, position: 5 })],
        [segment([44], { position: 5, adapter: rank(8) })],
      ];
      return rows.flatMap((segments) => {
        const result = stepper.step(segments);
        return segments.map((__, i) => result.logits(i).slice());
      });
    };
    const wanted = await steps('cpu');
    device.lacks.clear();
    for (const op of lacks) device.lacks.add(op);
    device.ran.clear();
    const got = await steps('cuda');
    expect(device.ran.size).toBeGreaterThan(3);
    for (const op of lacks) expect(device.ran.has(op)).toBe(false);
    for (const [i, row] of wanted.entries()) {
      const worst = row.reduce((most, x, j) => Math.max(most, Math.abs(x - got[i]![j]!)), 0);
      expect(worst).toBeLessThan(1e-4);
    }
    const [first, , , other] = wanted;
    expect(first).not.toEqual(other);
  });
});
