// TensorFlow.js for tests: what scripts/setup-tensorflow.mjs installed, or the reason why a test cannot run.

import { existsSync } from 'node:fs';
import { join } from 'node:path';
import {
  type LoadedTensorFlow,
  loadTensorFlow,
  type TensorFlowPackage,
} from '../../src/kernels/tfjs/tensorflow.ts';

export const tensorflowDirectory: string = join(import.meta.dirname, '../../data/tensorflow');

/** What the script writes last, by package. */
const proofs: Readonly<Record<TensorFlowPackage, string>> = {
  '@tensorflow/tfjs': '.installed',
  '@tensorflow/tfjs-node': '.compiled',
  '@tensorflow/tfjs-node-gpu': '.compiled',
};

/** null: it is there. */
export function whyNoTensorflow(name: TensorFlowPackage): string | null {
  if (existsSync(join(tensorflowDirectory, proofs[name]))) return null;
  return `${name} is not set up: node scripts/setup-tensorflow.mjs`;
}

/** Before TensorFlow.js is loaded: one thread, and no notes about the CPU on stderr. */
export function quietTensorflow(): void {
  process.env.TF_CPP_MIN_LOG_LEVEL ??= '2';
  process.env.TF_NUM_INTRAOP_THREADS ??= '1';
  process.env.TF_NUM_INTEROP_THREADS ??= '1';
}

export async function loadForTest(name: TensorFlowPackage): Promise<LoadedTensorFlow> {
  quietTensorflow();
  return loadTensorFlow({ directory: tensorflowDirectory, packages: [name] });
}
