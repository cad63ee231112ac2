// CoSO (arXiv 2505.11816) for low-rank pairs: what a module does to the inputs of earlier tasks stays as it is. M [in, k]
// spans them. A moves where M is not seen (dA·M = 0): by Adam in the leading directions P of what is left of its gradient
// then. B moves only as no rank that answers to M notices: (B + dB)·A·M = B·A·M. What A's gradients show of this task's inputs
// is gathered, and joins M at the end. The paper trains whole matrices, and has no B; that moments turn with P is ours too.
// Factors are rank-major, and all ranks have one scale.

import { added, beside, scaled, times } from '../adapters/families/matrices.ts';
import { type Columns, scaled as eachScaled, innerProducts, svd } from '../adapters/orthogonal.ts';
import { orthonormal } from '../adapters/randomized-svd.ts';
import { GatewayError } from '../errors.ts';
import { addRow, createSketch, type Sketch, sketchOf } from './frequent-directions.ts';
import { type AdamOptions, adamStep, momentLengths, momentsOf } from './optimizers/adam.ts';
import type { Optimizer, Parameter, ParameterShape } from './optimizers/optimizer.ts';
import { addBack, project, sideOf } from './optimizers/projection.ts';
import { createState, floats, type OptimizerState, withState } from './optimizers/state.ts';

/** No weight decay: it would forget. */
export interface CosoOptions extends Omit<AdamOptions, 'weightDecay'>, BasisOptions {
  /** Directions that A moves in at a time, r1. */
  readonly directions: number;
  /** Steps between two choices of them, K. */
  readonly gap: number;
  /** Rows that stand for all gradients of an A, r2. */
  readonly sketch: number;
}

export interface BasisOptions {
  /** Of the sketch, that the basis holds afterwards. */
  readonly energy: number;
  /** Directions that a basis may have: what is beyond is not kept. */
  readonly keptMax: number;
}

export interface Coso extends Optimizer {
  /** M by A's name, with what this task's inputs add to it. */
  consolidated(): Map<string, Columns>;
}

// Of a gradient's or a factor's length: what f32 arithmetic leaves of a direction that is not there.
const negligible = 1e-6;

/** `bases` has M by A's name; a module without one has no earlier tasks. */
export function createCoso(
  options: CosoOptions,
  parameters: readonly ParameterShape[],
  bases: ReadonlyMap<string, Columns>,
): Coso {
  const isA = ({ name }: ParameterShape): boolean => name.endsWith('.a');
  const sketches = new Map(
    parameters.filter(isA).map(({ name, columns }) => {
      return [name, createSketch(Math.min(options.sketch, columns), columns)] as const;
    }),
  );
  const state = stateOf(options, parameters, sketches);
  const basisOf = (name: string, width: number): Columns => bases.get(name) ?? emptyBasis(width);
  const optimizer = withState({ name: 'coso', state, parameters }, (current, learningRate) => {
    const byName = new Map(current.map((parameter) => [parameter.name, parameter]));
    for (const parameter of current) {
      const { name } = parameter;
      const a = isA(parameter) ? parameter : byName.get(`${name.slice(0, -1)}a`);
      if (a === undefined) throw new GatewayError('INVALID_REQUEST', `coso: ${name} has no a`);
      const setting = { options, state, basis: basisOf(a.name, a.columns), learningRate };
      if (a === parameter) {
        gather(sketches.get(name)!, parameter);
        moveA(setting, parameter);
      } else moveB(setting, parameter, a);
    }
  });
  const basesBytes = Array.from(bases.values()).reduce((sum, { data }) => sum + data.byteLength, 0);
  return {
    ...optimizer,
    stateBytes: optimizer.stateBytes + basesBytes,
    consolidated: () =>
      new Map(
        Array.from(sketches, ([name, { size, width, data, filled }]) => {
          const copy = { size, width, data: data.slice(), filled: filled.slice() };
          return [name, extendBasis(basisOf(name, width), sketchOf(copy), options)] as const;
        }),
      ),
  };
}

function stateOf(
  options: CosoOptions,
  parameters: readonly ParameterShape[],
  sketches: ReadonlyMap<string, Sketch>,
): OptimizerState {
  const { arrays } = createState(
    parameters.flatMap(({ name, rows, columns }) => {
      if (!sketches.has(name)) {
        return [...momentLengths(name, rows * columns), [`${name}.held`, rows * rows] as const];
      }
      const count = Math.min(options.directions, rows, columns);
      return [...momentLengths(name, count * rows), [`${name}.p`, count * columns] as const];
    }),
  );
  const gathered = Array.from(sketches, ([name, { data, filled }]) => [
    [`${name}.rows`, data] as const,
    [`${name}.filled`, filled] as const,
  ]).flat();
  return { steps: 0, arrays: new Map([...arrays, ...gathered]) };
}

function gather(sketch: Sketch, { gradient, rows, columns }: Parameter): void {
  for (let r = 0; r < rows; r++) {
    addRow(sketch, gradient.subarray(r * columns, (r + 1) * columns));
  }
}

interface Setting {
  readonly options: CosoOptions;
  readonly state: OptimizerState;
  readonly basis: Columns; // [in, k]
  readonly learningRate: number;
}

function moveA({ options, state, basis, learningRate }: Setting, parameter: Parameter): void {
  const { name, values, gradient, rows, columns } = parameter;
  const saved = floats(state, `${name}.p`);
  const count = saved.length / columns;
  // While B is zero nothing leads: the first directions are those of the first gradient there is.
  if ((state.steps - 1) % options.gap === 0 || saved.every((value) => value === 0)) {
    const before = Float64Array.from(saved);
    saved.set(leadingDirections(parameter, basis, count));
    turnMoments(momentsOf(state, name), { before, now: saved, count, rows });
  }
  const directions = Float64Array.from(saved); // [count, in]
  const side = sideOf(rows, columns, 'row');
  const low = new Float32Array(count * rows);
  project(gradient, side, directions, low);
  const step = new Float32Array(low.length);
  const adam = { ...options, weightDecay: 0, learningRate, steps: state.steps };
  adamStep(step, low, momentsOf(state, name), adam);
  addBack(values, side, directions, { y: step, kept: 1 });
}

/** The directions of the gradient's rows outside of M, the largest first; zeros where there are no more. */
function leadingDirections(parameter: Parameter, basis: Columns, count: number): Float64Array {
  const { rows, columns, gradient } = parameter;
  const all = { rows: columns, columns: rows, data: Float64Array.from(gradient) }; // [in, R]
  const { us, sigma } = svd(outside(basis, all));
  const least = negligible * lengthOf(all);
  const scales = sigma.slice(0, count).map((size) => (size > least ? 1 / size : 0));
  const directions = new Float64Array(count * columns);
  directions.set(eachScaled(us, scales).data);
  return directions;
}

/** As seen from the new directions, m is turned, and v by the squares of the same cosines. */
function turnMoments(
  moments: { readonly m: Float32Array; readonly v: Float32Array }, // [count, R] each
  turn: {
    readonly before: Float64Array; // [count, in]
    readonly now: Float32Array; // [count, in]
    readonly count: number;
    readonly rows: number;
  },
): void {
  const { before, now, count, rows } = turn;
  const width = now.length / count;
  const [m, v] = [moments.m.slice(), moments.v.slice()];
  for (const array of [moments.m, moments.v]) array.fill(0);
  for (let to = 0; to < count; to++) {
    for (let from = 0; from < count; from++) {
      let cosine = 0;
      for (let i = 0; i < width; i++) cosine += now[to * width + i]! * before[from * width + i]!;
      for (let r = 0; r < rows; r++) {
        moments.m[to * rows + r]! += cosine * m[from * rows + r]!;
        moments.v[to * rows + r]! += cosine * cosine * v[from * rows + r]!;
      }
    }
  }
}

function moveB(setting: Setting, parameter: Parameter, a: Parameter): void {
  const { options, state, basis, learningRate } = setting;
  const { name, values, gradient, rows, columns } = parameter;
  const saved = floats(state, `${name}.held`); // [R, R], directions of which no more are zero
  // A·M does not change after that.
  if (state.steps === 1) saved.set(answeringRanks(a, basis));
  const held = Float64Array.from(saved);
  const side = sideOf(rows, columns, 'column');
  const release = (x: Float32Array): void => {
    const seen = new Float64Array(rows * columns);
    project(x, side, held, seen);
    addBack(x, side, held, { y: seen.map((value) => -value), kept: 1 });
  };
  const free = gradient.slice();
  release(free);
  const step = new Float32Array(values.length);
  const adam = { ...options, weightDecay: 0, learningRate, steps: state.steps };
  adamStep(step, free, momentsOf(state, name), adam);
  release(step);
  for (let i = 0; i < values.length; i++) values[i]! += step[i]!;
}

/** An orthonormal basis of A·M's columns. */
function answeringRanks(a: Parameter, basis: Columns): Float64Array {
  const all = { rows: a.columns, columns: a.rows, data: Float64Array.from(a.values) }; // [in, R]
  const { us, sigma } = svd(innerProducts(all, basis)); // [R, k]
  const least = negligible * lengthOf(all);
  return eachScaled(
    us,
    sigma.map((size) => (size > least ? 1 / size : 0)),
  ).data;
}

export function emptyBasis(width: number): Columns {
  return { rows: width, columns: 0, data: new Float64Array(0) };
}

/** x without what lies in the basis; twice, because the first leaves rounding of what it took. */
export function outside(basis: Columns, x: Columns): Columns {
  const once = added(x, scaled(times(basis, innerProducts(basis, x)), -1));
  return added(once, scaled(times(basis, innerProducts(basis, once)), -1));
}

function lengthOf({ data }: Columns): number {
  return Math.sqrt(data.reduce((sum, x) => sum + x * x, 0));
}

/** At the end of a task whose inputs the sketch stands for (a column each): the fewest directions more with which the basis
 *  holds this share of the sketch's energy, or as many as it may have. */
export function extendBasis(
  basis: Columns,
  sketch: Columns,
  { energy, keptMax }: BasisOptions,
): Columns {
  const total = lengthOf(sketch) ** 2;
  const { us, sigma } = svd(outside(basis, sketch));
  let missing = sigma.reduce((sum, size) => sum + size * size, 0);
  let count = 0;
  while (
    count < Math.min(sigma.length, keptMax - basis.columns) &&
    missing > (1 - energy) * total &&
    sigma[count]! > negligible * Math.sqrt(total)
  ) {
    missing -= sigma[count]! ** 2;
    count++;
  }
  const scales = sigma.slice(0, count).map((size) => 1 / size);
  return beside(basis, orthonormal(outside(basis, eachScaled(us, scales))));
}

/** A [in, R] where ranks that add nothing as yet, whose columns of B are zero, see nothing of M: these B's may move. */
export function freedRanks(a: Columns, b: Columns, basis: Columns): Columns {
  const free = outside(basis, a);
  const data = a.data.slice();
  for (let r = 0; r < a.columns; r++) {
    const [from, to] = [r * a.rows, (r + 1) * a.rows];
    const isNew = b.data.subarray(r * b.rows, (r + 1) * b.rows).every((value) => value === 0);
    if (isNew) data.set(free.data.subarray(from, to), from);
  }
  return { ...a, data };
}
