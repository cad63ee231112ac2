// A generation's members as rows of the serving decoder: page by page, the adapter's own ranks and those of all pairs' noise. E
// on B, left·rightᵀ, is ranks with a = leftᵀ·A and b = right. Both members of a pair read the same ones, through gates of ±σ.

import type { Site } from '../adapters/families/family.ts';
import type { EggrollRecipe } from '../jobs/recipe.ts';
import { f32ToF16Bits } from '../kernels/half.ts';
import { ranksPerPage } from '../kernels/kernels.ts';
import { projections } from '../model/decoder-config.ts';
import type { AdapterRows, Stepper } from '../model/stepper.ts';
import type { PairNoise } from './eggroll.ts';
import type { Parameter } from './optimizers/optimizer.ts';
import type { ModuleFactors } from './publish.ts';

export interface TrainedPair {
  readonly site: Site;
  /** moduleIndex. */
  readonly module: number;
  readonly a: Float32Array; // [R, in]
  readonly b: Parameter; // [R, out]
}

/** Page 0 stays zero; the adapter's follow, and then those of the noise. */
export interface PageLayout {
  readonly own: readonly number[];
  readonly noise: readonly number[];
  readonly pages: number;
  readonly pairsPerPage: number;
}

export function pageLayout(rank: number, { population, noiseRank }: EggrollRecipe): PageLayout {
  const pairsPerPage = ranksPerPage / noiseRank;
  const ownCount = Math.ceil(rank / ranksPerPage);
  const noiseCount = Math.ceil(population / 2 / pairsPerPage);
  return {
    own: Array.from({ length: ownCount }, (_, i) => 1 + i),
    noise: Array.from({ length: noiseCount }, (_, i) => 1 + ownCount + i),
    pages: 1 + ownCount + noiseCount,
    pairsPerPage,
  };
}

/** For the whole run: the decoder writes gates of objects that it has not met. */
export function memberRows(
  rank: number,
  method: EggrollRecipe,
  { blocks }: { readonly blocks: number },
): AdapterRows[] {
  const { population, noiseRank, sigma } = method;
  const { own, noise, pairsPerPage } = pageLayout(rank, method);
  return Array.from({ length: population }, (_, member) => {
    const pair = member >> 1;
    const pages = [...own, noise[Math.floor(pair / pairsPerPage)]!];
    const width = ranksPerPage * pages.length;
    const first = own.length * ranksPerPage + (pair % pairsPerPage) * noiseRank;
    const gate = ((member % 2 === 0 ? 1 : -1) * sigma) / Math.sqrt(noiseRank);
    const gates = new Float32Array(blocks * projections.length * width);
    for (let row = 0; row < gates.length; row += width) {
      gates.fill(1, row, row + rank);
      gates.fill(gate, row + first, row + first + noiseRank);
    }
    return { pages, rank: rank + noiseRank, scale: 1, gates, routing: null, atoms: null };
  });
}

type Pages = Pick<Stepper, 'writePage'>;

/** The first page has ranks 0 … 7, the next those behind, and zeroes behind the last. */
export function writeRanks(
  to: Pages,
  site: Omit<Site, 'weight'>,
  { a, b }: ModuleFactors,
  pages: readonly number[],
): void {
  for (const [i, page] of pages.entries()) {
    const bits = (values: Float32Array, width: number): Uint16Array => {
      const halves = new Uint16Array(ranksPerPage * width);
      f32ToF16Bits(values.subarray(i * halves.length, (i + 1) * halves.length), halves);
      return halves;
    };
    to.writePage(page, site, { a: bits(a, site.in), b: bits(b, site.out) });
  }
}

/** Rounded to f16, which the estimate is not: 2^-11 of it. */
export function writeNoise(
  to: Pages,
  { site, a: own, b: { rows } }: TrainedPair,
  noises: readonly PairNoise[], // of all pairs
  pages: readonly number[],
): void {
  const rank = noises[0]!.right.length / site.out;
  const a = new Float32Array(pages.length * ranksPerPage * site.in);
  const b = new Float32Array(pages.length * ranksPerPage * site.out);
  noises.forEach(({ left, right }, pair) => {
    b.set(right, pair * right.length);
    for (let r = 0; r < rank; r++) {
      const row = a.subarray((pair * rank + r) * site.in);
      addProduct(row, left.subarray(r * rows, (r + 1) * rows), own);
    }
  });
  writeRanks(to, site, { a, b }, pages);
}

/** to [in] += factors [R] · a [R, in]. */
function addProduct(to: Float32Array, factors: Float32Array, a: Float32Array): void {
  const width = a.length / factors.length;
  factors.forEach((factor, k) => {
    for (let i = 0; i < width; i++) to[i]! += factor * a[k * width + i]!;
  });
}
