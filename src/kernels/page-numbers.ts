// A page of an adapter pool: f16 bits as files have them → the pool's own type. The obvious way, for backends that have no faster
// one; native/pages.c gives the same bytes.

import { elementCount, mismatch } from './check.ts';
import { f16BitsToF32, f32ToBf16Bits, f32ToF16Bits } from './half.ts';
import { dtypeLayout, type StoredTensor } from './kernels.ts';

/** Where page `page` of a pool begins, and how many bytes it has. Throws SHAPE_MISMATCH: no such page, or not its numbers. */
export function pageRange(
  pool: StoredTensor,
  page: number,
  halves: Uint16Array | null,
): { readonly at: number; readonly bytes: number } {
  const [pages, ...rest] = pool.shape as [number, number, number];
  if (!Number.isSafeInteger(page) || page < 1 || page >= pages) {
    throw mismatch('writePage', `a page of 1 to ${pages - 1} wanted, got ${page}`);
  }
  if (halves !== null && halves.length !== elementCount(rest)) {
    throw mismatch('writePage', `${elementCount(rest)} numbers wanted, got ${halves.length}`);
  }
  const bytes = pool.bytes / pages;
  return { at: page * bytes, bytes };
}

/** In the pool's own layout; null: zeros. q8_0 rounds within ±127 of a block's largest magnitude, halves to even. */
export function pageBytes(
  pool: StoredTensor,
  page: number,
  halves: Uint16Array | null,
): Uint8Array {
  const { bytes } = pageRange(pool, page, halves);
  if (halves === null) return new Uint8Array(bytes);
  if (pool.dtype === 'f16') return asBytes(halves);
  const values = new Float32Array(halves.length);
  f16BitsToF32(halves, values);
  if (pool.dtype === 'f32') return asBytes(values);
  if (pool.dtype === 'q8_0') return roundBlocks(values);
  const bits = new Uint16Array(halves.length);
  f32ToBf16Bits(values, bits);
  return asBytes(bits);
}

function asBytes({ buffer, byteOffset, byteLength }: ArrayBufferView): Uint8Array {
  return new Uint8Array(buffer as ArrayBuffer, byteOffset, byteLength);
}

function roundBlocks(values: Float32Array): Uint8Array {
  const { block, bytes } = dtypeLayout.q8_0;
  const out = new Uint8Array((values.length / block) * bytes);
  const view = new DataView(out.buffer);
  const scale = new Uint16Array(1);
  const rounded = new Float32Array(1);
  for (let from = 0, at = 0; from < values.length; from += block, at += bytes) {
    const numbers = values.subarray(from, from + block);
    const largest = numbers.reduce((max, value) => Math.max(max, Math.abs(value)), 0);
    f32ToF16Bits(Float32Array.of(largest / 127), scale);
    view.setUint16(at, scale[0]!, true);
    f16BitsToF32(scale, rounded);
    const inverse = rounded[0]! > 0 ? Math.fround(1 / rounded[0]!) : 0;
    numbers.forEach((value, i) => {
      // A scale below the normal range of f16 may be so much too small that numbers pass the end.
      const nearest = roundHalfToEven(Math.fround(value * inverse));
      view.setInt8(at + 2 + i, Math.max(-127, Math.min(127, nearest)));
    });
  }
  return out;
}

/** For |value| < 2^22: f32 has no bits left below one there. */
function roundHalfToEven(value: number): number {
  const whole = 1.5 * 2 ** 23;
  return Math.fround(value + whole) - whole;
}
