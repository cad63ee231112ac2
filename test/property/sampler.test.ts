import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import type { Sampling } from '../../src/engine/messages.ts';
import { noHistory } from '../../src/engine/penalties.ts';
import { drawUniform, philox2x32 } from '../../src/engine/random-draw.ts';
import { Sampler } from '../../src/engine/sampler.ts';
import { nativeRowMath } from '../../src/kernels/ggml/native-row-math.ts';
import { blockNumbers, plainRowMath } from '../../src/kernels/row-math.ts';

const plain: Sampling = {
  temperature: 1,
  topP: 1,
  topK: 0,
  minP: 0,
  seed: 7,
  presencePenalty: 0,
  frequencyPenalty: 0,
  repetitionPenalty: 1,
  logitBias: [],
};

interface History {
  readonly prompt: ReadonlySet<number>;
  readonly counts: ReadonlyMap<number, number>;
}

/** The textbook sampler: sorts everything. Returns each kept token with its probability. */
function naiveDistribution(logits: Float32Array, s: Sampling, history: History) {
  const x = Float32Array.from(logits, (value, token) => {
    let y = value;
    if (history.prompt.has(token) || history.counts.has(token)) {
      y = Math.fround(y > 0 ? y / s.repetitionPenalty : y * s.repetitionPenalty);
    }
    const times = history.counts.get(token);
    return times === undefined ? y : y - s.frequencyPenalty * times - s.presencePenalty;
  });
  for (const [token, bias] of s.logitBias) x[token] = x[token]! + bias;
  const max = Math.max(...x);
  let kept = [...x]
    .map((value, token) => ({ token, value, weight: Math.exp((value - max) / s.temperature) }))
    .filter((one) => one.weight >= s.minP && one.weight > 0)
    .sort((a, b) => b.value - a.value || a.token - b.token);
  if (s.topK > 0) kept = kept.slice(0, s.topK);
  const total = kept.reduce((sum, one) => sum + one.weight, 0);
  let mass = 0;
  const cut = kept.findIndex((one) => {
    mass += one.weight;
    return mass >= s.topP * total;
  });
  if (s.topP < 1 && cut >= 0) kept = kept.slice(0, cut + 1);
  const rest = kept.reduce((sum, one) => sum + one.weight, 0);
  return kept
    .map((one) => ({ token: one.token, probability: one.weight / rest }))
    .sort((a, b) => a.token - b.token);
}

type Distribution = ReturnType<typeof naiveDistribution>;

function naiveDraw(kept: Distribution, seed: number, index: number): number {
  let target = drawUniform(seed, index);
  for (const one of kept) {
    target -= one.probability;
    if (target < 0) return one.token;
  }
  return kept.at(-1)!.token;
}

const native = nativeRowMath();
/** Whoever reads the rows, the answers are the same. */
const maths = [
  ['plain', plainRowMath],
  ...(native === null ? [] : [['native', native] as const]),
] as const;

// Steps of 1/64: many exact ties, and otherwise gaps far wider than rounding, so that one set of kept tokens is right.
const logitsArbitrary = fc.oneof(
  fc.array(
    fc.integer({ min: -1920, max: 1920 }).map((n) => n / 64),
    { minLength: 2, maxLength: 300, size: 'max' },
  ),
  // Long rows, made of a seed: few likely tokens in a few of many blocks, or all alike.
  fc
    .tuple(fc.nat(), fc.integer({ min: 600, max: 3000 }), fc.constantFrom(0.2, 2, 8))
    .map(([seed, length, scale]) =>
      Array.from(
        { length },
        (_, i) => Math.round(64 * scale * Math.log(drawUniform(seed, i) + 1e-3)) / 64,
      ),
    ),
  fc.array(fc.constantFrom(0, -0, 1, 1, 2, -1, -20), { minLength: 2, maxLength: 300, size: 'max' }),
);
const samplingArbitrary: fc.Arbitrary<Sampling> = fc.record({
  temperature: fc.constantFrom(0.2, 0.7, 1, 1.7),
  topP: fc.constantFrom(1, 0.95, 0.6, 0.11),
  topK: fc.constantFrom(0, 1, 2, 7, 40, 65, 150),
  minP: fc.constantFrom(0, 0, 0.03, 0.3, 1),
  seed: fc.nat(0xffffffff),
  presencePenalty: fc.constantFrom(0, 0, 0.5, -1),
  frequencyPenalty: fc.constantFrom(0, 0, 0.25, -0.5),
  repetitionPenalty: fc.constantFrom(1, 1, 1.25, 0.5),
  logitBias: fc.constantFrom([], [], [[0, 4] as const, [1, -100] as const]),
});
const historyArbitrary = fc.record({
  prompt: fc.array(fc.nat(60)).map((tokens) => new Set(tokens)),
  counts: fc
    .array(fc.tuple(fc.nat(60), fc.integer({ min: 1, max: 4 })))
    .map((pairs) => new Map(pairs)),
});

describe.each(maths)('Sampler, rows read by %s code', (_, math) => {
  it('draws what a sampler that sorts the whole vocabulary draws', () => {
    fc.assert(
      fc.property(
        logitsArbitrary,
        samplingArbitrary,
        historyArbitrary,
        fc.nat(1000),
        (values, sampling, history, index) => {
          const logits = Float32Array.from(values);
          const before = Float32Array.from(logits);
          const sampler = new Sampler(logits.length, math);
          const token = sampler.sample(logits, sampling, history, index);
          expect(logits).toEqual(before);
          const kept = naiveDistribution(logits, sampling, history);
          const chosen = kept.find((one) => one.token === token);
          expect(chosen, `token ${token} is not in the kept set`).toBeDefined();
          // The same token, unless the draw falls within rounding of the border between two.
          if (token !== naiveDraw(kept, sampling.seed, index)) {
            let border = 0;
            for (const one of kept) if (one.token < token) border += one.probability;
            const u = drawUniform(sampling.seed, index);
            const distance = Math.min(
              Math.abs(u - border),
              Math.abs(u - border - chosen!.probability),
            );
            expect(distance).toBeLessThan(1e-12);
          }
        },
      ),
      { numRuns: 2000 },
    );
  });

  it('reads every number of a row: blocks, the last and shorter one, and none behind it', () => {
    fc.assert(
      fc.property(fc.nat(), fc.integer({ min: 1, max: 1000 }), (seed, length) => {
        const whole = Float32Array.from(
          { length: length + 64 },
          (_, i) => 60 * drawUniform(seed, i),
        );
        whole.fill(Number.NaN, length);
        const row = whole.subarray(0, length);
        const maxima = new Float32Array(Math.ceil(length / blockNumbers));
        expect(math.maxima(row, maxima)).toBe(true);
        const blocks = [...maxima.keys()].map((b) => [...row.subarray(b * 64, (b + 1) * 64)]);
        expect([...maxima]).toEqual(blocks.map((block) => Math.max(...block)));
        const max = Math.max(...maxima);
        for (const inverse of [0.3, 1, 40, 1e5]) {
          const masses = new Float64Array(maxima.length);
          const total = math.masses(row, { max, maxima, inverse }, masses);
          const want = blocks.map((block) =>
            block.reduce((sum, x) => sum + Math.exp((x - max) * inverse), 0),
          );
          for (const [b, mass] of want.entries()) {
            // 0 is right for what is lost in the sum.
            if (mass > 1e-15 || masses[b] !== 0) expect(masses[b]! / mass).toBeCloseTo(1, 12);
          }
          expect(total / want.reduce((a, b) => a + b, 0)).toBeCloseTo(1, 13);
        }
      }),
    );
  });

  it('keeps exactly the set that the sort keeps, on a vocabulary of real size', () => {
    const logits = Float32Array.from(
      { length: 49_152 },
      (_, i) => 6 * Math.log(1e-9 + drawUniform(11, i)) + (i % 977 === 0 ? 9 : 0),
    );
    const sampler = new Sampler(logits.length, math);
    for (const sampling of [
      { ...plain, topP: 0.9 },
      { ...plain, topK: 40, topP: 0.8 },
      { ...plain, topP: 0.999 },
      { ...plain, topK: 700 },
      { ...plain, topK: 20_000 },
      { ...plain, minP: 0.02 },
      { ...plain, temperature: 3, topP: 0.5 },
    ]) {
      const kept = naiveDistribution(logits, sampling, noHistory);
      for (let draw = 0; draw < 200; draw++) {
        const token = sampler.sample(logits, sampling, noHistory, draw);
        expect(token).toBe(naiveDraw(kept, sampling.seed, draw));
      }
    }
  });

  it('draws with the stated probabilities (chi-square, 99.9 %)', () => {
    const logits = Float32Array.from({ length: 24 }, (_, i) => Math.sin(i * 1.7) * 2);
    const sampler = new Sampler(24, math);
    for (const sampling of [
      { ...plain, seed: 1 },
      { ...plain, seed: 2, temperature: 0.6, topP: 0.9 },
      { ...plain, seed: 3, topK: 8 },
    ]) {
      const draws = 40_000;
      const counts = new Map<number, number>();
      for (let i = 0; i < draws; i++) {
        const token = sampler.sample(logits, sampling, noHistory, i);
        counts.set(token, (counts.get(token) ?? 0) + 1);
      }
      const kept = naiveDistribution(logits, sampling, noHistory);
      expect([...counts.keys()].every((token) => kept.some((one) => one.token === token))).toBe(
        true,
      );
      const statistic = kept.reduce((sum, one) => {
        const expected = one.probability * draws;
        return sum + ((counts.get(one.token) ?? 0) - expected) ** 2 / expected;
      }, 0);
      // Wilson and Hilferty's approximation of the 99.9 % quantile for kept - 1 degrees of freedom.
      const freedom = kept.length - 1;
      const limit = freedom * (1 - 2 / (9 * freedom) + 3.09 * Math.sqrt(2 / (9 * freedom))) ** 3;
      expect(statistic).toBeLessThan(limit);
      expect(statistic).toBeGreaterThan(freedom * 0.1); // too good would be wrong, too
    }
  });

  it('chooses among repeated tokens under a penalty that divides by next to nothing', () => {
    const sampling = { ...plain, repetitionPenalty: 1e-300, temperature: 0 };
    const history = { prompt: new Set([1]), counts: new Map([[2, 1]]) };
    const sampler = new Sampler(4, math);
    expect(sampler.sample(Float32Array.of(9, 1, 2, 3), sampling, history, 0)).toBe(1);
    const warm = { ...sampling, temperature: 1, topP: 0.9 };
    expect([1, 2]).toContain(sampler.sample(Float32Array.of(9, 1, 2, 3), warm, history, 0));
  });

  it('fails a row with NaN or infinite logits instead of choosing from it', () => {
    const sampler = new Sampler(4, math);
    for (const bad of [Number.NaN, Number.POSITIVE_INFINITY, Number.NEGATIVE_INFINITY]) {
      for (const temperature of [0, 1]) {
        expect(() =>
          sampler.sample(Float32Array.of(1, bad, 3, 2), { ...plain, temperature }, noHistory, 0),
        ).toThrow(expect.objectContaining({ code: 'ENGINE_FAILED' }));
      }
    }
  });

  it('reports log-probabilities of the raw logits, best first', () => {
    fc.assert(
      fc.property(logitsArbitrary, fc.nat(), fc.nat(20), (values, pick, count) => {
        const logits = Float32Array.from(values);
        const token = pick % logits.length;
        const { logprob, top } = new Sampler(logits.length, math).logprobs(logits, token, count);
        const total = Math.log([...logits].reduce((sum, x) => sum + Math.exp(x), 0));
        expect(logprob).toBeCloseTo(logits[token]! - total, 5);
        const sorted = [...logits]
          .map((x, id) => ({ id, x }))
          .sort((a, b) => b.x - a.x || a.id - b.id)
          .slice(0, count);
        expect(top.map((one) => one.token)).toEqual(sorted.map((one) => one.id));
        for (const [i, one] of top.entries()) {
          expect(one.logprob).toBeCloseTo(sorted[i]!.x - total, 5);
        }
      }),
    );
  });

  it('takes the lowest id of equal logits when greedy, and at a vanishing temperature', () => {
    const logits = Float32Array.of(1, 5, -2, 5);
    const sampler = new Sampler(4, math);
    for (const temperature of [0, 1e-300, 1e-6]) {
      expect(sampler.sample(logits, { ...plain, temperature }, noHistory, 3)).toBe(1);
    }
  });
});

describe('draws', () => {
  it('are Philox2x32-10: the known answers of Random123', () => {
    expect(philox2x32(0, 0, 0)).toEqual([0xff1dae59, 0x6cd10df2]);
    expect(philox2x32(0xffffffff, 0xffffffff, 0xffffffff)).toEqual([0x2c3f628b, 0xab4fd7ad]);
    expect(philox2x32(0x243f6a88, 0x85a308d3, 0x13198a2e)).toEqual([0xdd7ce038, 0xf62a4c12]);
  });

  it('are uniform over the index for one seed, and over the seed for one index', () => {
    for (const draw of [(i: number) => drawUniform(99, i), (i: number) => drawUniform(i, 5)]) {
      const buckets = new Array<number>(100).fill(0);
      for (let i = 0; i < 50_000; i++) buckets[Math.floor(draw(i) * 100)]! += 1;
      const statistic = buckets.reduce((sum, count) => sum + (count - 500) ** 2 / 500, 0);
      expect(statistic).toBeLessThan(149); // 99.9 % of chi-square with 99 degrees of freedom
      expect(statistic).toBeGreaterThan(55);
    }
  });
});
