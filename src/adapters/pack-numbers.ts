// Numbers as a packed file stores them: f16 factors rounded once from f64, f32 for the rest; and back, refusing what is
// not a finite number.

import { GatewayError } from '../errors.ts';
import { f32ToF16Bits } from '../kernels/half.ts';
import type { SafetensorsTensor } from '../model/safetensors.ts';

const word = new DataView(new ArrayBuffer(4));

/** f64 → f32 such that rounding to f16 afterwards rounds once, not twice: an inexact value gets an odd last bit, so it
 *  never looks like a tie (Boldo and Melquiond, "Emulation of a FMA and correctly rounded sums", 2008). */
export function roundToOdd(value: number): number {
  const rounded = Math.fround(value);
  if (rounded === value) return rounded;
  word.setFloat32(0, rounded);
  const bits = word.getUint32(0);
  // Toward zero first: for either sign that is one step down in the bits.
  word.setUint32(0, (Math.abs(rounded) > Math.abs(value) ? bits - 1 : bits) | 1);
  return word.getFloat32(0);
}

const f16Max = 65_504;

/** [count, length] → f16 bits of [paddedCount, length], zeros behind. Throws INVALID_ADAPTER beyond the range of f16. */
export function halvesOf(values: Float64Array, size: number, name: string): Uint16Array {
  const odd = new Float32Array(size);
  for (let i = 0; i < values.length; i++) odd[i] = roundToOdd(values[i]!);
  // 65,520 is half way to the next step: from there on the nearest f16 is infinity.
  const bad = odd.find((value) => !(Math.abs(value) < 65_520));
  if (bad !== undefined) {
    throw new GatewayError('INVALID_ADAPTER', `${name} has ${bad}, beyond ±${f16Max} of f16`);
  }
  const bits = new Uint16Array(size);
  f32ToF16Bits(odd, bits);
  return bits;
}

export function halfTensor(bits: Uint16Array, shape: readonly number[]): SafetensorsTensor {
  return { dtype: 'F16', shape, data: new Uint8Array(bits.buffer) };
}

export function floatTensor(values: Float32Array, shape: readonly number[]): SafetensorsTensor {
  return { dtype: 'F32', shape, data: new Uint8Array(values.slice().buffer) };
}

/** null when the tensor is not of this shape. */
export function viewHalves(
  tensor: SafetensorsTensor | undefined,
  shape: readonly number[],
): Uint16Array | null {
  if (tensor?.dtype !== 'F16' || tensor.shape.join() !== shape.join()) return null;
  if (tensor.data.byteOffset % 2 !== 0) return null;
  const { buffer, byteOffset, length } = tensor.data;
  return new Uint16Array(buffer, byteOffset, length / 2);
}

/** Are all finite, and 0 from `used` on? */
export function isServable(bits: Uint16Array, used: number): boolean {
  for (let i = 0; i < used; i++) if ((bits[i]! & 0x7c00) === 0x7c00) return false;
  return bits.subarray(used).every((one) => one === 0);
}

/** A copy: it is kept longer than the file's bytes are. */
export function readFloats(
  tensor: SafetensorsTensor | undefined,
  shape: readonly number[],
): Float32Array | null {
  if (tensor?.dtype !== 'F32' || tensor.shape.join() !== shape.join()) return null;
  const values = new Float32Array(new Uint8Array(tensor.data).buffer);
  return values.every(Number.isFinite) ? values : null;
}
