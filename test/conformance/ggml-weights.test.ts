// Every way in which weights are multiplied against the reference on the same bytes: types, rows up to beyond a tile's eight,
// and a machine's odd ends (rows of x that no group of eight, four or two holds).

import { describe, expect, it } from 'vitest';
import { GgmlKernels } from '../../src/kernels/ggml/ggml-kernels.ts';
import {
  dtypeLayout,
  type Kernels,
  type LinearWay,
  type WeightType,
} from '../../src/kernels/kernels.ts';
import { ReferenceKernels } from '../../src/kernels/reference-kernels.ts';
import { createRng, normals } from '../support/random.ts';

const [outer, inner] = [96, 512];
const tiled = ['q4_0', 'q4_1', 'q5_0', 'q5_1', 'q8_0', 'q4_k', 'q5_k'] as const;
const scaleOffsets = {
  q4_0: [0],
  q4_1: [0, 2],
  q5_0: [0],
  q5_1: [0, 2],
  q8_0: [0],
  q4_k: [0, 2],
  q5_k: [0, 2],
};

function randomBlocks(dtype: (typeof tiled)[number], seed: number): Uint8Array {
  const rng = createRng(seed);
  const { block, bytes: blockBytes } = dtypeLayout[dtype];
  const bytes = new Uint8Array(((outer * inner) / block) * blockBytes).map(() => rng.below(256));
  const view = new DataView(bytes.buffer);
  for (let at = 0; at < bytes.length; at += blockBytes) {
    for (const offset of scaleOffsets[dtype]) {
      view.setUint16(at + offset, 0x2000 + rng.below(0x800), true);
    }
  }
  return bytes;
}

interface Weight {
  readonly dtype: WeightType;
  readonly bytes: Uint8Array;
}

/** x [rows, inner] → [rows, outer]. */
function multiply(
  kernels: Kernels,
  weight: Weight,
  way: LinearWay | null,
  x: Float32Array,
): Float32Array {
  const rows = x.length / inner;
  const shape = [outer, inner];
  const w =
    way === null
      ? kernels.store(weight.dtype, shape)
      : kernels.storeWeight!(weight.dtype, shape, way)!;
  kernels.write(w, weight.bytes, 0);
  using program = kernels.compile(
    (ops) => ({ y: ops.linear(ops.input('x', 'f32', [rows, inner]), w) }),
    { segments: 0 },
  );
  program.write('x', x);
  program.run([]);
  const y = new Float32Array(rows * outer);
  program.read('y', 0, y);
  return y;
}

function nmse(wanted: Float32Array, got: Float32Array): number {
  let [error, size] = [0, 0];
  wanted.forEach((value, i) => {
    error += (got[i]! - value) ** 2;
    size += value ** 2;
  });
  return error / size;
}

/** Largest squared error relative to the size of y. 16 bits: 2^-16 of a block's largest number; K types' scales are rounded to f16
 *  besides. 8 bits: 2^-8 of it. ggml rounds to 8 bits too. */
function bound(dtype: WeightType, way: LinearWay): number {
  if (way === 'library' || way === 'int8') return 2e-4;
  return way === 'int16' && dtype.endsWith('k') ? 5e-7 : 2e-9;
}

for (const threads of [1, 3]) {
  describe(`weights by ${threads} threads`, () => {
    using reference = new ReferenceKernels();
    for (const dtype of tiled) {
      const weight = { dtype, bytes: randomBlocks(dtype, 7) };
      for (const rows of [1, 2, 3, 8, 15]) {
        const x = normals(createRng(100 + rows), rows * inner);
        const wanted = multiply(reference, weight, null, x);
        it.for(['library', 'f32', 'int16', 'int8'] as const)(
          `${dtype}, ${rows} rows, %s`,
          (way) => {
            using kernels = new GgmlKernels({ threads, f32Activations: true });
            const error = nmse(wanted, multiply(kernels, weight, way, x));
            expect(error).toBeLessThan(bound(dtype, way));
            // Rounding to 8 bits is seen: a way that quietly is another one would pass the bound.
            if (way === 'int8') expect(error).toBeGreaterThan(1e-6);
          },
        );
      }
    }
  });
}

describe('tiles', () => {
  it('give a row the same bits whatever other rows are with it', () => {
    using kernels = new GgmlKernels({ threads: 1 });
    const weight = { dtype: 'q4_1', bytes: randomBlocks('q4_1', 3) } as const;
    const x = normals(createRng(5), 15 * inner);
    for (const way of ['int16', 'int8'] as const) {
      const together = multiply(kernels, weight, way, x);
      for (let row = 0; row < 15; row++) {
        const alone = multiply(kernels, weight, way, x.slice(row * inner, (row + 1) * inner));
        expect(alone).toEqual(together.slice(row * outer, (row + 1) * outer));
      }
    }
  });

  it('are embedded from as the rows that they were made of', () => {
    for (const dtype of tiled) {
      const weight = { dtype, bytes: randomBlocks(dtype, 9) };
      const ids = Int32Array.of(0, 95, 17, 17, 32);
      const rows = [new ReferenceKernels(), new GgmlKernels({ threads: 2 })].map((made) => {
        using kernels: Kernels = made;
        const table =
          kernels.storeWeight?.(dtype, [outer, inner], 'int8') ??
          kernels.store(dtype, [outer, inner]);
        kernels.write(table, weight.bytes, 0);
        using program = kernels.compile(
          (ops) => ({ y: ops.embed(table, ops.input('ids', 'i32', [5])) }),
          { segments: 0 },
        );
        program.write('ids', ids);
        program.run([]);
        const y = new Float32Array(5 * inner);
        program.read('y', 0, y);
        return y;
      });
      expect(nmse(rows[0]!, rows[1]!)).toBeLessThan(dtype.endsWith('k') ? 5e-7 : 1e-13);
    }
  });

  it('are neither read back nor written in part, nor made of what does not fit', () => {
    using kernels = new GgmlKernels({ threads: 1 });
    const w = kernels.storeWeight('q4_1', [32, 64], 'int8')!;
    expect(() => kernels.read(w, new Uint8Array(20), 0)).toThrow(/not read back/);
    expect(() => kernels.write(w, new Uint8Array(20), 0)).toThrow(/as a whole/);
    expect(kernels.storeWeight('q4_1', [33, 64], 'int8')).toBeNull();
    expect(kernels.storeWeight('q6_k', [32, 256], 'int16')).toBeNull();
    using composed = new GgmlKernels({ threads: 1, native: false });
    expect(composed.storeWeight('q4_1', [32, 64], 'int8')).toBeNull();
    expect(composed.storeWeight('q4_1', [32, 64], 'library')).not.toBeNull();
  });
});
