import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { dequantizeRows } from '../../../src/kernels/dequantize.ts';
import { f16BitsToF32, f32ToF16Bits } from '../../../src/kernels/half.ts';
import { pageBytes } from '../../../src/kernels/page-numbers.ts';

const width = 32;
const pool = { dtype: 'q8_0', shape: [2, 8, width], bytes: 2 * 8 * 34 } as const;

function roundTrip(numbers: Float32Array): { given: Float32Array; kept: Float32Array } {
  const halves = new Uint16Array(numbers.length);
  f32ToF16Bits(numbers, halves);
  const given = new Float32Array(numbers.length);
  f16BitsToF32(halves, given);
  const kept = new Float32Array(numbers.length);
  dequantizeRows('q8_0', pageBytes(pool, 1, halves), kept);
  return { given, kept };
}

describe('pageBytes', () => {
  it('q8_0 keeps every number within a 254th of the largest magnitude of its 32, from 1e-4 up', () => {
    const sized = fc.tuple(
      fc.array(fc.double({ min: -1, max: 1, noNaN: true }), { minLength: 256, maxLength: 256 }),
      fc.integer({ min: -12, max: 15 }),
    );
    fc.assert(
      fc.property(sized, ([numbers, power]) => {
        const { given, kept } = roundTrip(Float32Array.from(numbers, (x) => x * 2 ** power));
        for (let from = 0; from < given.length; from += 32) {
          const largest = Math.max(...given.subarray(from, from + 32).map(Math.abs));
          if (largest < 1e-4) continue;
          // The scale itself is rounded: to 11 bits, or to a 24-bit fixed point below 2^-14.
          const scaleError = Math.max(127 * 2 ** -25, largest * 2 ** -12);
          for (let i = from; i < from + 32; i++) {
            const bound = largest / 254 + scaleError;
            expect(Math.abs(kept[i]! - given[i]!)).toBeLessThanOrEqual(bound * 1.001);
          }
        }
      }),
    );
  });

  it('q8_0 of numbers below 3e-6 is zero, of zeros too, and of the largest f16 finite', () => {
    expect(roundTrip(new Float32Array(256).fill(3e-6)).kept).toEqual(new Float32Array(256));
    expect(roundTrip(new Float32Array(256)).kept).toEqual(new Float32Array(256));
    const { given, kept } = roundTrip(new Float32Array(256).fill(-65_504));
    expect(Math.abs(kept[0]! - given[0]!)).toBeLessThan(65_504 / 254);
  });
});
