import { describe, expect, it } from 'vitest';
import {
  bf16BitsToF32,
  f16BitsToF32,
  f32ToBf16Bits,
  f32ToF16Bits,
} from '../../../src/kernels/half.ts';

const every16 = Uint16Array.from({ length: 65_536 }, (_, i) => i);
const f16 = (...values: number[]): number[] => {
  const out = new Uint16Array(values.length);
  f32ToF16Bits(Float32Array.from(values), out);
  return [...out];
};
const bf16 = (...values: number[]): number[] => {
  const out = new Uint16Array(values.length);
  f32ToBf16Bits(Float32Array.from(values), out);
  return [...out];
};

describe('f16', () => {
  it('widens by the formula of IEEE 754 for the edges', () => {
    const out = new Float32Array(8);
    f16BitsToF32(
      Uint16Array.of(0x0000, 0x0001, 0x03ff, 0x0400, 0x3c00, 0x7bff, 0xfc00, 0x8000),
      out,
    );
    const wanted = [
      0,
      2 ** -24,
      1023 * 2 ** -24,
      2 ** -14,
      1,
      65_504,
      Number.NEGATIVE_INFINITY,
      -0,
    ];
    expect(out).toEqual(Float32Array.from(wanted));
  });

  it('comes back from f32 unchanged, for every pattern that is not NaN', () => {
    const values = new Float32Array(65_536);
    f16BitsToF32(every16, values);
    const back = new Uint16Array(65_536);
    f32ToF16Bits(values, back);
    for (let i = 0; i < 65_536; i++) {
      if (Number.isNaN(values[i])) expect(back[i]! & 0x7c00 && back[i]! & 0x3ff).toBeTruthy();
      else expect(back[i]).toBe(i);
    }
  });

  it('rounds to nearest even between every two neighbours', () => {
    const values = new Float32Array(65_536);
    f16BitsToF32(every16, values);
    // 0x7bff is the largest; above it the neighbour would be 65,536, which is infinity.
    const [middles, below, above, even] = [[], [], [], []] as [
      number[],
      number[],
      number[],
      number[],
    ];
    for (let low = 0; low < 0x7c00; low++) {
      const high = low === 0x7bff ? 65_536 : values[low + 1]!;
      const middle = (values[low]! + high) / 2; // exact in f32: one bit more than f16 has
      middles.push(middle);
      below.push(step(middle, -1));
      above.push(step(middle, 1));
      even.push(low + (low & 1));
    }
    const lows = Array.from({ length: 0x7c00 }, (_, i) => i);
    expect(f16(...middles)).toEqual(even);
    expect(f16(...below)).toEqual(lows);
    expect(f16(...above)).toEqual(lows.map((low) => low + 1));
    expect(f16(...middles.map((value) => -value))).toEqual(even.map((bits) => bits | 0x8000));
  });

  it('becomes infinity beyond its range and 0 below half its smallest', () => {
    expect(f16(65_519.996, 65_520, 1e30, Number.POSITIVE_INFINITY)).toEqual([
      0x7bff, 0x7c00, 0x7c00, 0x7c00,
    ]);
    expect(f16(2 ** -25, step(2 ** -25, 1), 1e-45, -1e-45)).toEqual([0, 1, 0, 0x8000]);
  });
});

describe('bf16', () => {
  it('comes back from f32 unchanged, for every pattern that is not NaN', () => {
    const values = new Float32Array(65_536);
    bf16BitsToF32(every16, values);
    const back = new Uint16Array(65_536);
    f32ToBf16Bits(values, back);
    for (let i = 0; i < 65_536; i++) {
      if (Number.isNaN(values[i])) expect(back[i]! & 0x7f80 && back[i]! & 0x7f).toBeTruthy();
      else expect(back[i]).toBe(i);
    }
  });

  it('rounds to nearest even, up to infinity', () => {
    // 1 + 2^-8 lies between 1 and 1 + 2^-7; 1 + 3·2^-8 between an odd and an even pattern.
    expect(bf16(1 + 2 ** -8, step(1 + 2 ** -8, 1), 1 + 3 * 2 ** -8)).toEqual([
      0x3f80, 0x3f81, 0x3f82,
    ]);
    expect(bf16(3.4028235e38, -3.4028235e38)).toEqual([0x7f80, 0xff80]);
  });
});

/** The f32 next to `value`, away from 0 for 1 and towards it for -1. */
function step(value: number, by: 1 | -1): number {
  const floats = Float32Array.of(value);
  new Uint32Array(floats.buffer)[0]! += by;
  return floats[0]!;
}
