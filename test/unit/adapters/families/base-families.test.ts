import { describe, expect, it } from 'vitest';
import {
  bytesOf,
  type Family,
  forward,
  parameterCount,
  type Site,
  type Tensors,
} from '../../../../src/adapters/families/family.ts';
import { flexmore, mixture } from '../../../../src/adapters/families/flexmore.ts';
import { hydra } from '../../../../src/adapters/families/hydra.ts';
import { lora } from '../../../../src/adapters/families/lora.ts';
import {
  beside,
  times,
  transposedTimes,
  zeros,
} from '../../../../src/adapters/families/matrices.ts';
import { salt } from '../../../../src/adapters/families/salt.ts';
import { createRandom } from '../../../../src/adapters/families/seeded-random.ts';
import { rankAtEnergy, singularBasis } from '../../../../src/adapters/families/singular-basis.ts';
import { svfit, svfitBasis } from '../../../../src/adapters/families/svfit.ts';
import {
  type Columns,
  multiplyTransposed,
  transpose,
} from '../../../../src/adapters/orthogonal.ts';
import type { LoraModule } from '../../../../src/adapters/squeeze.ts';
import {
  createAdam,
  largestDifference,
  normalColumns,
  pass,
  relativeError,
  testSite,
  trainedTensors,
} from '../../../support/family-site.ts';

// Families that adapt in the base's own directions (svfit, salt), beside and after it (hydra), or by mixing (flexmore):
// algorithms.md sections 20, 23, 29 and 40.

const site = testSite({ in: 40, out: 36 });
const x = normalColumns(createRandom(2n), 7, 40);

/** W·x. */
function base(where: Site, inputs: Columns): Columns {
  return transposedTimes(where.weight(), inputs);
}

function added(p: Columns, q: Columns): Columns {
  return { ...p, data: p.data.map((value, i) => value + q.data[i]!) };
}

/** W with the singular values that `change` makes, as the outputs for the columns of a unit matrix less W: the wanted ΔW. */
function plantedDelta(where: Site, change: (s: number, i: number) => number): Columns {
  const { u, v, sigma } = singularBasis(where);
  const deltas = sigma.map((s, i) => change(s, i) - s);
  const scaled = { ...u, data: u.data.map((value, i) => value * deltas[Math.floor(i / u.rows)]!) };
  return multiplyTransposed(scaled, v); // [out, in]
}

function unit(size: number): Columns {
  const data = new Float64Array(size * size);
  for (let i = 0; i < size; i++) data[i * size + i] = 1;
  return { rows: size, columns: size, data };
}

/** Adam on ‖ΔW − wanted‖² from the family's start. */
function _fit(
  family: ReturnType<typeof svfit>,
  wanted: Columns,
  { rate, steps }: { rate: number; steps: number },
) {
  const tensors = family.init(site, createRandom(3n));
  const adam = createAdam(tensors, family.trained, rate);
  for (let step = 0; step < steps; step++) {
    const { y, gradient } = pass(family, site, tensors, unit(40));
    const d = { ...y, data: y.data.map((value, i) => value - wanted.data[i]!) };
    adam(gradient(d).tensors, 1 - step / steps);
  }
  return tensors;
}

/** Adam on ‖ΔW − wanted‖² from the family's start. */
function fitted(
  family: Family,
  wanted: Columns,
  { rate, steps }: { readonly rate: number; readonly steps: number },
): Tensors {
  const tensors = family.init(site, createRandom(3n));
  const adam = createAdam(tensors, family.trained, rate);
  for (let step = 0; step < steps; step++) {
    const { y, gradient } = pass(family, site, tensors, unit(40));
    const d = { ...y, data: y.data.map((value, i) => value - wanted.data[i]!) };
    adam(gradient(d).tensors, 1 - step / steps);
  }
  return tensors;
}

describe('singular basis', () => {
  it.each([
    [40, 36],
    [36, 40],
    [9, 9],
  ])('is the thin SVD of a weight of %i inputs and %i outputs', (width, out) => {
    const where = testSite({ in: width, out });
    const { u, v, sigma } = singularBasis(where);
    const n = Math.min(width, out);
    expect([sigma.length, u.columns, v.columns]).toEqual([n, n, n]);
    for (const side of [u, v]) {
      expect(largestDifference(transposedTimes(side, side).data, unit(n).data)).toBeLessThan(1e-10);
    }
    const scaled = { ...v, data: v.data.map((value, i) => value * sigma[Math.floor(i / width)]!) };
    const back = multiplyTransposed(scaled, u); // [in, out]
    expect(largestDifference(back.data, where.weight().data)).toBeLessThan(1e-10);
    for (let i = 1; i < n; i++) expect(sigma[i]!).toBeLessThanOrEqual(sigma[i - 1]!);
  });

  it('says the least rank that keeps a share of the energy', () => {
    expect(rankAtEnergy(Float64Array.from([3, 2, 1]), 9 / 14)).toBe(1);
    expect(rankAtEnergy(Float64Array.from([3, 2, 1]), 0.65)).toBe(2);
    expect(rankAtEnergy(Float64Array.from([3, 2, 1]), 1)).toBe(3);
  });
});

describe('svfit', () => {
  const family = svfit({ rank: 20 });

  it('leaves the logits bit-identical at the start', () => {
    const y = base(site, x);
    const { data } = pass(family, site, family.init(site, createRandom(1n)), x).y;
    expect(added(y, { ...y, data }).data).toEqual(y.data);
  });

  it('recovers a planted scaling of the top 16 singular values to 1e-3', () => {
    const factor = (i: number): number => 1 + 0.1 * ((i * 7) % 5) - 0.15;
    const { sigma } = singularBasis(site);
    const wanted = plantedDelta(site, (s, i) => (i < 16 ? s * factor(i) : s));
    const { deltas } = fitted(family, wanted, { rate: 0.05, steps: 800 });
    for (let i = 0; i < 20; i++) {
      const planted = i < 16 ? sigma[i]! * (factor(i) - 1) : 0;
      expect(Math.abs(deltas!.data[i]! - planted)).toBeLessThan(1e-3);
    }
  });

  it('is r floats a module, at most 1/16 of the LoRA of its rank, and shares its basis', () => {
    const tensors = trainedTensors(family, site, createRandom(4n));
    expect(parameterCount(family, tensors)).toBe(20);
    const served = family.serve(site, tensors);
    expect([served.a, served.b, served.gates!.length]).toEqual([null, null, 20]);
    const basis = svfitBasis(site, 20);
    expect(bytesOf(served)).toBe(80);
    expect(bytesOf(basis)).toBe(2 * 20 * 76);
    expect(bytesOf(served)).toBeLessThanOrEqual(bytesOf(basis) / 16);
    const other = trainedTensors(family, site, createRandom(5n));
    expect(family.pair(site, other, null).a).toEqual(family.pair(site, tensors, null).a);
  });
});

describe('salt', () => {
  it('leaves the logits bit-identical at the start, though X is not 0', () => {
    const family = salt({ rank: 8, tailRank: 4 });
    const tensors = family.init(site, createRandom(1n));
    expect(tensors.x!.data.some((value) => value !== 0)).toBe(true);
    const y = base(site, x);
    expect(added(y, pass(family, site, tensors, x).y).data).toEqual(y.data);
  });

  it('trains 2k + r·(m′ + n′) numbers', () => {
    const family = salt({ rank: 8, tailRank: 4 });
    const tensors = family.init(site, createRandom(1n));
    // Of 36 values 28 are the rest: m' = n' = 28.
    expect(parameterCount(family, tensors)).toBe(2 * 8 + 4 * (28 + 28));
  });

  it('fits the top 8 singular values times 1.5 with 16 numbers, below 1e-3', () => {
    const family = salt({ rank: 8, tailRank: 0 });
    const wanted = plantedDelta(site, (s, i) => (i < 8 ? 1.5 * s : s));
    const tensors = fitted(family, wanted, { rate: 0.02, steps: 600 });
    expect(parameterCount(family, tensors)).toBe(16);
    const error = Math.sqrt(relativeError(pass(family, site, tensors, unit(40)).y, wanted));
    expect(error).toBeLessThan(1e-3);
  });

  it('clips the diagonal at 0, and nothing of X·Y', () => {
    const family = salt({ rank: 2, tailRank: 1 });
    const { sigma } = singularBasis(site);
    const { beta, x: factor } = family.init(site, createRandom(1n));
    const tensors = {
      beta: beta!,
      x: factor!,
      alpha: { rows: 1, columns: 2, data: Float64Array.from([-1, 0.5]) },
      y: normalColumns(createRandom(6n), 1, 34, -1),
    };
    const pair = family.pair(site, tensors, null);
    expect(Array.from(pair.gates)).toEqual([-sigma[0]!, 0.5 * sigma[1]! - sigma[1]!, 1]);
    const { u, v } = singularBasis(site);
    // ⟨u_i, ΔW·v_j⟩ is the change of Sigma's entry: x_i·y_j in the rest, of either sign.
    const delta = times(pass(family, site, tensors, unit(40)).y, v);
    const sigmaChange = transposedTimes(u, delta);
    const entry = (i: number, j: number): number => sigmaChange.data[j * 36 + i]!;
    let negative = 0;
    for (let i = 2; i < 36; i++) {
      for (let j = 2; j < 36; j++) {
        const wanted = tensors.x.data[i - 2]! * tensors.y.data[j - 2]!;
        expect(Math.abs(entry(i, j) - wanted)).toBeLessThan(1e-10);
        if (wanted < 0) negative++;
      }
    }
    expect(negative).toBeGreaterThan(100);
    expect(Math.abs(entry(0, 3))).toBeLessThan(1e-10);
  });
});

describe('hydra', () => {
  const family = hydra({ rank: 4, alpha: 8 });
  const tensors = trainedTensors(family, site, createRandom(7n));
  const scale = 2;
  const low = (a: Columns, b: Columns, inputs: Columns): Columns => {
    const y = times(b, transposedTimes(a, inputs));
    return { ...y, data: y.data.map((value) => value * scale) };
  };

  it('is its two branches, one on the input and one on the base output, to 1e-10', () => {
    const parallel = low(tensors['parallel.a']!, tensors['parallel.b']!, x);
    const sequential = low(tensors['sequential.a']!, tensors['sequential.b']!, base(site, x));
    const got = pass(family, site, tensors, x).y;
    expect(largestDifference(got.data, added(parallel, sequential).data)).toBeLessThan(1e-10);
  });

  it('is merged as (I + s·B_s·A_s)·W0 + s·B_p·A_p, to 1e-10', () => {
    const dense = (side: string): Columns =>
      multiplyTransposed(tensors[`${side}.b`]!, tensors[`${side}.a`]!); // B·A
    const sequential = dense('sequential');
    const factor = {
      ...unit(36),
      data: unit(36).data.map((v, i) => v + scale * sequential.data[i]!),
    };
    const product = times(factor, transpose(site.weight())); // [out, in]
    const parallel = dense('parallel');
    const merged = { ...product, data: product.data.map((v, i) => v + scale * parallel.data[i]!) };
    const unmerged = added(base(site, x), pass(family, site, tensors, x).y);
    expect(largestDifference(times(merged, x).data, unmerged.data)).toBeLessThan(1e-10);
  });

  it('is the LoRA of rank 2r with A = [A_p; A_s·W0] and B = [B_p, B_s]', () => {
    const plain = lora({ rank: 8, alpha: 16, rslora: false, order: 'as-trained' });
    const stacked = {
      a: beside(tensors['parallel.a']!, times(site.weight(), tensors['sequential.a']!)),
      b: beside(tensors['parallel.b']!, tensors['sequential.b']!),
    };
    const got = pass(plain, site, stacked, x).y;
    expect(largestDifference(got.data, pass(family, site, tensors, x).y.data)).toBeLessThan(1e-10);
  });

  it('is LoRA when A_s is 0, bit for bit', () => {
    const plain = lora({ rank: 4, alpha: 8, rslora: false, order: 'svd' });
    const alone = { ...tensors, 'sequential.a': zeros(4, 36) };
    const wanted = pass(plain, site, { a: tensors['parallel.a']!, b: tensors['parallel.b']! }, x).y;
    expect(pass(family, site, alone, x).y.data).toEqual(wanted.data);
  });
});

describe('flexmore', () => {
  const sizes = [
    { name: 'full', rank: 36 },
    { name: 'one', rank: 1 },
    { name: 'wide', rank: 64 },
  ];
  const experts = sizes.map(({ rank }, i): LoraModule => {
    const kept = Math.min(rank, 36);
    const random = createRandom(BigInt(20 + i));
    const a = normalColumns(random, kept, 40).data;
    const b = normalColumns(random, 36, kept).data;
    return { rank: kept, in: 40, out: 36, a, b, scale: 1 };
  });
  const delta = ({ rank, a, b }: LoraModule, inputs: Columns): Columns => {
    const h = transposedTimes({ rows: 40, columns: rank, data: a }, inputs);
    return times(transpose({ rows: rank, columns: 36, data: b }), h);
  };

  it('mixes experts of rank full, 1 and 64 by their weights', () => {
    const family = flexmore({ experts: sizes });
    const weights = [0.5, -1.25, 0.25];
    const got = pass(family, site, mixture(experts, weights), x).y;
    const wanted = experts
      .map((expert, e) => {
        const y = delta(expert, x);
        return { ...y, data: y.data.map((value) => value * weights[e]!) };
      })
      .reduce<Columns>(added, zeros(7, 36));
    expect(largestDifference(got.data, wanted.data)).toBeLessThan(1e-10);
  });

  it('is the expert itself when there is one, of weight 1', () => {
    const family = flexmore({ experts: sizes.slice(1, 2) });
    const got = pass(family, site, mixture(experts.slice(1, 2), [1]), x).y;
    expect(got.data).toEqual(delta(experts[1]!, x).data);
  });

  it('takes exactly what its experts take: 2·rank·(in + out) bytes each', () => {
    const narrow = [2, 1, 5].map(
      (rank, i): LoraModule => ({
        ...experts[0]!,
        rank,
        a: normalColumns(createRandom(BigInt(40 + i)), rank, 40).data,
        b: normalColumns(createRandom(BigInt(30 + i)), 36, rank).data,
      }),
    );
    const family = flexmore({ experts: narrow.map(({ rank }, i) => ({ name: `e${i}`, rank })) });
    const each = narrow.map(({ rank }) => 2 * rank * (40 + 36));
    const tensors = mixture(narrow, [1, 1, 1]);
    expect(bytesOf(family.serve(site, tensors))).toBe(each.reduce((sum, bytes) => sum + bytes, 0));
  });

  it('keeps the best of every expert in a prefix', () => {
    const family = flexmore({ experts: sizes });
    const tensors = mixture(experts, [1, 1, 1]);
    expect(Array.from(tensors.expert!.data.slice(0, 7))).toEqual([0, 1, 2, 0, 2, 0, 2]);
    const first = experts.map((expert) => ({
      ...expert,
      rank: 1,
      a: expert.a.slice(0, 40),
      b: Float64Array.from({ length: 36 }, (_, o) => expert.b[o * expert.rank]!),
    }));
    const got = forward(family, site, tensors, { x, rank: 3 }).y;
    const wanted = first.map((expert) => delta(expert, x)).reduce<Columns>(added, zeros(7, 36));
    expect(largestDifference(got.data, wanted.data)).toBeLessThan(1e-12);
  });

  it('refuses ranks of an expert that is not there', () => {
    const family = flexmore({ experts: sizes.slice(0, 2) });
    expect(() => pass(family, site, mixture(experts, [1, 1, 1]), x)).toThrow('no expert 2');
  });
});
