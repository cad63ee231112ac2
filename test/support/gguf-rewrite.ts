// A GGUF file with other weights: its keys and every tensor, changed where asked.

import { dequantizeRows } from '../../src/kernels/dequantize.ts';
import { f32ToF16Bits } from '../../src/kernels/half.ts';
import type { WeightType } from '../../src/kernels/kernels.ts';
import { type GgufFile, openGguf } from '../../src/model/gguf.ts';
import { ByteWriter } from './gguf-builder.ts';

/** New numbers of a tensor, f32; or a Q4_0 encoding of them; null: as in the file. */
export type Rewrite = (name: string, values: Float32Array) => Float32Array | Q4 | null;

export interface Q4 {
  readonly q4: Uint8Array;
}

const typeNumbers: Record<string, number> = { F32: 0, F16: 1, Q4_0: 2, Q4_1: 3, Q8_0: 8 };

export function rewriteWeights(path: string, rewrite: Rewrite): Uint8Array {
  using file = openGguf(path);
  const tensors = [...file.tensors.values()].map((tensor) => {
    const { name, shape } = tensor;
    const bytes = file.read(tensor.offset, tensor.bytes);
    const values = new Float32Array(shape.reduce((product, size) => product * size, 1));
    dequantizeRows(tensor.type.toLowerCase() as WeightType, bytes, values);
    const changed = rewrite(name, values);
    if (changed === null) return { name, shape, type: typeNumbers[tensor.type]!, data: bytes };
    if ('q4' in changed) return { name, shape, type: typeNumbers.Q4_0!, data: changed.q4 };
    return { name, shape, type: typeNumbers.F32!, data: new Uint8Array(changed.buffer) };
  });
  const out = new ByteWriter();
  const { alignment } = file;
  out.raw(headOf(file, tensors[0]!.name));
  let offset = 0;
  for (const { name, shape, type, data } of tensors) {
    out.string(name).u32(shape.length);
    for (const size of shape) out.u64(BigInt(size));
    out.u32(type).u64(BigInt(offset));
    offset += Math.ceil(data.length / alignment) * alignment;
  }
  out.padTo(alignment);
  for (const { data } of tensors) out.raw(data).padTo(alignment);
  return out.finish();
}

/** Everything before the tensor table, which begins with the first tensor's name behind its length. */
function headOf(file: GgufFile, firstName: string): Uint8Array {
  const first = Math.min(...[...file.tensors.values()].map(({ offset }) => offset));
  const head = file.read(0, first);
  const mark = new ByteWriter().string(firstName).finish();
  return head.subarray(0, Buffer.from(head).lastIndexOf(mark));
}

/** Rounds to the nearest of 2^bits evenly spaced numbers (bits ≤ 4) per 32, stored as Q4_0, whose nibbles hold them. */
export function roundedTo(bits: number, values: Float32Array): Q4 {
  const half = 2 ** (bits - 1);
  const q4 = new Uint8Array((values.length / 32) * 18);
  const scale = new Uint16Array(1);
  for (let block = 0; block < values.length / 32; block++) {
    const numbers = values.subarray(block * 32, (block + 1) * 32);
    const largest = numbers.reduce((most, x) => (Math.abs(x) > Math.abs(most) ? x : most), 0);
    const step = largest / -half; // the largest becomes exactly −half steps
    f32ToF16Bits(Float32Array.of(step), scale);
    q4[block * 18] = scale[0]! & 255;
    q4[block * 18 + 1] = scale[0]! >> 8;
    numbers.forEach((x, i) => {
      const level = step === 0 ? 0 : Math.max(-half, Math.min(half - 1, Math.round(x / step)));
      q4[block * 18 + 2 + (i % 16)]! |= (level + 8) << (i < 16 ? 0 : 4);
    });
  }
  return { q4 };
}
