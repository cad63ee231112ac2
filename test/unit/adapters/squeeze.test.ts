import { readFileSync } from 'node:fs';
import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { type LoraModule, rankCurve, squeezeModule } from '../../../src/adapters/squeeze.ts';

interface GoldenCase {
  readonly name: string;
  readonly out: number;
  readonly in: number;
  readonly rank: number;
  readonly scale: number;
  readonly a: string;
  readonly b: string;
  readonly sigma: readonly number[];
  readonly optimalError: readonly number[];
}

const golden = JSON.parse(
  readFileSync(new URL('../../golden/adapters/squeeze.json', import.meta.url), 'utf8'),
) as { readonly cases: readonly GoldenCase[] };

function floats(text: string): Float64Array {
  const bytes = Buffer.from(text, 'base64');
  return new Float64Array(new Uint8Array(bytes).buffer);
}

function moduleOf({ a, b, ...sizes }: GoldenCase): LoraModule {
  return { ...sizes, a: floats(a), b: floats(b) };
}

/** scale·B·A, [out, in]. */
function deltaOf(module: LoraModule): Float64Array {
  const delta = new Float64Array(module.out * module.in);
  for (let o = 0; o < module.out; o++) {
    for (let i = 0; i < module.in; i++) {
      let sum = 0;
      for (let r = 0; r < module.rank; r++) {
        sum += module.b[o * module.rank + r]! * module.a[r * module.in + i]!;
      }
      delta[o * module.in + i] = module.scale * sum;
    }
  }
  return delta;
}

/** B'[:, :k]·A'[:k, :] of what squeezeModule returned. */
function prefix(module: LoraModule, k: number): Float64Array {
  const { a, b, rank } = squeezeModule(module);
  const delta = new Float64Array(module.out * module.in);
  for (let r = 0; r < Math.min(k, rank); r++) {
    for (let o = 0; o < module.out; o++) {
      for (let i = 0; i < module.in; i++) {
        delta[o * module.in + i]! += b[r * module.out + o]! * a[r * module.in + i]!;
      }
    }
  }
  return delta;
}

function distance(x: Float64Array, y: Float64Array): number {
  return Math.sqrt(x.reduce((sum, value, i) => sum + (value - y[i]!) ** 2, 0));
}

function norm(x: Float64Array): number {
  return Math.sqrt(x.reduce((sum, value) => sum + value * value, 0));
}

describe('squeezeModule against numpy', () => {
  it('has every golden case', () => expect(golden.cases).toHaveLength(12));

  for (const entry of golden.cases) {
    const module = moduleOf(entry);
    const delta = deltaOf(module);
    const scale = Math.max(norm(delta), Number.MIN_VALUE);

    it(`${entry.name}: has numpy's singular values`, () => {
      const { sigma } = squeezeModule(module);
      const largest = entry.sigma[0]!;
      entry.sigma.forEach((value, i) => {
        expect(Math.abs((sigma[i] ?? 0) - value)).toBeLessThanOrEqual(1e-12 * largest);
      });
    });

    it(`${entry.name}: every prefix is as near as any matrix of its rank can be`, () => {
      for (let k = 1; k <= entry.optimalError.length; k++) {
        const error = distance(prefix(module, k), delta);
        // Where nothing is left to lose, the rounding of the reconstruction is all there is.
        expect(error).toBeLessThanOrEqual(entry.optimalError[k - 1]! * (1 + 1e-6) + 1e-12 * scale);
      }
    });

    it(`${entry.name}: all ranks give the adapter back`, () => {
      const error = distance(prefix(module, module.rank), delta);
      expect(error).toBeLessThanOrEqual(1e-12 * scale);
    });
  }

  it('keeps no rank that is not there, and one where nothing is', () => {
    const ranks = Object.fromEntries(
      golden.cases.map((entry) => [entry.name, squeezeModule(moduleOf(entry)).rank]),
    );
    expect(ranks).toMatchObject({
      'B of rank 4': 4,
      'equal rows and a zero column': 4,
      'zero B': 1,
      'rank above out': 6,
      'rank above in': 6,
      'rank above both': 5,
      tiny: 4,
    });
  });
});

const anyModule: fc.Arbitrary<LoraModule> = fc
  .record({
    rank: fc.integer({ min: 1, max: 9 }),
    in: fc.integer({ min: 1, max: 12 }),
    out: fc.integer({ min: 1, max: 12 }),
    scale: fc.double({ min: 0.1, max: 4, noNaN: true }),
  })
  .chain((sizes) => {
    const values = (length: number): fc.Arbitrary<Float64Array> =>
      fc
        .float32Array({ minLength: length, maxLength: length, min: -4, max: 4, noNaN: true })
        .map((floats) => Float64Array.from(floats)); // Files hold f32 at most.
    return fc
      .record({ a: values(sizes.rank * sizes.in), b: values(sizes.out * sizes.rank) })
      .map((factors) => ({ ...sizes, ...factors }));
  });

describe('squeezeModule on any module', () => {
  it('slicing a prefix equals squeezing to that rank', () => {
    fc.assert(
      fc.property(anyModule, fc.nat(8), (module, cut) => {
        const whole = squeezeModule(module);
        const k = Math.min(cut + 1, whole.rank);
        // The prefix as an adapter of its own, squeezed again.
        const b = new Float64Array(module.out * k);
        for (let r = 0; r < k; r++) {
          for (let o = 0; o < module.out; o++) b[o * k + r] = whole.b[r * module.out + o]!;
        }
        const a = whole.a.slice(0, k * module.in);
        const again = { rank: k, in: module.in, out: module.out, scale: 1, a, b };
        const want = prefix(module, k);
        expect(distance(prefix(again, k), want)).toBeLessThanOrEqual(1e-6 * (1 + norm(want)));
      }),
    );
  });

  it('the factors are balanced, orthogonal and signed one way', () => {
    fc.assert(
      fc.property(anyModule, (module) => {
        const { rank, a, b, sigma } = squeezeModule(module);
        const gram = (x: Float64Array, length: number, i: number, j: number): number => {
          let sum = 0;
          for (let k = 0; k < length; k++) sum += x[i * length + k]! * x[j * length + k]!;
          return sum;
        };
        for (let i = 0; i < rank; i++) {
          if (i > 0) expect(sigma[i]!).toBeLessThanOrEqual(sigma[i - 1]! * (1 + 1e-12));
          const column = b.subarray(i * module.out, (i + 1) * module.out);
          expect(Math.max(...column)).toBeGreaterThanOrEqual(-Math.min(...column));
          for (let j = 0; j <= i; j++) {
            const want = i === j ? sigma[i]! : 0;
            const room = 1e-9 * Math.sqrt(sigma[i]!) * Math.sqrt(sigma[j]!) + 1e-300;
            expect(Math.abs(gram(a, module.in, i, j) - want)).toBeLessThanOrEqual(room);
            expect(Math.abs(gram(b, module.out, i, j) - want)).toBeLessThanOrEqual(room);
          }
        }
      }),
    );
  });

  it('gives the same bytes for the same input', () => {
    const module = moduleOf(golden.cases[0]!);
    expect(squeezeModule(module)).toEqual(squeezeModule(module));
  });

  it('refuses a product that is not finite', () => {
    const module = { rank: 1, in: 1, out: 1, scale: 1e200, a: Float64Array.of(1e200) };
    expect(() => squeezeModule({ ...module, b: Float64Array.of(1) })).toThrow('not finite');
  });
});

describe('rankCurve', () => {
  it('is the share of energy over all modules, by uniform rank', () => {
    const curve = rankCurve([Float64Array.of(3, 1), Float64Array.of(2), Float64Array.of(1, 1, 1)]);
    expect(curve).toEqual([14 / 17, 16 / 17, 1]);
  });

  it('is all there is when there is nothing', () => {
    expect(rankCurve([Float64Array.of(0)])).toEqual([1]);
  });
});
