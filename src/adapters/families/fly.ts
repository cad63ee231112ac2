// FlyLoRA (arXiv 2510.08396): A is sparse, frozen and made from a seed; of a token's r values y = A·x the k with the largest
// |y| + d stay, y += (α/r)·B·(y ⊙ mask). d balances how often ranks are chosen and never enters a value. Which of the
// published rules is used and why: algorithms.md section 28.

import { GatewayError } from '../../errors.ts';
import { noOptions } from '../adapter.ts';
import type { Columns } from '../orthogonal.ts';
import { constantGates, type Family, peftOf, type Routed, type Site, streamOf } from './family.ts';
import { scaled, zeros } from './matrices.ts';
import { createRandom } from './seeded-random.ts';

/** `abs_sum` is the stand-alone publication's |y + d|: its balance rule diverges, and neither it nor `signed` is served. */
export type FlyScore = 'abs_plus_bias' | 'signed' | 'abs_sum';

export interface FlyOptions {
  readonly rank: number;
  /** k: ranks that stay, and with r the share of A that is not zero. */
  readonly topK: number;
  readonly alpha: number;
  /** 64 bits. */
  readonly seed: bigint;
  readonly score: FlyScore;
}

export interface SparseShape {
  readonly seed: bigint;
  /** moduleIndex of the module. */
  readonly module: number;
  readonly rank: number;
  readonly in: number;
  readonly topK: number;
}

/** p: non-zeros of each row of A. */
export function nonZeros({ rank, in: width, topK }: Omit<SparseShape, 'seed' | 'module'>): number {
  return Math.max(1, Math.floor((width * topK) / rank));
}

/** Row i of A into `row` [in], which is zero: p distinct places (the first p of a shuffle), then their values N(0, 1/r²). A
 *  row depends on the seed, the module and i only. */
export function sparseRow(row: Float64Array, i: number, shape: SparseShape): void {
  const random = createRandom(shape.seed, [shape.module, i]);
  const count = nonZeros(shape);
  const places = Int32Array.from({ length: shape.in }, (_, place) => place);
  for (let n = 0; n < count; n++) {
    const other = n + random.below(shape.in - n);
    const place = places[other]!;
    places[other] = places[n]!;
    places[n] = place;
  }
  for (let n = 0; n < count; n++) row[places[n]!] = random.normal() / shape.rank;
}

/** A [rank, in]. */
export function sparseA(shape: SparseShape): Float64Array {
  const a = new Float64Array(shape.rank * shape.in);
  for (let i = 0; i < shape.rank; i++) {
    sparseRow(a.subarray(i * shape.in, (i + 1) * shape.in), i, shape);
  }
  return a;
}

/** Ranks of one adapter: k of them stay. Several, one after another, are a blend. */
export interface FlyGroup {
  readonly first: number;
  readonly count: number;
  readonly topK: number;
}

/** Keeps in each group the values with the largest scores; of equal ones the first. */
export function keepTop(
  y: Columns,
  d: Float64Array,
  score: FlyScore,
  groups: readonly FlyGroup[],
): Routed {
  const mask = new Float64Array(y.data.length);
  for (let t = 0; t < y.columns; t++) {
    for (const { first, count, topK } of groups) {
      const scores = Float64Array.from({ length: count }, (_, i) =>
        scoreOf(score, y.data[t * y.rows + first + i]!, d[first + i]!),
      );
      const order = Array.from(scores.keys()).sort((i, j) => scores[j]! - scores[i]! || i - j);
      for (const i of order.slice(0, topK)) mask[t * y.rows + first + i] = 1;
    }
  }
  const masked = (x: Columns): Columns => ({ ...x, data: x.data.map((v, i) => v * mask[i]!) });
  return { g: masked(y), gradient: (dg) => ({ dh: masked(dg), tensors: {} }) };
}

function scoreOf(score: FlyScore, y: number, d: number): number {
  switch (score) {
    case 'abs_plus_bias':
      return Math.abs(y) + d;
    case 'signed':
      return y + d;
    case 'abs_sum':
      return Math.abs(y + d);
  }
}

/** d after a batch in which rank i was chosen counts[i] times: up by u what was chosen less than `target` times, down what
 *  was chosen more. The target that balances is the mean count (`target` null); the stand-alone publication has k/r. */
export function rebalanced(
  d: Float64Array,
  counts: ArrayLike<number>,
  u: number,
  target: number | null = null,
): Float64Array {
  let total = 0;
  for (let i = 0; i < d.length; i++) total += counts[i]!;
  const aim = target ?? total / d.length;
  return d.map((value, i) => value + u * Math.sign(aim - counts[i]!));
}

export function fly(options: FlyOptions): Family {
  const { rank, topK, alpha, seed, score } = options;
  const scale = alpha / rank;
  const made = new WeakMap<Site, Columns>();
  const factorA = (site: Site): Columns => {
    const shape = { seed, module: streamOf(site), rank, in: site.in, topK };
    const a = made.get(site) ?? { rows: site.in, columns: rank, data: sparseA(shape) };
    made.set(site, a);
    return a;
  };
  const family: Family = {
    kind: 'fly',
    describe: `FlyLoRA: ${topK} of ${rank} ranks a token by ${score}, alpha ${alpha}, A from seed ${hex(seed)}`,
    options: { ...noOptions, seed: hex(seed), topK },
    slicing: 'active',
    axes: { b: [rank, 'out'], d: [rank, 1] },
    trained: ['b'],
    init: (site) => ({ b: zeros(rank, site.out), d: zeros(rank, 1) }),
    pair(site, { b }) {
      // α/r is B's: on A it would change |y| beside d.
      const pair = constantGates(factorA(site), scaled(b!, scale), 1);
      return { ...pair, gradient: (g) => ({ b: scaled(g.b, scale) }) };
    },
    route: ({ h, tensors, rank: k }) =>
      keepTop(h, tensors.d!.data, score, [{ first: 0, count: rank, topK: k ?? topK }]),
    serve({ block, projection, in: width, out }, { b, d }) {
      if (score !== 'abs_plus_bias') {
        const message = `fly: the kernels choose by |y| + d, not by ${score}`;
        throw new GatewayError('UNSUPPORTED', message);
      }
      const factors = { a: null, b: scaled(b!, scale).data, gates: null };
      return {
        block,
        projection,
        in: width,
        out,
        rank,
        ...factors,
        bias: Float32Array.from(d!.data),
      };
    },
    toPeft: (site, tensors, k) =>
      k === rank
        ? peftOf(family.pair(site, tensors, null))
        : `every token chooses its own ${k} of ${rank} ranks; only all of them are a LoRA`,
    fromPeft: () => "a LoRA has an A of its own, fly's is made from a seed",
  };
  return family;
}

function hex(seed: bigint): string {
  return BigInt.asUintN(64, seed).toString(16).padStart(16, '0');
}
