// Modules of a made-up base for tests of families, and matrices by seed.

import {
  checkTensors,
  type Family,
  forward,
  type Pass,
  type Site,
  type Tensors,
} from '../../src/adapters/families/family.ts';
import { createRandom, type Random } from '../../src/adapters/families/seeded-random.ts';
import type { Columns } from '../../src/adapters/orthogonal.ts';

export function normalColumns(random: Random, columns: number, rows: number, scale = 1): Columns {
  const data = Float64Array.from({ length: rows * columns }, () => scale * random.normal());
  return { rows, columns, data };
}

export interface SiteSizes {
  readonly in?: number;
  readonly out?: number;
  readonly block?: number;
}

/** A q projection with a random weight; the same for the same seed. */
export function testSite({ in: width = 12, out = 10, block = 0 }: SiteSizes = {}, seed = 1n): Site {
  const weight = normalColumns(createRandom(seed, [99, block]), out, width);
  return { block, projection: 'attn_q', in: width, out, weight: () => weight };
}

/** Tensors as after training: every trained one away from where it started. */
export function trainedTensors(family: Family, site: Site, random: Random): Tensors {
  const tensors: Record<string, Columns> = { ...family.init(site, random) };
  for (const name of family.trained) {
    const { rows, columns, data } = tensors[name]!;
    tensors[name] = { rows, columns, data: data.map((v) => v + 0.5 * random.normal()) };
  }
  checkTensors(family, site, tensors);
  return tensors;
}

export function pass(family: Family, site: Site, tensors: Tensors, x: Columns): Pass {
  return forward(family, site, tensors, { x, rank: null });
}

export function sumOfProducts(x: Columns, y: Columns): number {
  return x.data.reduce((sum, value, i) => sum + value * y.data[i]!, 0);
}

export function largestDifference(x: ArrayLike<number>, y: ArrayLike<number>): number {
  if (x.length !== y.length) return Number.POSITIVE_INFINITY;
  return Array.from(x).reduce((most, value, i) => Math.max(most, Math.abs(value - y[i]!)), 0);
}

/** ‖x − y‖² / ‖y‖². */
export function relativeError(x: Columns, y: Columns): number {
  let [difference, size] = [0, 0];
  y.data.forEach((value, i) => {
    difference += (value - x.data[i]!) ** 2;
    size += value ** 2;
  });
  return difference / size;
}

/** Central difference of `loss` in one entry. */
export function numericGradient(loss: () => number, data: Float64Array, i: number): number {
  const [value, step] = [data[i]!, 1e-6];
  data[i] = value + step;
  const above = loss();
  data[i] = value - step;
  const below = loss();
  data[i] = value;
  return (above - below) / (2 * step);
}

/** Adam over named tensors, which it changes in place. */
export function createAdam(tensors: Tensors, names: readonly string[], rate: number) {
  const state = names.map((name) => {
    const { length } = tensors[name]!.data;
    return { name, m: new Float64Array(length), v: new Float64Array(length) };
  });
  let step = 0;
  return (gradient: Tensors, factor = 1): void => {
    step++;
    for (const { name, m, v } of state) {
      const { data } = tensors[name]!;
      gradient[name]!.data.forEach((g, i) => {
        m[i] = 0.9 * m[i]! + 0.1 * g;
        v[i] = 0.999 * v[i]! + 0.001 * g * g;
        const size = Math.sqrt(v[i]! / (1 - 0.999 ** step)) + 1e-8;
        data[i]! -= (factor * rate * m[i]!) / (1 - 0.9 ** step) / size;
      });
    }
  };
}
