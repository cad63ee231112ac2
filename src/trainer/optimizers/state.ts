// What an optimiser remembers: arrays by name and how many steps it took, saved as safetensors.

import { GatewayError } from '../../errors.ts';
import { readSafetensors, writeSafetensors } from '../../model/safetensors.ts';
import type { Optimizer, Parameter, ParameterShape } from './optimizer.ts';

type Numbers = Float32Array | Float64Array | Int32Array;

export interface OptimizerState {
  /** Steps taken, the one under way included. */
  steps: number;
  readonly arrays: ReadonlyMap<string, Numbers>;
}

/** Zeros of these lengths. */
export function createState(lengths: ReadonlyArray<readonly [string, number]>): OptimizerState {
  const arrays = new Map(lengths.map(([name, length]) => [name, new Float32Array(length)]));
  return { steps: 0, arrays };
}

export function floats(state: OptimizerState, name: string): Float32Array {
  return state.arrays.get(name) as Float32Array;
}

export interface Stateful {
  readonly name: string;
  readonly state: OptimizerState;
  /** Which `step` wants, in this order; it throws SHAPE_MISMATCH for others. */
  readonly parameters: readonly ParameterShape[];
}

export function withState(
  { name, state, parameters }: Stateful,
  update: (parameters: readonly Parameter[], learningRate: number) => void,
): Optimizer {
  const { arrays } = state;
  return {
    name,
    stateBytes: Array.from(arrays.values()).reduce((sum, array) => sum + array.byteLength, 0),
    step(current, learningRate) {
      checkSame(name, parameters, current);
      state.steps++;
      update(current, learningRate);
    },
    save() {
      const tensors = Array.from(arrays, ([key, array]) => {
        const dtype = dtypeOf(array);
        return [key, { dtype, shape: [array.length], data: bytesOf(array) }] as const;
      });
      const metadata = new Map([
        ['optimizer', name],
        ['steps', `${state.steps}`],
      ]);
      return writeSafetensors(new Map(tensors), metadata);
    },
    restore(bytes) {
      const { metadata, tensors } = readSafetensors(bytes, { code: 'SHAPE_MISMATCH' });
      const steps = Number(metadata.get('steps'));
      if (metadata.get('optimizer') !== name || !Number.isSafeInteger(steps) || steps < 0) {
        throw mismatch(`${name}: this is the state of something else`);
      }
      const fits = Array.from(arrays).every(
        ([key, array]) => tensors.get(key)?.data.length === array.byteLength,
      );
      if (!fits || tensors.size !== arrays.size) {
        throw mismatch(`${name}: this is the state for other parameters`);
      }
      for (const [key, array] of arrays) bytesOf(array).set(tensors.get(key)!.data);
      state.steps = steps;
    },
  };
}

function checkSame(
  name: string,
  wanted: readonly ParameterShape[],
  current: readonly Parameter[],
): void {
  const isSame = wanted.every(({ name: key, rows, columns }, i) => {
    const given = current[i];
    const length = rows * columns;
    return (
      given?.name === key && given.values.length === length && given.gradient.length === length
    );
  });
  if (!isSame || current.length !== wanted.length) {
    throw mismatch(`${name}: a step wants the ${wanted.length} parameters it was made for`);
  }
}

function mismatch(message: string): GatewayError {
  return new GatewayError('SHAPE_MISMATCH', message);
}

function dtypeOf(array: Numbers): 'F32' | 'F64' | 'I32' {
  if (array instanceof Float64Array) return 'F64';
  return array instanceof Float32Array ? 'F32' : 'I32';
}

function bytesOf({ buffer, byteOffset, byteLength }: Numbers): Uint8Array {
  return new Uint8Array(buffer, byteOffset, byteLength);
}
