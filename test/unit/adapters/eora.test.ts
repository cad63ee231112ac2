import { readFileSync } from 'node:fs';
import { describe, expect, it } from 'vitest';
import { type Columns, innerProducts, transpose } from '../../../src/adapters/orthogonal.ts';
import { type SqueezedModule, squeezeMatrix } from '../../../src/adapters/squeeze.ts';
import { createRng } from '../../support/random.ts';

// EoRA as published, by numpy (test/oracle/eora.py), against the pair without eigenvectors of C.

interface Golden {
  readonly cases: ReadonlyArray<{
    readonly name: string;
    readonly out: number;
    readonly in: number;
    readonly inputs: string;
    readonly error: string;
    readonly results: ReadonlyArray<{
      readonly rank: number;
      readonly outputs: string;
      readonly ratio: number;
      readonly plainRatio: number;
      readonly theory: number;
    }>;
  }>;
}

const golden = JSON.parse(
  readFileSync(new URL('../../golden/adapters/eora.json', import.meta.url), 'utf8'),
) as Golden;

function floats(text: string): Float64Array {
  return new Float64Array(new Uint8Array(Buffer.from(text, 'base64')).buffer);
}

const norm = (x: Float64Array): number => Math.sqrt(x.reduce((sum, v) => sum + v * v, 0));
const distance = (x: Float64Array, y: Float64Array): number => norm(x.map((v, i) => v - y[i]!));

/** Of the first `k` ranks on one input. */
function pairOf({ rank, a, b }: SqueezedModule, k: number, x: Float64Array): Float64Array {
  const [width, out] = [a.length / rank, b.length / rank];
  const y = new Float64Array(out);
  for (let r = 0; r < Math.min(k, rank); r++) {
    const h = x.reduce((sum, value, i) => sum + value * a[r * width + i]!, 0);
    for (let o = 0; o < out; o++) y[o]! += h * b[r * out + o]!;
  }
  return y;
}

describe.each(golden.cases)('EoRA, $name', (entry) => {
  const { out, in: width } = entry;
  const rows = floats(entry.inputs); // [inputs, in]
  const inputs = Array.from({ length: rows.length / width }, (_, t) =>
    rows.subarray(t * width, (t + 1) * width),
  );
  const byInput = transpose({ rows: width, columns: inputs.length, data: rows }); // [inputs, in] by columns
  const sums = innerProducts(byInput, byInput);
  const covariance = { ...sums, data: sums.data.map((value) => value / inputs.length) };
  const error = transpose({ rows: width, columns: out, data: floats(entry.error) }); // [out, in]
  const errorOn = (x: Float64Array): Float64Array =>
    innerProducts(transpose(error), { rows: width, columns: 1, data: x }).data;
  const all = norm(Float64Array.from(inputs.flatMap((x) => [...errorOn(x)])));

  for (const result of entry.results) {
    const { rank } = result;
    const made = squeezeMatrix(error, { rankMax: rank, covariance });
    const outputs = Float64Array.from(inputs.flatMap((x) => [...pairOf(made, rank, x)]));
    const missed = Float64Array.from(
      inputs.flatMap((x) => {
        const given = pairOf(made, rank, x);
        return [...errorOn(x).map((value, o) => value - given[o]!)];
      }),
    );

    it(`rank ${rank}: gives the text's inputs the published correction`, () => {
      // The fixture's are [out, inputs].
      const want = transpose({
        rows: inputs.length,
        columns: out,
        data: floats(result.outputs),
      }).data;
      expect(distance(outputs, want)).toBeLessThan(1e-6 * norm(want));
    });

    it(`rank ${rank}: leaves the spectral tail, which is less than plain SVD leaves`, () => {
      const ratio = norm(missed) / all;
      expect(Math.abs(ratio / result.theory - 1)).toBeLessThan(0.01);
      expect(Math.abs(ratio / result.ratio - 1)).toBeLessThan(1e-4);
      expect(ratio).toBeLessThanOrEqual(result.plainRatio);
      const plain = squeezeMatrix(error, { rankMax: rank });
      const others = Float64Array.from(
        inputs.flatMap((x) => {
          const given = pairOf(plain, rank, x);
          return [...errorOn(x).map((value, o) => value - given[o]!)];
        }),
      );
      expect(norm(others) / all).toBeCloseTo(result.plainRatio, 8);
    });
  }

  it('brings no input further from the reference, rank by rank, not even one that the text has not', () => {
    const rng = createRng(5);
    const made = squeezeMatrix(error, { rankMax: Math.min(out, width), covariance });
    for (let trial = 0; trial < 50; trial++) {
      const x = Float64Array.from({ length: width }, () => rng.normal());
      let before = norm(errorOn(x));
      for (let k = 1; k <= made.rank; k++) {
        const given = pairOf(made, k, x);
        const after = norm(errorOn(x).map((value, o) => value - given[o]!));
        expect(after).toBeLessThanOrEqual(before + 1e-9);
        before = after;
      }
    }
  });
});

describe('EoRA', () => {
  const rng = createRng(8);
  const random = (rows: number, columns: number): Columns => ({
    ...{ rows, columns },
    data: Float64Array.from({ length: rows * columns }, () => rng.normal()),
  });
  const identityOf = (size: number): Columns => ({
    ...{ rows: size, columns: size },
    data: Float64Array.from({ length: size * size }, (_, i) => (i % (size + 1) === 0 ? 1 : 0)),
  });

  it('with inputs alike in all directions is the plain SVD', () => {
    const error = random(40, 30);
    const x = random(30, 1).data;
    const made = squeezeMatrix(error, { rankMax: 12, covariance: identityOf(30) });
    const plain = squeezeMatrix(error, { rankMax: 12 });
    for (const k of [1, 5, 12]) {
      expect(distance(pairOf(made, k, x), pairOf(plain, k, x))).toBeLessThan(1e-8 * norm(x));
    }
    expect(distance(made.sigma, plain.sigma)).toBeLessThan(1e-8 * plain.sigma[0]!);
  });

  it('of a large matrix leaves the spectral tail to a hundredth', () => {
    const [out, width] = [240, 150];
    const error = random(out, width);
    const fade = random(width, width).data.map((v, i) => v * 0.97 ** (i % width));
    const factor = { rows: width, columns: width, data: fade }; // C^½ up to a rotation, on the left
    const covariance = innerProducts(factor, factor);
    const exact = squeezeMatrix(innerProducts(transpose(error), transpose(factor)), {
      rankMax: width,
    }).sigma;
    for (const rank of [8, 16, 32]) {
      const { left, kept } = leftOver(error, squeezeMatrix(error, { rankMax: rank, covariance }));
      const moved = innerProducts(transpose(left), transpose(factor));
      expect(kept).toBe(rank);
      expect(norm(moved.data) / norm(exact.slice(rank))).toBeLessThan(1.01);
      expect(norm(moved.data) / norm(exact.slice(rank))).toBeGreaterThan(1 - 1e-9);
    }
  });
});

/** error − B·A, [out, in]. */
function leftOver(error: Columns, { rank, a, b }: SqueezedModule): { left: Columns; kept: number } {
  const data = error.data.slice();
  for (let i = 0; i < error.columns; i++) {
    for (let r = 0; r < rank; r++) {
      const factor = a[r * error.columns + i]!;
      for (let o = 0; o < error.rows; o++)
        data[i * error.rows + o]! -= factor * b[r * error.rows + o]!;
    }
  }
  return { left: { ...error, data }, kept: rank };
}
