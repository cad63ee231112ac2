// TriAdaptLoRA (arXiv 2501.08008): a core C between B and A, ΔW = α/(r + 1e-5)·B·C·A, whose strict upper and lower triangle
// (with the diagonal, counted once) are one matrix; modules where C grows get more ranks. C starts at 0 and A and B do
// not, so the first gradient of C is not 0 (as published all three are 0 and nothing ever moves). Published as a LoRA.

import { multiplyTransposed } from '../orthogonal.ts';
import { type Family, pairFamily, slice, type Tensors, tensorsOf } from './family.ts';
import { beside, columnsOf, filled, times, transposedTimes, uniform, zeros } from './matrices.ts';
import type { Random } from './seeded-random.ts';

export interface TriangularOptions {
  /** Ranks that a module starts with. */
  readonly rank: number;
  readonly alpha: number;
}

export function triangular({ rank, alpha }: TriangularOptions): Family {
  // r of the rank at the start: neither growth nor a prefix changes what the other ranks do.
  const scale = alpha / (rank + 1e-5);
  const family: Family = pairFamily({
    kind: 'triangular',
    describe: `TriAdaptLoRA from rank ${rank}, alpha ${alpha}`,
    axes: { a: ['rank', 'in'], c: ['rank', 'rank'], b: ['rank', 'out'] }, // column i of c is C's row i
    trained: ['a', 'c', 'b'],
    init: (site, random) => ({
      a: filled(rank, site.in, uniform(1 / Math.sqrt(site.in), random)),
      c: zeros(rank, rank),
      b: filled(rank, site.out, uniform(1 / Math.sqrt(rank), random)),
    }),
    pair(_site, tensors, k) {
      const { a, b, c } = k === null ? tensors : slice(family, tensors, k);
      return {
        a: times(a!, c!), // C·A
        b: b!,
        gates: new Float64Array(a!.columns).fill(scale),
        gradient: (d) => ({
          a: multiplyTransposed(d.a, c!),
          c: transposedTimes(a!, d.a),
          b: d.b,
        }),
      };
    },
    fromPeft(_site, module) {
      const { a, b } = tensorsOf({ ...module, scale: module.scale / scale });
      const c = zeros(module.rank, module.rank);
      for (let i = 0; i < module.rank; i++) c.data[i * module.rank + i] = 1;
      return { a, b, c };
    },
  });
  return family;
}

/** `count` more ranks, which add nothing yet: A and B as at the start, C's new entries 0. */
export function grownTriangular({ a, b, c }: Tensors, count: number, random: Random): Tensors {
  const rank = a!.columns;
  const wider = zeros(rank + count, rank + count);
  for (let i = 0; i < rank; i++) wider.data.set(columnsOf(c!, i, 1).data, i * wider.rows);
  return {
    a: beside(a!, filled(count, a!.rows, uniform(1 / Math.sqrt(a!.rows), random))),
    c: wider,
    b: beside(b!, filled(count, b!.rows, uniform(1 / Math.sqrt(rank), random))),
  };
}

/** ‖C‖_F per entry; a module's score is how much it rose since it was last looked at (or grew). */
export function coreSize({ c }: Tensors): number {
  return Math.sqrt(c!.data.reduce((sum, value) => sum + value * value, 0)) / c!.data.length;
}

export interface GrowthSchedule {
  readonly curve: 'linear' | 'exp';
  /** Ranks of all modules together at the end. */
  readonly target: number;
  /** Ranks that a module gains at once: half the reference rank. */
  readonly quantum: number;
  readonly warmUpSteps: number;
  readonly steps: number;
}

/** How many modules grow at `step`, of `modules` that have `total` ranks: ⌊(target − total)·u⌋, u the share of the steps after
 *  warm-up (`exp`: (e^u − 1)/(e − 1), our choice of a curve), and never past the target. */
export function modulesToGrow(
  { curve, target, quantum, warmUpSteps, steps }: GrowthSchedule,
  { step, total, modules }: Readonly<{ step: number; total: number; modules: number }>,
): number {
  const u = Math.min(1, Math.max(0, (step - warmUpSteps) / (steps - warmUpSteps)));
  const share = curve === 'linear' ? u : Math.expm1(u) / Math.expm1(1);
  const count = Math.floor((target - total) * share);
  return Math.max(0, Math.min(count, modules, Math.floor((target - total) / quantum)));
}

/** The modules with the `count` largest scores, of equal ones the first. */
export function chooseGrowth(scores: readonly number[], count: number): number[] {
  const order = Array.from(scores.keys()).sort((i, j) => scores[j]! - scores[i]! || i - j);
  return order.slice(0, count).sort((i, j) => i - j);
}
