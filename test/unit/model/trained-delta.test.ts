import { describe, expect, it } from 'vitest';
import { numbersOf, weightName } from '../../../src/adapters/extract.ts';
import type { Site, Tensors } from '../../../src/adapters/families/family.ts';
import { createRandom } from '../../../src/adapters/families/seeded-random.ts';
import type { Columns } from '../../../src/adapters/orthogonal.ts';
import { elementCount } from '../../../src/kernels/check.ts';
import { GgmlKernels } from '../../../src/kernels/ggml/ggml-kernels.ts';
import {
  type DecoderConfig,
  projectionShape,
  projections,
  readDecoderConfig,
} from '../../../src/model/decoder-config.ts';
import { openGguf } from '../../../src/model/gguf.ts';
import type { TrainingBatch } from '../../../src/model/loss-graph.ts';
import { lowRankDelta, type TrainedDelta, tensorName } from '../../../src/model/trained-delta.ts';
import { TrainingDecoder } from '../../../src/model/training-decoder.ts';
import { loadWeights } from '../../../src/model/weights.ts';
import { type FamilyChoice, familyGraph } from '../../../src/trainer/family-graph.ts';
import { FamilyTraining } from '../../../src/trainer/family-training.ts';
import { queryableConstants, queryableDelta } from '../../../src/trainer/queryable-graph.ts';
import { trainedTensors } from '../../support/family-site.ts';
import { tinyPath } from '../../support/open-test-decoder.ts';
import { createRng, normals } from '../../support/random.ts';

// Families through the training decoder over the tiny model: loss and gradients of the whole.

const windowRows = 20;
const tokens = Int32Array.from({ length: windowRows }, (_, i) => 3 + ((i * 37) % 300));

function batch(rank: number): TrainingBatch {
  const answers = Array.from({ length: windowRows - 1 }, (_, row) => ({
    row,
    target: tokens[row + 1]!,
    weight: 1 / (windowRows - 1),
  }));
  const gate = new Float32Array(windowRows * rank).fill(1);
  return { tokens, sequences: new Int32Array(windowRows), gate, answers };
}

class Opened implements Disposable {
  readonly kernels: GgmlKernels = new GgmlKernels({ threads: 1 });
  readonly decoder: TrainingDecoder;

  constructor(deltaOf: (config: DecoderConfig) => TrainedDelta, recompute = false) {
    using file = openGguf(tinyPath);
    const config = readDecoderConfig(file);
    const { kernels } = this;
    const weights = loadWeights(file, config, { kernels, mode: 'exact', cache: null });
    const sizes = { windows: 1, windowRows, answersMax: windowRows, recompute };
    const delta = deltaOf(config);
    this.decoder = new TrainingDecoder({ config, weights, kernels, ...sizes, delta });
  }

  write(numbers: Iterable<readonly [string, ArrayLike<number>]>): void {
    for (const [name, values] of numbers) this.decoder.write(name, Float32Array.from(values));
  }

  gradient(name: string, count: number): Float32Array {
    const out = new Float32Array(count);
    this.decoder.read(name, out);
    return out;
  }

  [Symbol.dispose](): void {
    this.decoder[Symbol.dispose]();
    this.kernels[Symbol.dispose]();
  }
}

function sites(): Site[] {
  using file = openGguf(tinyPath);
  const config = readDecoderConfig(file);
  return Array.from({ length: config.blocks }, (_, block) =>
    projections.map((projection): Site => {
      const shape = projectionShape(config, projection);
      const data = Float64Array.from(numbersOf(file, weightName({ block, projection })));
      const weight = (): Columns => ({ rows: shape.in, columns: shape.out, data });
      return { block, projection, ...shape, weight };
    }),
  ).flat();
}

/** Small, as an adapter is. */
function startOf(choice: FamilyChoice, site: Site): Tensors {
  const { family } = familyGraph(choice);
  const random = createRandom(11n, [site.block, projections.indexOf(site.projection)]);
  const begun = family.init(site, random);
  const moved = trainedTensors(family, site, random);
  return Object.fromEntries(
    Object.entries(begun).map(([name, start]) => {
      const data = start.data.map((value, i) =>
        Math.fround(value + 0.2 * (moved[name]!.data[i]! - value)),
      );
      return [name, { ...start, data }];
    }),
  );
}

function distance(got: ArrayLike<number>, wanted: ArrayLike<number>): number {
  expect(got.length).toBe(wanted.length);
  const difference = Array.from(wanted, (value, i) => value - got[i]!);
  return Math.hypot(...difference) / Math.hypot(...Array.from(wanted));
}

const pairChoices: readonly FamilyChoice[] = [
  { kind: 'hydra', rank: 3, alpha: 3 },
  { kind: 'triangular', rank: 4, alpha: 4 },
  { kind: 'svfit', rank: 6 },
  { kind: 'salt', rank: 4, tailRank: 2 },
  {
    kind: 'flexmore',
    experts: [
      { name: 'one', rank: 2 },
      { name: 'other', rank: 3 },
    ],
  },
];

const all = sites();

describe('a decoder over what is trained', () => {
  it.each(pairChoices.map((choice) => [choice.kind, choice] as const))(
    'has the loss of the pairs that %s stands for, and their gradients through them',
    (_, choice) => {
      const training = new FamilyTraining(
        choice,
        all.map((site) => ({ site, tensors: startOf(choice, site) })),
      );
      using own = new Opened(() => training.delta);
      own.write(training.constants);
      own.write(training.parameters.map(({ name, values }) => [name, values] as const));
      const loss = own.decoder.step(batch(0));

      const { family } = training;
      const pairs = all.map((site, i) => family.pair(site, training.modules()[i]!.tensors, null));
      const rank = pairs[0]!.a.columns;
      using plain = new Opened((config) => lowRankDelta(config, () => rank));
      pairs.forEach(({ a, b, gates }, i) => {
        const folded = b.data.map((value, at) => value * gates[Math.floor(at / b.rows)]!);
        plain.write([
          [tensorName(all[i]!, 'a'), a.data],
          [tensorName(all[i]!, 'b'), folded],
        ]);
      });
      expect(Math.abs(plain.decoder.step(batch(rank)) - loss)).toBeLessThan(1e-5);
      pairs.forEach(({ a, b, gates, gradient }, i) => {
        const site = all[i]!;
        const da = Float64Array.from(plain.gradient(tensorName(site, 'a'), a.data.length));
        const dFolded = plain.gradient(tensorName(site, 'b'), b.data.length);
        const db = Float64Array.from(dFolded, (d, at) => d * gates[Math.floor(at / b.rows)]!);
        const dGates = new Float64Array(gates.length);
        dFolded.forEach((d, at) => {
          dGates[Math.floor(at / b.rows)]! += d * b.data[at]!;
        });
        // What A and B are multiplied with is in their product only, so gates of 0 would hide A's gradient.
        const d = { a: { ...a, data: da }, b: { ...b, data: db }, gates: dGates };
        for (const [name, wanted] of Object.entries(gradient(d))) {
          const got = own.gradient(tensorName(site, name), wanted.data.length);
          expect(
            distance(got, wanted.data),
            `${site.block}.${site.projection}.${name}`,
          ).toBeLessThan(1e-4);
        }
      });
    },
  );

  it('gives the same numbers where blocks are computed again', () => {
    const choice = { kind: 'mora', rank: 6, topK: 2, temperature: 0.3, frozen: 0 } as const;
    const training = new FamilyTraining(
      choice,
      all.map((site) => ({ site, tensors: startOf(choice, site) })),
    );
    const results = [false, true].map((recompute) => {
      using opened = new Opened(() => training.delta, recompute);
      opened.write(training.constants);
      opened.write(training.parameters.map(({ name, values }) => [name, values] as const));
      const loss = opened.decoder.step(batch(0));
      const gradients = training.parameters.map(({ name, values }) =>
        opened.gradient(name, values.length),
      );
      // What is observed is readable both ways.
      const shares = opened.gradient('blk.1.ffn_down.shares', windowRows * 6);
      return { loss, gradients, shares };
    });
    expect(results[1]).toEqual(results[0]);
    expect(results[0]!.shares.filter((share) => share > 0).length).toBe(2 * windowRows);
  });

  it('has ranks of a module each, and none where there are none', () => {
    const ranks = new Map(all.map((site, i) => [site, i % 4]));
    const factors = all.flatMap((site, i) => {
      const rng = createRng(i);
      const [a, b] = [normals(rng, 3 * site.in, 0.1), normals(rng, 3 * site.out, 0.1)];
      return [[site, a, b] as const];
    });
    const rankOf = ({ block, projection }: { block: number; projection: string }): number =>
      [...ranks].find(([site]) => site.block === block && site.projection === projection)![1];
    using few = new Opened((config) => lowRankDelta(config, rankOf));
    using padded = new Opened((config) => lowRankDelta(config, () => 3));
    for (const [site, a, b] of factors) {
      const rank = ranks.get(site)!;
      const shorter = b.map((value, i) => (i < rank * site.out ? value : 0));
      padded.write([
        [tensorName(site, 'a'), a],
        [tensorName(site, 'b'), shorter],
      ]);
      if (rank === 0) continue;
      few.write([
        [tensorName(site, 'a'), a.subarray(0, rank * site.in)],
        [tensorName(site, 'b'), b.subarray(0, rank * site.out)],
      ]);
    }
    // Ranks that differ are multiplied differently: gates that fall.
    const gate = Float32Array.from({ length: windowRows * 3 }, (_, i) => 1 / (1 + (i % 3)));
    const [got, wanted] = [few, padded].map(({ decoder }) => decoder.step({ ...batch(3), gate }));
    expect(Math.abs(got! - wanted!)).toBeLessThan(1e-5);
    for (const [site] of factors) {
      const count = ranks.get(site)! * site.out;
      if (count === 0) continue;
      const name = tensorName(site, 'b');
      expect(
        distance(few.gradient(name, count), padded.gradient(name, 3 * site.out).subarray(0, count)),
      ).toBeLessThan(1e-4);
    }
  });

  it("is the base's loss to the last bit while B is 0", () => {
    const losses = [0, 0.3].map((scale) => {
      using opened = new Opened((config) => lowRankDelta(config, () => 4));
      for (const site of all) {
        const a = normals(createRng(site.in), 4 * site.in, scale);
        opened.write([[tensorName(site, 'a'), a]]);
      }
      return opened.decoder.step(batch(4));
    });
    expect(losses[1]).toBe(losses[0]);
  });
});

describe('routing through the decoder', () => {
  const options = {
    rank: 4,
    alpha: 8,
    atoms: 3,
    queryWidth: 5,
    topK: 3,
    blockLayers: 1,
    ...{ part: 'bank' as const, kept: 0, balance: 0, bias: null },
  } as const;

  /** All numbers, moved along `direction`. */
  function lossAt(
    opened: Opened,
    numbers: ReadonlyMap<string, Float32Array>,
    direction: ReadonlyMap<string, Float32Array> | null,
    step: number,
  ): number {
    for (const [name, values] of numbers) {
      const along = direction?.get(name);
      opened.write([[name, along ? values.map((v, i) => v + step * along[i]!) : values]]);
    }
    return opened.decoder.step(batch(0));
  }

  /** The slope along the gradient is the gradient's length, for each kind of tensor by itself. */
  function compareSlopes(
    delta: TrainedDelta,
    numbers: ReadonlyMap<string, Float32Array>,
    groups: Readonly<Record<string, (name: string) => boolean>>,
  ): void {
    using opened = new Opened(() => delta);
    lossAt(opened, numbers, null, 0);
    const gradients = new Map(
      Object.entries(delta.trained).map(([name, shape]) => [
        name,
        opened.gradient(name, elementCount(shape)),
      ]),
    );
    for (const [group, isIn] of Object.entries(groups)) {
      const own = [...gradients].filter(([name]) => isIn(name));
      const length = Math.hypot(...own.flatMap(([, gradient]) => [...gradient]));
      expect(length, group).toBeGreaterThan(1e-3);
      const unit = new Map(own.map(([name, gradient]) => [name, gradient.map((g) => g / length)]));
      const slope = (step: number): number =>
        (lossAt(opened, numbers, unit, step) - lossAt(opened, numbers, unit, -step)) / (2 * step);
      // Richardson's combination; the loss has about 6e-7 of rounding.
      const step = 0.01 / Math.max(1, length) ** 0.5;
      const found = (4 * slope(step / 2) - slope(step)) / 3;
      expect(Math.abs(found / length - 1), group).toBeLessThan(2e-2);
    }
  }

  /** Of the whole model, in two groups. */
  function queryableNumbers(): Map<string, Float32Array> {
    const rng = createRng(12);
    const numbers = new Map(
      Object.entries(queryableDelta(all, options).trained).map(([name, shape]) => [
        name,
        normals(rng, elementCount(shape), name.endsWith('.b') || name.endsWith('.a') ? 0.2 : 0.7),
      ]),
    );
    for (const [name, { values }] of Object.entries(queryableConstants(options, 2))) {
      numbers.set(name, values);
    }
    return numbers;
  }

  it("queryable's shared numbers have the gradients of all groups, the later ones' through the earlier", () => {
    const delta = queryableDelta(all, options);
    const numbers = queryableNumbers();
    // Of one earlier group all is taken, whatever W_s says: see queryable-graph.test.ts.
    const shared = ['keys', 'atoms', 'query', 'context'];
    compareSlopes(delta, numbers, {
      ...Object.fromEntries(shared.map((name) => [name, (of: string) => of === name])),
      a: (name) => name.endsWith('.a'),
      b: (name) => name.endsWith('.b'),
    });
  });

  it.each([
    ['adapter', ['keys', 'blk.0.attn_q.a', 'blk.1.ffn_down.b']],
    ['new-atoms', ['keys', 'atoms']],
  ] as const)('of queryable, %s alone has the gradients that it has among all', (part, names) => {
    const numbers = queryableNumbers();
    const whole = queryableDelta(all, options);
    const own = queryableDelta(all, { ...options, part });
    expect(new Set(Object.keys({ ...own.trained, ...own.constants }))).toEqual(
      new Set(Object.keys({ ...whole.trained, ...whole.constants })),
    );
    expect(own.trained.query ?? own.trained.context ?? null).toBeNull();
    const read = (delta: TrainedDelta): Float32Array[] => {
      using opened = new Opened(() => delta);
      lossAt(opened, numbers, null, 0);
      return names.map((name) => opened.gradient(name, elementCount(whole.trained[name]!)));
    };
    const [got, wanted] = [read(own), read(whole)];
    got.forEach((gradient, i) => {
      expect(distance(gradient, wanted[i]!), names[i]).toBeLessThan(1e-6);
    });
  });

  it('minimises beside the loss how unevenly atoms are chosen, as much as the batch counts', () => {
    const numbers = queryableNumbers();
    const gradientOf = (balance: number, share: number): Float32Array => {
      using opened = new Opened(() => queryableDelta(all, { ...options, topK: 2, balance }));
      lossAt(opened, numbers, null, 0);
      const answers = batch(0).answers.map((one) => ({ ...one, weight: one.weight * share }));
      opened.decoder.step({ ...batch(0), answers });
      return opened.gradient('keys', 3 * 5);
    };
    const added = (share: number): Float32Array => {
      const plain = gradientOf(0, share);
      return gradientOf(3, share).map((value, i) => value - plain[i]!);
    };
    const direction = added(1);
    const length = Math.hypot(...direction);
    expect(length).toBeGreaterThan(0.05);
    expect(
      distance(
        added(0.25),
        direction.map((value) => value / 4),
      ),
    ).toBeLessThan(1e-3);
    using opened = new Opened(() => queryableDelta(all, { ...options, topK: 2, balance: 3 }));
    const penaltyAt = (step: number): number => {
      const along = new Map([['keys', direction.map((value) => value / length)]]);
      lossAt(opened, numbers, along, step);
      const [first, second] = [0, 1].map((block) =>
        opened.gradient(`blk.${block}.attn_q.balance`, 1),
      );
      return (3 * (first![0]! + second![0]!)) / 2;
    };
    expect(penaltyAt(0)).toBeGreaterThan(1);
    const slope = (penaltyAt(2e-3) - penaltyAt(-2e-3)) / 4e-3;
    expect(Math.abs(slope / length - 1)).toBeLessThan(2e-2);
  });

  it('mora, all ranks on, has the slopes of its directions and effects', () => {
    const choice = { kind: 'mora', rank: 6, topK: 6, temperature: 0.2, frozen: 0 } as const;
    const training = new FamilyTraining(
      choice,
      all.map((site) => ({ site, tensors: startOf(choice, site) })),
    );
    const numbers = new Map(training.constants);
    for (const { name, values } of training.parameters) numbers.set(name, values);
    compareSlopes(training.delta, numbers, {
      a: (name) => name.endsWith('.a'),
      b: (name) => name.endsWith('.b'),
    });
  });

  it('of groups of blocks cannot be computed again block by block', () => {
    expect(() => new Opened(() => queryableDelta(all, options), true)).toThrow('computed again');
  });
});
