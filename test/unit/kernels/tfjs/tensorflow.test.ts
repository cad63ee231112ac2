import { mkdirSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { dirname, join } from 'node:path';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { GatewayError } from '../../../../src/errors.ts';
import { createKernels } from '../../../../src/kernels/create-kernels.ts';
import { loadTensorFlow } from '../../../../src/kernels/tfjs/tensorflow.ts';

// Which package is taken, on packages of a few lines: what they compute is the conformance suite's business.

let directory: string;
beforeEach(() => {
  directory = mkdtempSync(join(tmpdir(), 'rankgate-tfjs-'));
});
afterEach(() => {
  rmSync(directory, { recursive: true, force: true });
});

function install(name: string, script: string): void {
  const path = join(directory, 'node_modules', name, 'index.js');
  mkdirSync(dirname(path), { recursive: true });
  writeFileSync(path, script);
}

/** Has the backends named; every product is `product`. */
function fake(
  backends: readonly string[],
  { binding = 'undefined', gpu = false, product = 6 } = {},
) {
  return `exports.version = { tfjs: '4.22.0' };
    exports.setBackend = async (name) => ${JSON.stringify(backends)}.includes(name);
    exports.tidy = (compute) => compute();
    exports.fill = () => null;
    exports.matMul = () => ({ dataSync: () => [${product}], dispose() {} });
    exports.backend = () => ({ binding: ${binding}, isUsingGpuDevice: ${gpu} });`;
}

const native = { binding: "{ TF_Version: '2.15.1' }" };

async function described(): Promise<string> {
  return (await loadTensorFlow({ directory })).description;
}

async function refusal(promise: Promise<unknown>): Promise<GatewayError> {
  const error = await promise.then(
    () => null,
    (reason: unknown) => reason,
  );
  expect(error).toBeInstanceOf(GatewayError);
  return error as GatewayError;
}

describe('finding TensorFlow.js', () => {
  it('prefers the GPU package, then the native one, then wasm', async () => {
    install('@tensorflow/tfjs', fake(['wasm']));
    install('@tensorflow/tfjs-backend-wasm', '');
    expect(await described()).toBe('@tensorflow/tfjs 4.22.0, wasm');
    install('@tensorflow/tfjs-node', fake(['tensorflow'], native));
    expect(await described()).toBe('@tensorflow/tfjs-node 4.22.0, libtensorflow 2.15.1, CPU');
    install('@tensorflow/tfjs-node-gpu', fake(['tensorflow'], { ...native, gpu: true }));
    expect(await described()).toBe('@tensorflow/tfjs-node-gpu 4.22.0, libtensorflow 2.15.1, GPU');
  });

  it('passes over a package that is there but does not load, and says so', async () => {
    install('@tensorflow/tfjs-node', "throw new Error('no native addon\\nsecond line')");
    install('@tensorflow/tfjs', fake(['wasm']));
    install('@tensorflow/tfjs-backend-wasm', '');
    expect(await described()).toBe(
      '@tensorflow/tfjs 4.22.0, wasm; @tensorflow/tfjs-node does not load (no native addon)',
    );
  });

  it('refuses with what to install when there is nothing', async () => {
    const { code, message } = await refusal(loadTensorFlow({ directory }));
    expect(code).toBe('UNSUPPORTED');
    expect(message).toMatch(/tfjs-node-gpu not installed; @tensorflow\/tfjs-node not installed/);
    expect(message).toMatch(/Install one of them at version 4\.22\.0: .*tfjs-backend-wasm/);
  });

  it('wants the wasm backend beside the portable package', async () => {
    install('@tensorflow/tfjs', fake(['wasm']));
    const { message } = await refusal(loadTensorFlow({ directory }));
    expect(message).toMatch(/@tensorflow\/tfjs needs @tensorflow\/tfjs-backend-wasm/);
  });

  it('passes over a package whose backend does not start', async () => {
    install('@tensorflow/tfjs-node', fake([]));
    const { message } = await refusal(loadTensorFlow({ directory }));
    expect(message).toMatch(/tfjs-node does not load \(its backend tensorflow does not start\)/);
  });

  it('passes over a package that computes wrong numbers', async () => {
    install('@tensorflow/tfjs-node', fake(['tensorflow'], { ...native, product: 5 }));
    const { message } = await refusal(loadTensorFlow({ directory }));
    expect(message).toMatch(/tfjs-node does not load \(its product is 5, not 6\)/);
  });

  it('is what the backend name tfjs loads', async () => {
    install('@tensorflow/tfjs-node', fake(['tensorflow'], native));
    using kernels = await createKernels('tfjs', { threads: 1, libraryDirectory: directory });
    expect(kernels.name).toBe('tfjs');
    expect(kernels.description).toBe(
      '@tensorflow/tfjs-node 4.22.0, libtensorflow 2.15.1, CPU, f32',
    );
  });
});
