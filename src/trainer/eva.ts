// EVA (arXiv 2410.07170, algorithms.md section 15): A begins with the directions in which a module's inputs vary most, and ranks go
// where a direction explains most of its inputs' variance. Instead of an incremental SVD over batches until it settles,
// the eigenvectors of the whole text's covariance; the same where that settles (compared with PEFT's own in its test).

import type { BlockMoments } from '../adapters/calibration.ts';
import type { Columns } from '../adapters/orthogonal.ts';
import { largestSvd } from '../adapters/randomized-svd.ts';
import { type Projection, projections } from '../model/decoder-config.ts';
import type { ModuleRef } from '../model/stepper.ts';

export interface EvaOptions {
  /** Of a module on average: all together have so many times their number. */
  readonly rank: number;
  /** Most ranks of a module, as a multiple of `rank`; 1: every module has `rank`. */
  readonly rho: number;
  readonly targets: readonly Projection[];
}

export interface EvaModule extends ModuleRef {
  /** Orthonormal columns, [in, ranks]; none where other modules' directions explain more. */
  readonly a: Columns;
}

interface Directions {
  readonly vectors: Columns; // [in, n]
  /** Share of the inputs' variance in each direction, falling. */
  readonly shares: Float64Array; // at most [n]
}

/** Modules in the order of the blocks, and of `projections` inside. Projections of one input have the same directions, as
 *  many of them as each has ranks. */
export function evaModules(blocks: Iterable<BlockMoments>, options: EvaOptions): EvaModule[] {
  const { rank, rho, targets } = options;
  const most = Math.round(rank * rho);
  const modules: (ModuleRef & Directions)[] = [];
  let block = 0;
  for (const moments of blocks) {
    const made = new Map<object, Directions>();
    for (const projection of projections.filter((name) => targets.includes(name))) {
      const { covariance, mean } = moments[projection];
      const directions = made.get(covariance) ?? directionsOf(covariance, mean, most);
      made.set(covariance, directions);
      modules.push({ block, projection, ...directions });
    }
    block += 1;
  }
  const ranks = sharedOut(
    modules.map(({ shares }) => shares),
    rank * modules.length,
  );
  return modules.map(({ vectors, ...module }, i) => {
    const data = vectors.data.slice(0, ranks[i]! * vectors.rows);
    const a = { rows: vectors.rows, columns: ranks[i]!, data };
    return { block: module.block, projection: module.projection, a };
  });
}

/** Of the variance: what f32 sums leave of a direction that is not there. */
const rounding = 1e-7;

/** Eigenvectors of E[(x − μ)(x − μ)ᵀ], the largest eigenvalues first. */
function directionsOf(covariance: Columns, mean: Float64Array, most: number): Directions {
  const { rows } = covariance;
  const centred = {
    ...covariance,
    data: covariance.data.map((value, i) => value - mean[i % rows]! * mean[Math.floor(i / rows)]!),
  };
  let total = 0;
  for (let i = 0; i < rows; i++) total += centred.data[i * (rows + 1)]!;
  const { v, sigma } = largestSvd(centred, { rank: Math.min(most, rows), seed: 0 });
  // Directions in which nothing varies have no vector.
  const shares = sigma.map((value) => value / total).filter((share) => share > rounding);
  return { vectors: v, shares };
}

/** How many ranks each module gets of the budget: those whose shares are the largest of all, of equal ones the first module's. */
export function sharedOut(shares: readonly Float64Array[], budget: number): number[] {
  const all = shares.flatMap((own, module) => Array.from(own, (share) => ({ share, module })));
  all.sort((x, y) => y.share - x.share || x.module - y.module);
  const counts = shares.map(() => 0);
  for (const { module } of all.slice(0, budget)) counts[module]! += 1;
  return counts;
}
