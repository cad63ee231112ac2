import { readFileSync } from 'node:fs';
import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import type { Columns } from '../../../src/adapters/orthogonal.ts';
import {
  type LoraModule,
  loraOf,
  rankCurve,
  type SqueezedModule,
  squeezeModule,
} from '../../../src/adapters/squeeze.ts';
import { createRng } from '../../support/random.ts';

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

describe('squeezeModule to fewer ranks', () => {
  function randomModule(rank: number, width: number, out: number, decay: number): LoraModule {
    const rng = createRng(rank);
    const a = Float64Array.from({ length: rank * width }, () => rng.normal());
    const b = Float64Array.from(
      { length: out * rank },
      (_, i) => rng.normal() * decay ** (i % rank),
    );
    return { rank, in: width, out, a, b, scale: 0.5 };
  }
  const tail = (sigma: Float64Array, k: number): number => norm(sigma.slice(k));
  const prefixOf = ({ rank, a, b }: SqueezedModule): LoraModule =>
    loraOf({ rank, a, b, sigma: new Float64Array(rank) });

  it('is the prefix of squeezing to all, scale included', () => {
    const module = randomModule(24, 40, 30, 0.8);
    const whole = squeezeModule(module);
    for (const rankMax of [1, 5, 24]) {
      const fewer = squeezeModule(module, { rankMax });
      expect(fewer.rank).toBe(rankMax);
      expect(distance(fewer.a, whole.a.slice(0, rankMax * 40))).toBeLessThan(1e-12);
      expect(distance(fewer.b, whole.b.slice(0, rankMax * 30))).toBeLessThan(1e-12);
    }
  });

  it('of more than 128 ranks is at most 1.01 of the best error', () => {
    const module = randomModule(160, 200, 180, 0.97);
    const delta = deltaOf(module);
    const { sigma } = squeezeModule(module);
    for (const rankMax of [4, 16, 64]) {
      const squeezed = squeezeModule(module, { rankMax, seed: 11 });
      expect(squeezed.rank).toBe(rankMax);
      const error = distance(deltaOf(prefixOf(squeezed)), delta);
      expect(error).toBeLessThanOrEqual(1.01 * tail(sigma, rankMax));
    }
  });
});

describe('squeezeModule by output energy', () => {
  const [width, out, rank] = [20, 16, 6];
  const rng = createRng(99);
  const normals = (length: number): Float64Array =>
    Float64Array.from({ length }, () => rng.normal());
  const module: LoraModule = {
    ...{ rank, in: width, out, scale: 2 },
    ...{ a: normals(rank * width), b: normals(out * rank) },
  };
  /** [inputs, in], and their covariance. */
  const inputsOf = (count: number): { inputs: Float64Array[]; covariance: Columns } => {
    const inputs = Array.from({ length: count }, () =>
      normals(width).map((value, i) => value * 3 * 0.8 ** i),
    );
    const data = new Float64Array(width * width);
    for (const x of inputs) {
      for (let i = 0; i < width; i++) {
        for (let j = 0; j < width; j++) data[i * width + j]! += x[i]! * x[j]!;
      }
    }
    return { inputs, covariance: { rows: width, columns: width, data } };
  };
  const applied = (delta: Float64Array, inputs: readonly Float64Array[]): Float64Array =>
    Float64Array.from(
      inputs.flatMap((x) =>
        Array.from({ length: out }, (_, o) =>
          x.reduce((sum, value, i) => sum + value * delta[o * width + i]!, 0),
        ),
      ),
    );
  const cut = ({ a, b, sigma }: SqueezedModule, k: number): Float64Array =>
    deltaOf(loraOf({ rank: k, a: a.slice(0, k * width), b: b.slice(0, k * out), sigma }));

  for (const count of [60, 4]) {
    const { inputs, covariance } = inputsOf(count);
    const want = applied(deltaOf(module), inputs);
    const ordered = squeezeModule(module, { covariance });
    const plain = squeezeModule(module);

    it(`${count} inputs: every prefix misses what its singular values say, and less than the plain one`, () => {
      for (let k = 1; k <= rank; k++) {
        const error = distance(applied(cut(ordered, k), inputs), want);
        const best = norm(ordered.sigma.slice(k));
        expect(Math.abs(error - best)).toBeLessThan(1e-6 * norm(want));
        const others = distance(applied(cut(plain, k), inputs), want);
        expect(error).toBeLessThanOrEqual(others + 1e-9 * norm(want));
      }
    });

    it(`${count} inputs: all ranks give the adapter back, also where no input goes`, () => {
      const delta = deltaOf(module);
      expect(ordered.rank).toBe(rank);
      expect(distance(cut(ordered, rank), delta)).toBeLessThan(1e-10 * norm(delta));
    });
  }

  it('with inputs alike in all directions is the plain one', () => {
    const data = Float64Array.from({ length: width ** 2 }, (_, i) =>
      i % (width + 1) === 0 ? 1 : 0,
    );
    const ordered = squeezeModule(module, { covariance: { rows: width, columns: width, data } });
    const plain = squeezeModule(module);
    for (let k = 1; k <= rank; k++) {
      expect(distance(cut(ordered, k), cut(plain, k))).toBeLessThan(1e-8 * norm(cut(plain, k)));
    }
    expect(distance(ordered.sigma, plain.sigma)).toBeLessThan(1e-8 * plain.sigma[0]!);
  });

  it('keeps no rank that is not there', () => {
    const { covariance } = inputsOf(40);
    const b = module.b.map((value, i) => (i % rank < 3 ? value : 0));
    expect(squeezeModule({ ...module, b }, { covariance }).rank).toBe(3);
  });
});
