// MoRA ("Little by Little", arXiv 2506.21035): every rank scores itself, s_i = |a_i·x| / (‖a_i‖·‖x‖); the k best of a token stay,
// weighted by softmax(s/τ) over those k: y += Σ w_i·(a_i·x)·b_i. No router. Old ranks freeze when a task ends, new ones are
// appended, and ranks that hardly fire are pruned. The publication's threshold at test time is not covered.

import { noOptions } from '../adapter.ts';
import type { Columns } from '../orthogonal.ts';
import { type ServedModule, servedPair } from '../served.ts';
import {
  constantGates,
  type Family,
  type Routed,
  type RouteInput,
  type Site,
  type Tensors,
  tensorsOf,
} from './family.ts';
import { beside, filled, picked, uniform, zeros } from './matrices.ts';
import type { Random } from './seeded-random.ts';

export interface MoraOptions {
  /** Ranks of a new adapter; tensors that have grown have more. */
  readonly rank: number;
  readonly topK: number;
  readonly temperature: number;
  /** First ranks that no longer train. */
  readonly frozen: number;
}

interface Weights {
  /** w [R, T], 0 for what did not stay. */
  readonly weights: Columns;
  readonly norms: Float64Array; // ‖a_i‖ [R]
  readonly sizes: Float64Array; // ‖x_t‖ [T]
}

export function moraWeights(
  { h, x, a }: Readonly<{ h: Columns; x: Columns; a: Columns }>,
  { topK, temperature }: Pick<MoraOptions, 'topK' | 'temperature'>,
): Weights {
  const [norms, sizes] = [lengths(a), lengths(x)];
  const weights = zeros(h.columns, h.rows);
  for (let t = 0; t < h.columns; t++) {
    const score = Float64Array.from({ length: h.rows }, (_, i) => {
      const size = norms[i]! * sizes[t]!;
      return size === 0 ? 0 : Math.abs(h.data[t * h.rows + i]!) / size;
    });
    const order = Array.from(score.keys()).sort((i, j) => score[j]! - score[i]! || i - j);
    const kept = order.slice(0, topK);
    const best = score[kept[0]!]!;
    const masses = kept.map((i) => Math.exp((score[i]! - best) / temperature));
    const total = masses.reduce((sum, mass) => sum + mass, 0);
    kept.forEach((i, n) => {
      weights.data[t * h.rows + i] = masses[n]! / total;
    });
  }
  return { weights, norms, sizes };
}

function lengths({ rows, columns, data }: Columns): Float64Array {
  return Float64Array.from({ length: columns }, (_, j) =>
    Math.sqrt(data.subarray(j * rows, (j + 1) * rows).reduce((sum, v) => sum + v * v, 0)),
  );
}

function route(
  { h, x, tensors, rank }: RouteInput,
  { topK, temperature, frozen }: MoraOptions,
): Routed {
  const a = tensors.a!;
  const found = moraWeights({ h, x, a }, { topK: rank ?? topK, temperature });
  const { weights, norms, sizes } = found;
  const R = h.rows;
  return {
    g: { ...h, data: h.data.map((value, i) => value * weights.data[i]!) },
    gradient(dg) {
      const dh = zeros(h.columns, R);
      const dNorms = new Float64Array(R);
      const dSizes = new Float64Array(h.columns);
      for (let t = 0; t < h.columns; t++) {
        // w = softmax(s/τ), so ds_i = w_i·(dw_i − Σ w_j·dw_j)/τ with dw_i = dg_i·h_i.
        let mean = 0;
        for (let i = t * R; i < (t + 1) * R; i++) {
          mean += weights.data[i]! * dg.data[i]! * h.data[i]!;
        }
        for (let i = 0; i < R; i++) {
          const at = t * R + i;
          const [w, value] = [weights.data[at]!, h.data[at]!];
          const size = norms[i]! * sizes[t]!;
          if (w === 0 || size === 0) continue;
          const ds = (w * (dg.data[at]! * value - mean)) / temperature;
          const score = Math.abs(value) / size;
          dh.data[at] = w * dg.data[at]! + (ds * Math.sign(value)) / size;
          dNorms[i]! -= (ds * score) / norms[i]!;
          dSizes[t]! -= (ds * score) / sizes[t]!;
        }
      }
      const da = alongUnit(a, norms, dNorms);
      return { dh, dx: alongUnit(x, sizes, dSizes), tensors: { a: thawed(da, frozen) } };
    },
  };
}

/** Gradient of each column from the gradient of its length. */
function alongUnit(x: Columns, sizes: Float64Array, d: Float64Array): Columns {
  const factor = sizes.map((size, j) => (size === 0 ? 0 : d[j]! / size));
  return { ...x, data: x.data.map((value, i) => value * factor[Math.floor(i / x.rows)]!) };
}

function thawed(x: Columns, frozen: number): Columns {
  return { ...x, data: x.data.map((value, i) => (i < frozen * x.rows ? 0 : value)) };
}

export function mora(options: MoraOptions): Family {
  const { rank, topK, temperature, frozen } = options;
  return {
    kind: 'mora',
    describe: `MoRA: ${topK} of the ranks a token, temperature ${temperature}, the first ${frozen} frozen`,
    options: { ...noOptions, topK, temperature },
    slicing: 'active',
    axes: { a: ['rank', 'in'], b: ['rank', 'out'] },
    trained: ['a', 'b'],
    init: (site, random) => ({
      a: filled(rank, site.in, uniform(1 / Math.sqrt(site.in), random)),
      b: zeros(rank, site.out),
    }),
    pair(_site, { a, b }) {
      const gradient = (d: { a: Columns; b: Columns }): Tensors => ({
        a: thawed(d.a, frozen),
        b: thawed(d.b, frozen),
      });
      return { ...constantGates(a!, b!, 1), gradient };
    },
    route: (input) => route(input, options),
    serve: (site: Site, { a, b }): ServedModule =>
      servedPair(site, { rank: a!.columns, a: a!.data, b: b!.data }),
    toPeft: () => "every token weights its ranks by its own scores, a LoRA's weights are constant",
    fromPeft(_site, module) {
      const { a, b } = tensorsOf(module);
      return { a, b };
    },
  };
}

/** `count` ranks for a new task, after the old ones, with B = 0. Their directions are inputs of that task at random, as long as
 *  at the start: where tasks differ, the new ranks then hardly score on the old ones' inputs. */
export function grownMora(
  { a, b }: Tensors,
  inputs: Columns,
  count: number,
  random: Random,
): Tensors {
  const chosen = picked(
    inputs,
    Array.from({ length: count }, () => random.below(inputs.columns)),
  );
  const sizes = lengths(chosen);
  const directions = {
    ...chosen,
    data: chosen.data.map((value, i) => value / (Math.sqrt(3) * sizes[Math.floor(i / a!.rows)]!)),
  };
  return { a: beside(a!, directions), b: beside(b!, zeros(count, b!.rows)) };
}

/** Cosine from which two directions count as one. */
const sameCosine = 0.999;

/** Without the ranks from `frozen` on whose mean share of the weights [R, T] is below `shareMin`. Ranks of one direction score
 *  alike and take each other's share: the first has it all, and their mean effect. */
export function prunedMora(
  { a, b }: Tensors,
  weights: Columns,
  { frozen, shareMin }: Readonly<{ frozen: number; shareMin: number }>,
): Tensors {
  const norms = lengths(a!);
  const share = new Float64Array(weights.rows);
  weights.data.forEach((w, i) => {
    share[i % weights.rows]! += w / weights.columns;
  });
  const mean = { ...b!, data: Float64Array.from(b!.data) };
  const dropped = new Set<number>();
  for (let first = 0; first < a!.columns; first++) {
    if (dropped.has(first)) continue;
    const twins = Array.from(norms.keys()).filter((i) => {
      const cosine = dot(a!, first, i) / (norms[first]! * norms[i]!);
      return i > first && i >= frozen && !dropped.has(i) && Math.abs(cosine) >= sameCosine;
    });
    for (const i of twins) {
      dropped.add(i);
      share[first]! += share[i]!;
    }
    if (first < frozen) continue; // Its bytes stay; the twins' share of the effect goes with them.
    for (let o = 0; o < mean.rows; o++) {
      // h_i = ratio · h_first.
      const sum = twins.reduce(
        (all, i) => all + (dot(a!, first, i) / norms[first]! ** 2) * b!.data[i * mean.rows + o]!,
        b!.data[first * mean.rows + o]!,
      );
      mean.data[first * mean.rows + o] = sum / (twins.length + 1);
    }
  }
  const stays = (i: number): boolean => i < frozen || (!dropped.has(i) && share[i]! >= shareMin);
  const kept = Array.from(norms.keys()).filter(stays);
  return { a: picked(a!, kept), b: picked(mean, kept) };
}

function dot({ rows, data }: Columns, i: number, j: number): number {
  let sum = 0;
  for (let n = 0; n < rows; n++) sum += data[i * rows + n]! * data[j * rows + n]!;
  return sum;
}
