import { createHash } from 'node:crypto';
import { describe, expect, it } from 'vitest';
import { createRandom, philox4x32 } from '../../../../src/adapters/families/seeded-random.ts';
import fixture from '../../../golden/families/fly.json' with { type: 'json' };

describe('seeded random', () => {
  // Random123's known answers for philox4x32-10 (kat_vectors).
  it.each([
    [[0, 0, 0, 0], [0, 0], '6627e8d5 e169c58d bc57ac4c 9b00dbd8'],
    [
      [0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff],
      [0xffffffff, 0xffffffff],
      '408f276d 41c83b0e a20bc7c6 6d5451fd',
    ],
    [
      [0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344],
      [0xa4093822, 0x299f31d0],
      'd16cfe09 94fdcceb 5001e420 24126ea1',
    ],
  ] as const)('is Philox4x32-10 for counter %j', (counter, key, wanted) => {
    const words = Uint32Array.from(counter);
    philox4x32(words, key);
    expect(Array.from(words, (word) => word.toString(16).padStart(8, '0')).join(' ')).toBe(wanted);
  });

  it('draws normals: moments and the tails of a Gaussian', () => {
    const random = createRandom(7n);
    const count = 200_000;
    const values = Float64Array.from({ length: count }, () => random.normal());
    const moment = (n: number): number => values.reduce((sum, x) => sum + x ** n, 0) / count;
    // Five standard errors of each moment.
    expect(Math.abs(moment(1))).toBeLessThan(5 / Math.sqrt(count));
    expect(Math.abs(moment(2) - 1)).toBeLessThan(5 * Math.sqrt(2 / count));
    expect(Math.abs(moment(4) - 3)).toBeLessThan(5 * Math.sqrt(96 / count));
    const beyond3 = values.filter((x) => Math.abs(x) > 3).length / count;
    expect(Math.abs(beyond3 - 0.0026998)).toBeLessThan(5 * Math.sqrt(0.0027 / count));
  });

  it('computes the logarithm in its normals as Math.log does, to 1e-14', () => {
    const ours = createRandom(11n);
    const uniforms = createRandom(11n);
    let worst = 0;
    for (let n = 0; n < 20_000; n++) {
      let u: number;
      let v: number;
      let s: number;
      do {
        u = 2 * uniforms.uniform() - 1;
        v = 2 * uniforms.uniform() - 1;
        s = u * u + v * v;
      } while (s >= 1);
      const factor = Math.sqrt((-2 * Math.log(s)) / s);
      for (const wanted of [u * factor, v * factor]) {
        const error = Math.abs(ours.normal() - wanted) / Math.max(1, Math.abs(wanted));
        worst = Math.max(worst, error);
      }
    }
    expect(worst).toBeLessThan(1e-14);
  });

  it('draws whole numbers below a limit evenly', () => {
    const random = createRandom(3n);
    const counts = new Float64Array(7);
    for (let n = 0; n < 70_000; n++) counts[random.below(7)]! += 1;
    const chiSquare = counts.reduce((sum, count) => sum + (count - 10_000) ** 2 / 10_000, 0);
    expect(chiSquare).toBeLessThan(25); // p = 0.0003 for 6 degrees of freedom
  });

  it('gives other streams and seeds other numbers, and the same again', () => {
    const first = (seed: bigint, stream: readonly [number, number]): string => {
      const random = createRandom(seed, stream);
      return [random.uniform(), random.normal(), random.below(1000)].join(' ');
    };
    const all = [
      first(1n, [0, 0]),
      first(2n, [0, 0]),
      first(1n << 32n, [0, 0]),
      first(1n, [1, 0]),
      first(1n, [0, 1]),
    ];
    expect(new Set(all).size).toBe(all.length);
    expect(first(1n, [0, 0])).toBe(all[0]);
  });

  it('gives the bytes that Python gives (test/oracle/families.py)', () => {
    const random = createRandom(0x0123456789abcdefn, [5, 9]);
    const values = Float64Array.from({ length: 4096 }, () => random.normal());
    const hash = createHash('sha256').update(new Uint8Array(values.buffer)).digest('hex');
    expect(hash).toBe(fixture.normals);
  });
});
