// AdamW in the r directions of the discrete cosine basis in which a gradient is largest ("SVD-free low-rank gradients", 2025;
// the logic of ISTA-DASLab-Optimizers' DCTAdamW). The basis is fixed, so all that a projection needs is r indices. A
// direction that stays chosen keeps its moments, as the reference's `rotate_subspace` would; a new one starts from zero.

import { type AdamOptions, adamStep, momentLengths, momentsOf } from './adam.ts';
import type { Optimizer, Parameter, ParameterShape } from './optimizer.ts';
import { addBack, project, type Side, sideOf } from './projection.ts';
import { createState, floats, type OptimizerState, withState } from './state.ts';

export interface DctAdamwOptions extends AdamOptions {
  readonly name: 'dct-adamw';
  /** Directions; all, where a matrix has no more. */
  readonly rank: number;
  /** How directions are compared: Σ|x| or Σx² of the gradient's coordinates. */
  readonly norm: 'l1' | 'l2';
  /** Whether what a step leaves out is added to the next gradient. */
  readonly errorFeedback: boolean;
}

/** Direction j of n: cosines of frequency j, so that a row of x in them is its DCT-II, orthonormal. */
export function cosineBasis(n: number): Float64Array {
  const basis = new Float64Array(n * n); // [n directions, n]
  for (let j = 0; j < n; j++) {
    const scale = Math.sqrt((j === 0 ? 1 : 2) / n);
    // The angle modulo a whole turn: cos of a large one loses digits.
    for (let k = 0; k < n; k++) {
      basis[j * n + k] = scale * Math.cos((Math.PI * ((j * (2 * k + 1)) % (4 * n))) / (2 * n));
    }
  }
  return basis;
}

/** The directions with the largest norm of coordinates [length, others], rising; of equal ones the first. */
export function largestDirections(
  coordinates: Float64Array,
  others: number,
  { rank, norm }: Pick<DctAdamwOptions, 'rank' | 'norm'>,
): number[] {
  const sizes = Array.from({ length: coordinates.length / others }, (_, d) => {
    let sum = 0;
    for (let j = d * others; j < (d + 1) * others; j++) {
      const x = coordinates[j]!;
      sum += norm === 'l1' ? Math.abs(x) : x * x;
    }
    return sum;
  });
  const ordered = Array.from(sizes.keys()).sort((x, y) => sizes[y]! - sizes[x]! || x - y);
  return ordered.slice(0, rank).sort((x, y) => x - y);
}

export function createDctAdamw(
  options: DctAdamwOptions,
  parameters: readonly ParameterShape[],
): Optimizer {
  const { arrays } = createState(
    parameters.flatMap(({ name, rows, columns }) => {
      const [short, long] = [Math.min(rows, columns), Math.max(rows, columns)];
      const moments = momentLengths(name, Math.min(options.rank, short) * long);
      return options.errorFeedback ? [...moments, [`${name}.e`, rows * columns]] : moments;
    }),
  );
  const chosen = parameters.map(({ name, rows, columns }) => {
    return [`${name}.i`, new Int32Array(Math.min(options.rank, rows, columns))] as const;
  });
  const state = { steps: 0, arrays: new Map([...arrays, ...chosen]) };
  const bases = new Map<number, Float64Array>();
  for (const { rows, columns } of parameters) {
    const n = Math.min(rows, columns);
    if (!bases.has(n)) bases.set(n, cosineBasis(n));
  }
  return withState({ name: options.name, state, parameters }, (current, learningRate) => {
    for (const parameter of current) {
      const { rows, columns } = parameter;
      const side = sideOf(rows, columns, rows >= columns ? 'row' : 'column');
      stepOne({ options, state, side, basis: bases.get(side.length)! }, parameter, learningRate);
    }
  });
}

interface Setting {
  readonly options: DctAdamwOptions;
  readonly state: OptimizerState;
  readonly side: Side;
  readonly basis: Float64Array;
}

function stepOne(setting: Setting, parameter: Parameter, learningRate: number): void {
  const { options, state, side, basis } = setting;
  const { name, values, gradient } = parameter;
  const { length, others } = side;
  const rest = options.errorFeedback ? floats(state, `${name}.e`) : null;
  if (rest !== null) for (let i = 0; i < rest.length; i++) rest[i]! += gradient[i]!;
  const coordinates = new Float64Array(length * others);
  project(rest ?? gradient, side, basis, coordinates);
  const directions = largestDirections(coordinates, others, options);
  carryMoments(setting, name, directions);
  const low = new Float32Array(directions.length * others);
  const used = new Float64Array(directions.length * length);
  directions.forEach((d, i) => {
    low.set(coordinates.subarray(d * others, (d + 1) * others), i * others);
    used.set(basis.subarray(d * length, (d + 1) * length), i * length);
  });
  if (rest !== null) addBack(rest, side, used, { y: low.map((x) => -x), kept: 1 });
  const step = new Float32Array(low.length);
  const adam = { ...options, weightDecay: 0, learningRate, steps: state.steps };
  adamStep(step, low, momentsOf(state, name), adam);
  addBack(values, side, used, { y: step, kept: 1 - learningRate * options.weightDecay });
}

/** Moments follow their directions to the new places. */
function carryMoments(
  { state, side: { others } }: Setting,
  name: string,
  directions: readonly number[],
): void {
  const indices = state.arrays.get(`${name}.i`) as Int32Array;
  const places = new Map(Array.from(indices, (direction, place) => [direction, place]));
  for (const array of Object.values(momentsOf(state, name)) as Float32Array[]) {
    const before = array.slice();
    array.fill(0);
    directions.forEach((direction, place) => {
      const from = places.get(direction);
      if (from === undefined) return;
      array.set(before.subarray(from * others, (from + 1) * others), place * others);
    });
  }
  indices.set(directions);
}
