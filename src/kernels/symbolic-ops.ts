// Ops that only check: a first pass over a program's closure that throws on any wrong shape, counts what a backend must
// reserve, and finds the limit of every index input, all before native code is touched.

import * as check from './check.ts';
import type {
  AtomRouter,
  AtomUses,
  DType,
  ExpandPart,
  Ops,
  RankRouter,
  RopeOptions,
  ShrinkPart,
  Tensor,
} from './kernels.ts';
import { checkRouteAtoms, checkRouteRanks } from './rank-routing.ts';
import { SymbolicTraining } from './training-ops.ts';

export interface InputPlan {
  readonly dtype: 'f32' | 'i32' | 'i64';
  readonly shape: readonly number[];
  /** Values must lie in [0, indexLimit); Infinity for plain numbers. */
  indexLimit: number;
}

export type InputData = Float32Array | Int32Array | BigInt64Array;

const arrayOf = { f32: Float32Array, i32: Int32Array, i64: BigInt64Array } as const;

/** What every backend asks of Program.write before it copies: the name, the type, the size and every index. */
export function checkInput(
  inputs: ReadonlyMap<string, InputPlan>,
  name: string,
  data: InputData,
): void {
  const plan = inputs.get(name);
  if (plan === undefined) throw check.mismatch('write', `the program has no input ${name}`);
  if (!(data instanceof arrayOf[plan.dtype]) || data.length !== check.elementCount(plan.shape)) {
    const wanted = `${plan.shape.join('×')} ${plan.dtype}`;
    throw check.mismatch('write', `${name} wants ${wanted}, got ${data.length} numbers`);
  }
  if (plan.indexLimit !== Number.POSITIVE_INFINITY) check.checkIndices(name, data, plan.indexLimit);
}

export class SymbolicOps implements Ops {
  readonly training: SymbolicTraining = new SymbolicTraining({
    result: (...values) => this.#result(...values),
    limit: (indices, limit) => this.#limit(indices, limit),
  });
  readonly inputs: Map<string, InputPlan> = new Map();
  /** Upper bound on native tensor structs, views included. */
  tensorCount = 0;
  readonly #segments: number;
  readonly #plans: Map<Tensor, InputPlan> = new Map();

  constructor(segments: number) {
    this.#segments = segments;
  }

  #result(dtype: DType, shape: readonly number[], tensors = 2): Tensor {
    check.checkShape('result', dtype, shape);
    this.tensorCount += tensors;
    return { dtype, shape };
  }

  #limit(indices: Tensor, limit: number): void {
    const plan = this.#plans.get(indices);
    if (plan === undefined) throw check.mismatch('indices', 'must be a program input');
    plan.indexLimit = Math.min(plan.indexLimit, limit);
  }

  input(name: string, dtype: 'f32' | 'i32' | 'i64', shape: readonly number[]): Tensor {
    if (this.inputs.has(name)) throw check.mismatch('input', `${name} is declared twice`);
    const tensor = this.#result(dtype, shape);
    const plan: InputPlan = { dtype, shape, indexLimit: Number.POSITIVE_INFINITY };
    this.inputs.set(name, plan);
    this.#plans.set(tensor, plan);
    return tensor;
  }

  embed(table: Tensor, ids: Tensor): Tensor {
    const shape = check.checkEmbed(table, ids);
    this.#limit(ids, table.shape[0]!);
    return this.#result('f32', shape);
  }

  rmsNorm(x: Tensor, weight: Tensor, _eps: number): Tensor {
    return this.#result('f32', check.checkNorm(x, weight));
  }

  linear(x: Tensor, w: Tensor): Tensor {
    return this.#result('f32', check.checkLinear(x, w));
  }

  add(a: Tensor, b: Tensor): Tensor {
    return this.#result('f32', check.checkSame('add', a, b));
  }

  mul(a: Tensor, b: Tensor): Tensor {
    return this.#result('f32', check.checkSame('mul', a, b));
  }

  swiglu(gate: Tensor, up: Tensor): Tensor {
    return this.#result('f32', check.checkSame('swiglu', gate, up));
  }

  rope(x: Tensor, positions: Tensor, options: RopeOptions): Tensor {
    return this.#result('f32', check.checkRope(x, positions, options));
  }

  reshape(x: Tensor, shape: readonly number[]): Tensor {
    return this.#result(x.dtype, check.checkReshape(x, shape));
  }

  slice(x: Tensor, index: number): Tensor {
    return this.#result(x.dtype, check.checkSlice(x, index));
  }

  writeCells(cache: Tensor, x: Tensor, cells: Tensor): void {
    check.checkWriteCells(cache, x, cells);
    this.#limit(cells, cache.shape[0]!);
    this.tensorCount += 2;
  }

  attend(q: Tensor, k: Tensor, v: Tensor): Tensor {
    if (this.#segments < 1)
      throw check.mismatch('attend', 'the program was compiled for no segments');
    return this.#result('f32', check.checkAttend(q, k, v), 6 + 6 * this.#segments);
  }

  shrink(x: Tensor, pages: Tensor, parts: readonly ShrinkPart[], uses: Tensor): Tensor[] {
    const shape = check.checkShrink(x, pages, parts, uses);
    this.#limit(pages, parts[0]!.a.shape[0]!);
    this.#limit(uses, parts[0]!.gate.shape[0]!);
    // Per tier of pages (at most log2 P + 2): three views and the h of the tier, scaled, moved into place.
    const tensors = 3 + 8 * (Math.log2(pages.shape[1]!) + 2);
    return parts.map(() => this.#result('f32', shape, tensors));
  }

  routeRanks(x: Tensor, hs: readonly Tensor[], router: RankRouter): Tensor[] {
    const shape = checkRouteRanks(x, hs, router);
    this.#limit(router.uses, router.groups.shape[0]!);
    return hs.map(() => this.#result('f32', shape));
  }

  routeAtoms(h: Tensor, earlier: readonly Tensor[], router: AtomRouter, uses: AtomUses): Tensor {
    const shape = checkRouteAtoms(h, earlier, router, uses);
    this.#limit(uses.uses, uses.topK.shape[0]!);
    return this.#result('f32', shape, 3);
  }

  mixRanks(h: Tensor, atoms: Tensor, weights: Tensor): Tensor {
    return this.#result('f32', check.checkMixRanks(h, atoms, weights), 12 + 4 * atoms.shape[0]!);
  }

  expand(pages: Tensor, parts: readonly ExpandPart[]): Tensor[] {
    check.checkExpandParts(pages, parts);
    const count = pages.shape[1]!;
    return parts.map(({ y, b }) => {
      this.#limit(pages, b.shape[0]!);
      if (this.#plans.has(y) || 'bytes' in y) throw check.mismatch('expand', 'y must be computed');
      // Per tier: two views and a product; per page: a view, a target, a sum.
      return this.#result('f32', y.shape, 1 + 4 * (Math.log2(count) + 2) + 4 * count);
    });
  }

  gatherRows(x: Tensor, rows: Tensor): Tensor {
    const shape = check.checkGather(x, rows);
    this.#limit(rows, x.shape[0]!);
    return this.#result('f32', shape);
  }
}
