// A small differentiable program as data, and the two ways to its gradients: the tape, and central differences of its
// outputs. Both see the same minimised number: the sum of all outputs, each weighed by a fixed random weight.

import { Tape } from '../../src/kernels/autodiff.ts';
import { elementCount } from '../../src/kernels/check.ts';
import type { ForwardOps, Kernels, Program, Tensor } from '../../src/kernels/kernels.ts';
import { ReferenceKernels } from '../../src/kernels/reference-kernels.ts';
import { createRng, normals, type Rng } from './random.ts';

export interface Leaf {
  /** Where its numbers lie; pools are [pages,8,width] with page 0 zero. */
  readonly kind: 'stored' | 'input' | 'shrink pool' | 'expand pool';
  readonly shape: readonly number[];
  readonly values: Float32Array;
  /** Not differentiated when false. */
  readonly trainable: boolean;
}

export interface Differentiable {
  readonly name: string;
  readonly leaves: Readonly<Record<string, Leaf>>;
  readonly indices: Readonly<Record<string, Int32Array>>;
  readonly build: (ops: ForwardOps, at: Readonly<Record<string, Tensor>>) => readonly Tensor[];
  /** Frozen stored leaf → the leaf that holds it transposed. */
  readonly transposed?: Readonly<Record<string, string>>;
}

type Values = Readonly<Record<string, Float32Array>>;

/** Weights of the outputs, by their number: the same in every run. */
const outputWeights = (index: number, count: number): Float32Array =>
  normals(createRng(1000 + index), count);

function store(kernels: Kernels, { kind, shape, values }: Leaf): Tensor {
  const [pages, , width] = shape;
  const use = kind === 'shrink pool' ? 'shrink' : kind === 'expand pool' ? 'expand' : undefined;
  const tensor =
    use === undefined
      ? kernels.store('f32', shape)
      : kernels.storePages(pages!, [{ use, dtype: 'f32', width: width! }])[0]!;
  kernels.write(tensor, new Uint8Array(values.slice().buffer), 0);
  return tensor;
}

function valuesOf(leaves: Differentiable['leaves']): Values {
  return Object.fromEntries(Object.entries(leaves).map(([name, leaf]) => [name, leaf.values]));
}

export function readAll(program: Program, name: string, count: number): Float32Array {
  const out = new Float32Array(count);
  program.read(name, 0, out);
  return out;
}

/** Runs the forward pass on the reference backend: the minimised number, summed in f64. */
function minimised(test: Differentiable, values: Values): number {
  using kernels = new ReferenceKernels();
  const counts: number[] = [];
  using program = compile(kernels, test, values, (ops, at) => {
    const outputs = test.build(ops, at);
    outputs.forEach(({ shape }, i) => {
      counts[i] = elementCount(shape);
    });
    return Object.fromEntries(outputs.map((output, i) => [`y${i}`, output]));
  });
  program.run([]);
  let sum = 0;
  counts.forEach((count, i) => {
    const weights = outputWeights(i, count);
    readAll(program, `y${i}`, count).forEach((y, j) => {
      sum += y * weights[j]!;
    });
  });
  return sum;
}

function compile(
  kernels: Kernels,
  test: Differentiable,
  values: Values,
  outputs: (
    ops: Parameters<Parameters<Kernels['compile']>[0]>[0],
    at: Record<string, Tensor>,
  ) => Record<string, Tensor>,
): Program {
  const leaves = Object.entries(test.leaves).map(
    ([name, leaf]) => [name, { ...leaf, values: values[name]! }] as const,
  );
  const stored = leaves
    .filter(([, { kind }]) => kind !== 'input')
    .map(([name, leaf]) => [name, store(kernels, leaf)] as const);
  const shapes = Object.entries(test.indices).map(
    ([name, { length }]) => [name, [length]] as const,
  );
  const program = kernels.compile(
    (ops) => {
      const at: Record<string, Tensor> = Object.fromEntries(stored);
      for (const [name, { kind, shape }] of leaves)
        if (kind === 'input') at[name] = ops.input(name, 'f32', shape);
      for (const [name, shape] of shapes) {
        // Pages are [rows, slots]; everything else that counts is a list.
        const slots = name === 'pages' ? test.leaves.gate!.shape[1]! / 8 : undefined;
        at[name] = ops.input(name, 'i32', slots === undefined ? shape : [shape[0]! / slots, slots]);
      }
      return outputs(ops, at);
    },
    { segments: 0 },
  );
  for (const [name, { kind, values: numbers }] of leaves)
    if (kind === 'input') program.write(name, numbers);
  for (const [name, numbers] of Object.entries(test.indices)) program.write(name, numbers);
  return program;
}

/** Gradients of the trainable leaves by the tape, and the outputs as `y0…`, on any backend. */
export function tapeGradients(
  kernels: Kernels,
  test: Differentiable,
): Record<string, Float32Array> {
  const trainable = Object.keys(test.leaves).filter((name) => test.leaves[name]!.trainable);
  const counts: Record<string, number> = {};
  const weights: Record<string, Float32Array> = {};
  const { leaves } = test;
  using program = compile(kernels, test, valuesOf(leaves), (ops, at) => {
    const tape = new Tape(ops, {
      trainable: trainable.map((name) => at[name]!),
      transposed: new Map(
        Object.entries(test.transposed ?? {}).map(([from, to]) => [at[from]!, at[to]!]),
      ),
    });
    const outputs = test.build(tape, at);
    const seeds = outputs.map((of, i) => {
      weights[`seed${i}`] = outputWeights(i, elementCount(of.shape));
      return { of, gradient: ops.input(`seed${i}`, 'f32', of.shape) };
    });
    const gradients = tape.gradients(
      seeds,
      trainable.map((name) => at[name]!),
    );
    const named = [
      ...outputs.map((output, i) => [`y${i}`, output] as const),
      ...gradients.map((gradient, i) => [trainable[i]!, gradient] as const),
    ];
    for (const [name, { shape }] of named) counts[name] = elementCount(shape);
    return Object.fromEntries(named);
  });
  for (const [name, numbers] of Object.entries(weights)) program.write(name, numbers);
  program.run([]);
  return Object.fromEntries(
    Object.entries(counts).map(([name, count]) => [name, readAll(program, name, count)]),
  );
}

/** How far a gradient is from central differences along random directions and single numbers, as a share of its norm.
 *  Richardson's combination of two steps: the error left is of fourth order, and below it is f32's rounding. */
export function differenceError(
  test: Differentiable,
  name: string,
  gradient: Float32Array,
  rng: Rng,
): number {
  const base = valuesOf(test.leaves);
  const { kind, shape } = test.leaves[name]!;
  // Page 0 stays zero: it is no variable.
  const fixed = kind.endsWith('pool') ? elementCount(shape.slice(1)) : 0;
  const norm = Math.hypot(...gradient);
  const slope = (direction: Float32Array, step: number): readonly [found: number, told: number] => {
    const moved = (sign: number): Float32Array =>
      base[name]!.map((value, i) => value + sign * step * direction[i]!);
    const [up, down] = [moved(1), moved(-1)];
    const found =
      minimised(test, { ...base, [name]: up }) - minimised(test, { ...base, [name]: down });
    // The steps that f32 really took.
    const told = gradient.reduce((sum, g, i) => sum + g * (up[i]! - down[i]!), 0);
    return [found / (2 * step), told / (2 * step)];
  };
  const directions = Array.from({ length: 5 }, (_, i) => {
    // Along the gradient itself, where an error of scale shows in full; at random; and single numbers.
    const direction = i === 0 && norm > 0 ? gradient.slice() : normals(rng, gradient.length);
    if (i >= 2) direction.fill(0)[fixed + rng.below(gradient.length - fixed)] = 1;
    direction.fill(0, 0, fixed);
    const length = Math.hypot(...direction);
    return direction.map((value) => value / length);
  });
  const step = 1 / 16;
  const errors = directions.map((direction) => {
    const [wide, narrow] = [slope(direction, step), slope(direction, step / 2)];
    const [found, told] = [0, 1].map((i) => (4 * narrow[i]! - wide[i]!) / 3) as [number, number];
    return Math.abs(found - told);
  });
  return Math.max(...errors) / (norm || 1);
}
