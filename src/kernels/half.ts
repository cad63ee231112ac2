// Conversions between f32 and the two 16-bit floats, on whole arrays. IEEE 754 binary16 and bfloat16, round to nearest
// even; overflow becomes infinity, NaN stays NaN.

const words: Uint32Array = new Uint32Array(1);
const floats: Float32Array = new Float32Array(words.buffer);

function f16ToF32(bits: number): number {
  const sign = bits & 0x8000 ? -1 : 1;
  const exponent = (bits >>> 10) & 0x1f;
  const fraction = bits & 0x3ff;
  if (exponent === 0) return sign * fraction * 2 ** -24;
  if (exponent === 31) return fraction === 0 ? sign * Number.POSITIVE_INFINITY : Number.NaN;
  return sign * (1 + fraction / 1024) * 2 ** (exponent - 15);
}

/** The value of every f16 bit pattern: 256 KiB once, instead of arithmetic per element. */
export const f16Values: Float32Array = Float32Array.from({ length: 65_536 }, (_, i) => f16ToF32(i));

export function f16BitsToF32(bits: Uint16Array, out: Float32Array): void {
  for (let i = 0; i < bits.length; i++) out[i] = f16Values[bits[i]!]!;
}

export function f32ToF16Bits(values: Float32Array, out: Uint16Array): void {
  const source = new Uint32Array(values.buffer, values.byteOffset, values.length);
  for (let i = 0; i < source.length; i++) out[i] = roundToF16(source[i]!);
}

function roundToF16(word: number): number {
  const sign = (word >>> 16) & 0x8000;
  const magnitude = word & 0x7fff_ffff;
  if (magnitude >= 0x4780_0000) {
    // 65,536 and above, infinity and NaN.
    return sign | (magnitude > 0x7f80_0000 ? 0x7e00 : 0x7c00);
  }
  if (magnitude < 0x3880_0000) {
    // Below the smallest normal f16: adding 0.5 leaves the rounded subnormal in the last bits of the sum.
    words[0] = magnitude;
    floats[0] = floats[0]! + 0.5;
    return sign | (words[0] - 0x3f00_0000);
  }
  const odd = (magnitude >>> 13) & 1;
  return sign | ((magnitude - 0x3800_0000 + 0xfff + odd) >>> 13);
}

export function bf16BitsToF32(bits: Uint16Array, out: Float32Array): void {
  const target = new Uint32Array(out.buffer, out.byteOffset, out.length);
  for (let i = 0; i < bits.length; i++) target[i] = bits[i]! << 16;
}

export function f32ToBf16Bits(values: Float32Array, out: Uint16Array): void {
  const source = new Uint32Array(values.buffer, values.byteOffset, values.length);
  for (let i = 0; i < source.length; i++) {
    const word = source[i]!;
    const isNan = (word & 0x7fff_ffff) > 0x7f80_0000;
    out[i] = isNan ? (word >>> 16) | 0x40 : (word + 0x7fff + ((word >>> 16) & 1)) >>> 16;
  }
}
