// Finds TensorFlow.js at run time, by name: rankgate does not depend on it. What we call of it is declared here (4.22), so
// that the types need no installed package either.

import { createRequire } from 'node:module';
import { join } from 'node:path';
import { GatewayError } from '../../errors.ts';

export interface TfTensor {
  readonly shape: readonly number[];
  readonly isDisposed: boolean;
  dataSync(): Float32Array | Int32Array;
  dispose(): void;
}

type TfShape = readonly number[];
type Binary = (a: TfTensor, b: TfTensor) => TfTensor;
type Unary = (x: TfTensor) => TfTensor;

/** The functions of TensorFlow.js that the backend is written over. */
export interface TensorFlow {
  readonly version: Readonly<Record<string, string>>;
  readonly add: Binary;
  readonly sub: Binary;
  readonly mul: Binary;
  readonly square: Unary;
  readonly rsqrt: Unary;
  readonly sigmoid: Unary;
  readonly sign: Unary;
  readonly softmax: Unary;
  readonly clone: Unary;
  /** Tensors made inside are freed, except the returned ones and those given to `keep`. */
  tidy<T extends Readonly<Record<string, TfTensor>>>(compute: () => T): T;
  keep(x: TfTensor): TfTensor;
  memory(): { readonly numTensors: number };
  /** May hold on to `values` instead of copying them. */
  tensor(values: Float32Array | Int32Array, shape: TfShape, dtype: 'float32' | 'int32'): TfTensor;
  scalar(value: number): TfTensor;
  zeros(shape: TfShape): TfTensor;
  fill(shape: TfShape, value: number): TfTensor;
  mean(x: TfTensor, axis: number, keepDims: boolean): TfTensor;
  sum(x: TfTensor, axis?: number, keepDims?: boolean): TfTensor;
  logSumExp(x: TfTensor, axis: number): TfTensor;
  matMul(a: TfTensor, b: TfTensor, transposeA?: boolean, transposeB?: boolean): TfTensor;
  reshape(x: TfTensor, shape: TfShape): TfTensor;
  transpose(x: TfTensor, axes?: readonly number[]): TfTensor;
  slice(x: TfTensor, begin: TfShape, size: TfShape): TfTensor;
  split(x: TfTensor, sizes: TfShape): TfTensor[];
  concat(xs: readonly TfTensor[], axis: number): TfTensor;
  gather(x: TfTensor, indices: TfTensor, axis?: number): TfTensor;
  /** Rows at equal indices [N,1] are added up. */
  scatterND(indices: TfTensor, updates: TfTensor, shape: TfShape): TfTensor;
  setBackend(name: string): Promise<boolean>;
  backend(): {
    readonly isUsingGpuDevice?: boolean;
    readonly binding?: { readonly TF_Version: string };
  };
}

const tensorFlowVersion = '4.22.0';

/** In the order of preference. The last needs no native code. */
const candidates = {
  '@tensorflow/tfjs-node-gpu': { backend: 'tensorflow', plugin: null },
  '@tensorflow/tfjs-node': { backend: 'tensorflow', plugin: null },
  '@tensorflow/tfjs': { backend: 'wasm', plugin: '@tensorflow/tfjs-backend-wasm' },
} as const;
export type TensorFlowPackage = keyof typeof candidates;
const everyPackage = Object.keys(candidates) as TensorFlowPackage[];

export interface TensorFlowOptions {
  /** A folder with a node_modules of its own; where rankgate itself is installed when absent. */
  readonly directory?: string;
  /** Which may be used, in this order; all when absent. */
  readonly packages?: readonly TensorFlowPackage[];
}

export interface LoadedTensorFlow {
  readonly tf: TensorFlow;
  /** `@tensorflow/tfjs-node 4.22.0, libtensorflow 2.15.1, CPU`, and why a preferred package was passed over. */
  readonly description: string;
}

function isThere(name: string, require: NodeJS.Require): boolean {
  try {
    require.resolve(name);
    return true;
  } catch {
    return false;
  }
}

async function load(name: TensorFlowPackage, require: NodeJS.Require): Promise<LoadedTensorFlow> {
  const { backend, plugin } = candidates[name];
  const tf = require(name) as TensorFlow;
  if (plugin !== null) require(plugin);
  if (!(await tf.setBackend(backend))) throw new Error(`its backend ${backend} does not start`);
  // That it loads says little: on Node 23, tfjs-node 4.22 fails at its first op.
  const { six } = tf.tidy(() => ({ six: tf.matMul(tf.fill([1, 3], 2), tf.fill([3, 1], 1)) }));
  const [found] = six.dataSync();
  six.dispose();
  if (found !== 6) throw new Error(`its product is ${found}, not 6`);
  const { isUsingGpuDevice, binding } = tf.backend();
  const device = isUsingGpuDevice === true ? 'GPU' : 'CPU';
  const below = binding === undefined ? backend : `libtensorflow ${binding.TF_Version}, ${device}`;
  return { tf, description: `${name} ${tf.version.tfjs}, ${below}` };
}

/** Throws UNSUPPORTED, saying what to install, when nothing is there that works. */
export async function loadTensorFlow(options: TensorFlowOptions = {}): Promise<LoadedTensorFlow> {
  const { directory, packages = everyPackage } = options;
  const require = createRequire(
    directory === undefined ? import.meta.url : join(directory, 'package.json'),
  );
  const absent: string[] = [];
  const broken: string[] = [];
  for (const name of packages) {
    const { plugin } = candidates[name];
    if (!isThere(name, require)) absent.push(`${name} not installed`);
    else if (plugin !== null && !isThere(plugin, require)) absent.push(`${name} needs ${plugin}`);
    else {
      try {
        const { tf, description } = await load(name, require);
        return { tf, description: [description, ...broken].join('; ') };
      } catch (error) {
        const { message } = error as Error;
        broken.push(`${name} does not load (${message.trim().split('\n')[0]})`);
      }
    }
  }
  throw new GatewayError(
    'UNSUPPORTED',
    `TensorFlow.js: ${[...broken, ...absent].join('; ')}. Install one of them at version ${tensorFlowVersion}: ` +
      '@tensorflow/tfjs-node-gpu, @tensorflow/tfjs-node, or @tensorflow/tfjs with @tensorflow/tfjs-backend-wasm',
  );
}
