import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { describe, expect, it } from 'vitest';
import { dequantizeRows, dequantizeToBf16 } from '../../../src/kernels/dequantize.ts';
import { f32ToBf16Bits } from '../../../src/kernels/half.ts';
import { dtypeLayout, type WeightType } from '../../../src/kernels/kernels.ts';

interface Golden {
  readonly cases: readonly {
    readonly type: string;
    readonly data: string;
    readonly values: string;
  }[];
}
// Made by test/oracle/dequantize.py with gguf-py; versions and seed are in the file.
const golden = JSON.parse(
  readFileSync(join(import.meta.dirname, '../../golden/dequantize.json'), 'utf8'),
) as Golden;
const cases = golden.cases.map(({ type, data, values }) => ({
  type: type.toLowerCase() as WeightType,
  data: new Uint8Array(Buffer.from(data, 'base64')),
  values: new Float32Array(new Uint8Array(Buffer.from(values, 'base64')).buffer),
}));
const bits = (values: Float32Array): Uint32Array =>
  new Uint32Array(values.buffer, values.byteOffset, values.length);

describe('dequantisation', () => {
  it('has a golden case for every weight type', () => {
    const types = Object.keys(dtypeLayout).filter((type) => !type.startsWith('i'));
    expect(new Set(cases.map(({ type }) => type))).toEqual(new Set(types));
  });

  it.each(cases)("of $type equals gguf-py's, bit for bit", ({ type, data, values }) => {
    const out = new Float32Array(values.length);
    dequantizeRows(type, data, out);
    expect(bits(out)).toEqual(bits(values));
  });

  it.each(cases)('of $type reads from any byte offset, a Buffer too', ({ type, data, values }) => {
    const pool = Buffer.alloc(data.length + 16, 0x5a);
    pool.set(data, 3);
    const out = new Float32Array(values.length);
    dequantizeRows(type, pool.subarray(3, 3 + data.length), out);
    expect(bits(out)).toEqual(bits(values));
  });

  it.each(cases)('of $type to bf16 rounds the f32 values to nearest even', (golden) => {
    const wanted = new Uint16Array(golden.values.length);
    f32ToBf16Bits(golden.values, wanted);
    const out = new Uint16Array(golden.values.length);
    dequantizeToBf16(golden.type, golden.data, out);
    expect(out).toEqual(wanted);
  });
});
