import { describe, expect, it } from 'vitest';
import { mixAtoms, routeAtoms } from '../../../../src/adapters/families/atom-routing.ts';
import {
  type Family,
  parameterCount,
  type Tensors,
} from '../../../../src/adapters/families/family.ts';
import { lora } from '../../../../src/adapters/families/lora.ts';
import { columnsOf, times, transposedTimes } from '../../../../src/adapters/families/matrices.ts';
import {
  frozenAtoms,
  instructionPrior,
  priorBias,
  type QueryableOptions,
  queryable,
  routerOf,
  withMoreAtoms,
} from '../../../../src/adapters/families/queryable.ts';
import { createRandom } from '../../../../src/adapters/families/seeded-random.ts';
import { type Columns, jacobiSvd } from '../../../../src/adapters/orthogonal.ts';
import {
  createAdam,
  largestDifference,
  normalColumns,
  numericGradient,
  pass,
  sumOfProducts,
  testSite,
  trainedTensors,
} from '../../../support/family-site.ts';
import { threeRegimes } from '../../../support/three-regimes.ts';

// algorithms.md section 6: the three-regime task and the invariants.

const options: QueryableOptions = {
  rank: 4,
  alpha: 8,
  atoms: 5,
  queryWidth: 3,
  topK: 2,
  earlierBlocks: false,
  bias: null,
};
const site = testSite();
const family = queryable(options);
const tensors = trainedTensors(family, site, createRandom(1n));
const x = normalColumns(createRandom(2n), 30, 12);

describe('queryable', () => {
  it('learns three regimes that no LoRA of rank 16 can: MSE 0.05 with 224 parameters', () => {
    const task = threeRegimes(createRandom(6n));
    const routed = queryable({ ...options, alpha: 4, atoms: 4, queryWidth: 4, topK: 4 });
    const plain = lora({ rank: 16, alpha: 16, rslora: false, order: 'svd' });
    const own = train(routed, task, 1400);
    const theirs = train(plain, task, 500);
    expect(parameterCount(routed, own.tensors)).toBe(224);
    expect(parameterCount(plain, theirs.tensors)).toBe(512);
    expect(own.error).toBeLessThanOrEqual(0.05);
    expect(theirs.error).toBeGreaterThanOrEqual(0.5);
  });

  it('mixes convexly: no output is longer than the strongest atom makes it', () => {
    const atoms = tensors.atoms!;
    const strongest = Math.max(
      ...[0, 1, 2, 3, 4].map((k) => jacobiSvd(columnsOf(atoms, 4 * k, 4)).sigma[0]!),
    );
    const h = normalColumns(createRandom(3n), 1000, 4, 3);
    const { weights } = routeAtoms(h, [], routerOf(tensors, options));
    const { g } = mixAtoms(h, atoms, weights);
    for (let t = 0; t < 1000; t++) {
      const kept = weights.data.subarray(5 * t, 5 * t + 5);
      expect(kept.filter((weight) => weight > 0).length).toBe(2);
      expect(Math.abs(kept.reduce((sum, weight) => sum + weight, 0) - 1)).toBeLessThan(1e-12);
      const [got, own] = [length(g, t), length(h, t)];
      expect(got).toBeLessThanOrEqual(strongest * own * (1 + 1e-12));
    }
  });

  it('is LoRA bit for bit with one atom, the identity', () => {
    const one = queryable({ ...options, atoms: 1, topK: 1 });
    const plain = lora({ rank: 4, alpha: 8, rslora: false, order: 'svd' });
    const { a, b } = tensors;
    const unit = {
      rows: 4,
      columns: 4,
      data: Float64Array.from({ length: 16 }, (_, i) => (i % 5 === 0 ? 1 : 0)),
    };
    const routed = { ...trainedTensors(one, site, createRandom(7n)), a: a!, b: b!, atoms: unit };
    expect(pass(one, site, routed, x).y.data).toEqual(
      pass(plain, site, { a: a!, b: b! }, x).y.data,
    );
  });

  it('does not care in which order atoms and their keys are', () => {
    const order = [3, 0, 4, 2, 1];
    const pick = (m: Columns, width: number): Columns => ({
      ...m,
      data: Float64Array.from(
        order.flatMap((k) => Array.from(columnsOf(m, k * width, width).data)),
      ),
    });
    const shuffled = { ...tensors, keys: pick(tensors.keys!, 1), atoms: pick(tensors.atoms!, 4) };
    const [got, wanted] = [pass(family, site, shuffled, x).y, pass(family, site, tensors, x).y];
    expect(largestDifference(got.data, wanted.data)).toBeLessThan(1e-12);
  });

  it('is a LoRA with A = M·A once the weights are held', () => {
    const held = Float64Array.from([0.25, 0, 0.75, 0, 0]);
    const plain = lora({ rank: 4, alpha: 8, rslora: false, order: 'svd' });
    const got = pass(plain, site, { a: frozenAtoms(tensors, held), b: tensors.b! }, x).y;
    const pair = family.pair(site, tensors, null);
    const weights = {
      rows: 5,
      columns: 30,
      data: Float64Array.from({ length: 150 }, (_, i) => held[i % 5]!),
    };
    const mixed = mixAtoms(transposedTimes(pair.a, x), tensors.atoms!, weights).g;
    expect(largestDifference(got.data, times(pair.b, mixed).data)).toBeLessThan(1e-12);
  });

  it('leaves an adapter as it was when the bank gets more atoms', () => {
    const { a, b, keys, ...bank } = tensors;
    const grown = withMoreAtoms(bank, 3, createRandom(8n));
    expect(grown.atoms!.columns).toBe(8 * 4);
    expect(grown.atoms!.data.slice(0, 80)).toEqual(bank.atoms!.data);
    const after = { a: a!, b: b!, keys: keys!, ...grown };
    expect(pass(family, site, after, x).y.data).toEqual(pass(family, site, tensors, x).y.data);
    // And one that has keys for the new atoms uses them.
    const wider = queryable({ ...options, atoms: 8 });
    const newKeys = normalColumns(createRandom(9n), 8, 3, 4);
    newKeys.data.set(keys!.data);
    const { weights } = routeAtoms(
      transposedTimes(a!, x),
      [],
      routerOf({ ...after, keys: newKeys }, { ...options, atoms: 8 }),
    );
    expect(weights.data.some((weight, i) => i % 8 >= 5 && weight > 0)).toBe(true);
    expect(() => pass(wider, site, { ...tensors, keys: newKeys }, x)).toThrow('there are 8 keys');
  });
});

describe("queryable's instruction prior", () => {
  const labels = normalColumns(createRandom(11n), 5, 6);
  /** The instruction that names atom 3. */
  const named = columnsOf(labels, 3, 1).data;
  const p = instructionPrior(named, labels, 1);
  const weightsAt = (strength: number, prior: Float64Array, topK: number): Columns => {
    const biased = { ...options, topK, bias: priorBias(prior, strength) };
    return routeAtoms(transposedTimes(tensors.a!, x), [], routerOf(tensors, biased)).weights;
  };

  it('is a distribution that has the named label first', () => {
    expect(Math.abs(p.reduce((sum, value) => sum + value, 0) - 1)).toBeLessThan(1e-12);
    expect(p.indexOf(Math.max(...p))).toBe(3);
  });

  it('is ignored at strength 0', () => {
    expect(weightsAt(0, p, 2).data).toEqual(
      routeAtoms(transposedTimes(tensors.a!, x), [], routerOf(tensors, options)).weights.data,
    );
    expect(priorBias(Float64Array.from([1, 0]), 0)).toEqual([0, 0]);
  });

  it('raises the named atom over strengths 0, 0.25, 0.5, 1, 2', () => {
    for (const topK of [2, 5]) {
      const means = [0, 0.25, 0.5, 1, 2].map((strength) => {
        const { data } = weightsAt(strength, p, topK);
        return data.reduce((sum, value, i) => sum + (i % 5 === 3 ? value : 0), 0) / 30;
      });
      for (let i = 1; i < means.length; i++) expect(means[i]!).toBeGreaterThan(means[i - 1]!);
    }
  });

  it('decides alone at a strength of a million, when it is decided itself', () => {
    const decided = instructionPrior(named, labels, 0.02);
    const { data } = weightsAt(1e6, decided, 2);
    expect(
      largestDifference(
        data,
        Float64Array.from({ length: 150 }, (_, i) => decided[i % 5]!),
      ),
    ).toBeLessThan(1e-6);
  });

  it('is the renormalised top-k of the prior where the query says nothing', () => {
    const silent = { ...tensors, query: { ...tensors.query!, data: new Float64Array(12) } };
    const biased = { ...options, bias: priorBias(p, 1) };
    const { weights } = routeAtoms(transposedTimes(tensors.a!, x), [], routerOf(silent, biased));
    const best = Array.from(p.keys())
      .sort((i, j) => p[j]! - p[i]!)
      .slice(0, 2);
    const total = best.reduce((sum, k) => sum + p[k]!, 0);
    const wanted = Array.from(p, (value, k) => (best.includes(k) ? value / total : 0));
    expect(largestDifference(columnsOf(weights, 7, 1).data, wanted)).toBeLessThan(1e-12);
  });
});

describe("queryable's blocks", () => {
  const deep: QueryableOptions = { ...options, topK: 3, earlierBlocks: true };
  const bank = trainedTensors(queryable(deep), site, createRandom(12n));
  const h = normalColumns(createRandom(13n), 6, 4);
  const earlier = [14n, 15n, 16n].map((seed) => normalColumns(createRandom(seed), 6, 4));

  it('look at the summaries of earlier blocks, by hand for one of them', () => {
    // One summary: its softmax is 1, so c = s.
    const { weights } = routeAtoms(h, earlier.slice(0, 1), routerOf(bank, { ...deep, topK: 5 }));
    const q = transposedTimes(bank.query!, h);
    const context = transposedTimes(bank.context!, earlier[0]!);
    const both = { ...q, data: q.data.map((value, i) => value + context.data[i]!) };
    const logits = transposedTimes(bank.keys!, both);
    for (let t = 0; t < 6; t++) {
      const masses = Array.from(columnsOf(logits, t, 1).data, (value) =>
        Math.exp(value / Math.sqrt(3)),
      );
      const total = masses.reduce((sum, mass) => sum + mass, 0);
      const wanted = masses.map((mass) => mass / total);
      expect(largestDifference(columnsOf(weights, t, 1).data, wanted)).toBeLessThan(1e-12);
    }
  });

  it('attend more to a summary that is like W_s·h', () => {
    const e = transposedTimes(bank.summary!, h);
    const strong = { ...e, data: e.data.map((value) => value * 100) };
    const [alone, among] = [[strong], [strong, ...earlier]].map(
      (summaries) => routeAtoms(h, summaries, routerOf(bank, deep)).weights.data,
    );
    expect(largestDifference(alone!, among!)).toBeLessThan(1e-6);
  });

  it('see nothing of other tokens: prefill and decode agree, bit for bit', () => {
    const all = routeAtoms(h, earlier, routerOf(bank, deep)).weights;
    for (let t = 0; t < 6; t++) {
      const own = earlier.map((s) => columnsOf(s, t, 1));
      const alone = routeAtoms(columnsOf(h, t, 1), own, routerOf(bank, deep)).weights;
      expect(alone.data).toEqual(columnsOf(all, t, 1).data);
    }
  });

  it('have gradients as central differences have them, summaries included', () => {
    const weights = normalColumns(createRandom(17n), 6, 5);
    const loss = (): number =>
      sumOfProducts(routeAtoms(h, earlier, routerOf(bank, deep)).weights, weights);
    const back = routeAtoms(h, earlier, routerOf(bank, deep)).gradient(weights);
    const names = ['keys', 'query', 'summary', 'context'];
    expect(new Set(Object.keys(back.tensors))).toEqual(new Set(names));
    const checks = [
      { of: h, got: back.dh },
      ...earlier.map((of, j) => ({ of, got: back.earlier[j]! })),
      ...names.map((name) => ({ of: bank[name]!, got: back.tensors[name]! })),
    ];
    for (const { of, got } of checks) {
      const size = Math.max(...got.data.map(Math.abs));
      expect(size).toBeGreaterThan(1e-3);
      got.data.forEach((value, i) => {
        expect(Math.abs(value - numericGradient(loss, of.data, i))).toBeLessThan(1e-4 * size);
      });
    }
  });
});

function length(m: Columns, j: number): number {
  return Math.hypot(...columnsOf(m, j, 1).data);
}

/** Adam on fresh batches; the error on others, as a share of the target's size. */
function train(
  kind: Family,
  draw: ReturnType<typeof threeRegimes>,
  steps: number,
): { tensors: Tensors; error: number } {
  const random = createRandom(4n);
  const where = testSite({ in: 16, out: 16 });
  const trained = kind.init(where, random);
  const adam = createAdam(trained, kind.trained, 0.02);
  for (let step = 0; step < steps; step++) {
    const batch = draw(random, 64);
    const { y, gradient } = pass(kind, where, trained, batch.x);
    const d = { ...y, data: y.data.map((value, i) => (value - batch.target.data[i]!) / 64) };
    adam(gradient(d).tensors, Math.min(1, (2 * (steps - step)) / steps));
  }
  const test = draw(createRandom(5n), 2000);
  const { y } = pass(kind, where, trained, test.x);
  const error = y.data.reduce((sum, value, i) => sum + (value - test.target.data[i]!) ** 2, 0);
  return { tensors: trained, error: error / sumOfProducts(test.target, test.target) };
}
