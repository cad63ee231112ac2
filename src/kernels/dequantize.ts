// Reference dequantisation of the GGUF weight types to f32, by their block layouts (ggml-common.h): the oracle of the
// quantised kernels, and the way to re-encode weights. Blocks of 32 (Q4_0 … Q8_0) or 256 (Q4_K … Q6_K) numbers.

import { bf16BitsToF32, f16BitsToF32, f16Values, f32ToBf16Bits } from './half.ts';
import { dtypeLayout, type WeightType } from './kernels.ts';

type BlockDecoder = (data: Uint8Array, at: number, out: Float32Array, to: number) => void;

function half(data: Uint8Array, at: number): number {
  return f16Values[data[at]! | (data[at + 1]! << 8)]!;
}

/** 32 four-bit numbers as they are: low nibbles first, then high ones. */
function nibbles(data: Uint8Array, at: number, out: Float32Array, to: number): void {
  for (let i = 0; i < 16; i++) {
    const byte = data[at + i]!;
    out[to + i] = byte & 15;
    out[to + i + 16] = byte >> 4;
  }
}

/** Adds 16 where bit i of the 32-bit word at `at` is set: the fifth bit of number i. */
function addFifths(data: Uint8Array, at: number, out: Float32Array, to: number): void {
  for (let i = 0; i < 32; i++) {
    if ((data[at + (i >> 3)]! >> (i & 7)) & 1) out[to + i]! += 16;
  }
}

/** 32 numbers q in place → d·q + m, rounded once. */
function affine(out: Float32Array, to: number, d: number, m: number): void {
  for (let i = to; i < to + 32; i++) out[i] = d * out[i]! + m;
}

/** 32 numbers q in place → d·(q - zero). Not affine: where q is `zero` and d negative, the result is -0, as ggml's is. */
function centred(out: Float32Array, to: number, d: number, zero: number): void {
  for (let i = to; i < to + 32; i++) out[i] = d * (out[i]! - zero);
}

/** Scale and minimum j of the eight sub-blocks of a Q4_K or Q5_K block: 6 bits each in 12 bytes. */
function scaleMin(data: Uint8Array, at: number, j: number): readonly [scale: number, min: number] {
  if (j < 4) return [data[at + j]! & 63, data[at + j + 4]! & 63];
  const high = data[at + j + 4]!;
  return [(high & 15) | ((data[at + j - 4]! >> 6) << 4), (high >> 4) | ((data[at + j]! >> 6) << 4)];
}

function q4k(data: Uint8Array, at: number, out: Float32Array, to: number): void {
  const [d, dMin] = [half(data, at), half(data, at + 2)];
  for (let j = 0; j < 8; j++) {
    const [scale, min] = scaleMin(data, at + 4, j);
    const bytes = at + 16 + (j >> 1) * 32;
    const shift = (j & 1) * 4;
    for (let i = 0; i < 32; i++) {
      out[to + j * 32 + i] = d * scale * ((data[bytes + i]! >> shift) & 15) - dMin * min;
    }
  }
}

function q5k(data: Uint8Array, at: number, out: Float32Array, to: number): void {
  const [d, dMin] = [half(data, at), half(data, at + 2)];
  for (let j = 0; j < 8; j++) {
    const [scale, min] = scaleMin(data, at + 4, j);
    const bytes = at + 48 + (j >> 1) * 32;
    const shift = (j & 1) * 4;
    for (let i = 0; i < 32; i++) {
      const fifth = ((data[at + 16 + i]! >> j) & 1) << 4;
      const q = ((data[bytes + i]! >> shift) & 15) | fifth;
      out[to + j * 32 + i] = d * scale * q - dMin * min;
    }
  }
}

/** 16 sub-blocks of 16: four low bits in ql, two high bits in qh, signed 8-bit scales, one f16 for all. */
function q6k(data: Uint8Array, at: number, out: Float32Array, to: number): void {
  const d = half(data, at + 208);
  for (let part = 0; part < 2; part++) {
    const [ql, qh, scales] = [at + part * 64, at + 128 + part * 32, at + 192 + part * 8];
    for (let i = 0; i < 32; i++) {
      for (let quarter = 0; quarter < 4; quarter++) {
        const low = (data[ql + i + (quarter & 1) * 32]! >> ((quarter >> 1) * 4)) & 15;
        const high = (data[qh + i]! >> (quarter * 2)) & 3;
        const scale = (data[scales + quarter * 2 + (i >> 4)]! << 24) >> 24;
        out[to + part * 128 + quarter * 32 + i] = d * scale * ((low | (high << 4)) - 32);
      }
    }
  }
}

const decoders: Partial<Record<WeightType, BlockDecoder>> = {
  q4_0(data, at, out, to) {
    const d = half(data, at);
    nibbles(data, at + 2, out, to);
    centred(out, to, d, 8);
  },
  q4_1(data, at, out, to) {
    nibbles(data, at + 4, out, to);
    affine(out, to, half(data, at), half(data, at + 2));
  },
  q5_0(data, at, out, to) {
    const d = half(data, at);
    nibbles(data, at + 6, out, to);
    addFifths(data, at + 2, out, to);
    centred(out, to, d, 16);
  },
  q5_1(data, at, out, to) {
    nibbles(data, at + 8, out, to);
    addFifths(data, at + 4, out, to);
    affine(out, to, half(data, at), half(data, at + 2));
  },
  q8_0(data, at, out, to) {
    const d = half(data, at);
    for (let i = 0; i < 32; i++) out[to + i] = d * ((data[at + 2 + i]! << 24) >> 24);
  },
  q4_k: q4k,
  q5_k: q5k,
  q6_k: q6k,
};

/** Decodes whole blocks: `out.length` numbers from the start of `data`. */
export function dequantizeRows(type: WeightType, data: Uint8Array, out: Float32Array): void {
  const decode = decoders[type];
  if (decode === undefined) {
    decodeFloats(type, data, out);
    return;
  }
  const { block, bytes } = dtypeLayout[type];
  for (let to = 0, at = 0; to < out.length; to += block, at += bytes) decode(data, at, out, to);
}

function decodeFloats(type: WeightType, data: Uint8Array, out: Float32Array): void {
  const bytes = out.length * dtypeLayout[type].bytes;
  // A copy, because tensors in a file may start at any byte (and Buffer's own slice() would be a view).
  const aligned = new Uint8Array(data.subarray(0, bytes)).buffer;
  if (type === 'f32') out.set(new Float32Array(aligned));
  else if (type === 'f16') f16BitsToF32(new Uint16Array(aligned), out);
  else bf16BitsToF32(new Uint16Array(aligned), out);
}

/** The same numbers rounded to bf16, a block at a time, without an f32 copy of the whole. */
export function dequantizeToBf16(type: WeightType, data: Uint8Array, out: Uint16Array): void {
  const decode = decoders[type];
  const { block, bytes } = dtypeLayout[type];
  if (decode === undefined) {
    const values = new Float32Array(out.length);
    decodeFloats(type, data, values);
    f32ToBf16Bits(values, out);
    return;
  }
  const values = new Float32Array(block);
  const words = new Uint32Array(values.buffer);
  for (let to = 0, at = 0; to < out.length; to += block, at += bytes) {
    decode(data, at, values, 0);
    for (let i = 0; i < block; i++) {
      const word = words[i]!; // weights are finite: no NaN to preserve
      out[to + i] = (word + 0x7fff + ((word >>> 16) & 1)) >>> 16;
    }
  }
}
