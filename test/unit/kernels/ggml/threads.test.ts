// The pool's threads: as many as were asked for compute, and none of them burns CPU time between runs.

import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { GgmlKernels } from '../../../../src/kernels/ggml/ggml-kernels.ts';
import type { Program } from '../../../../src/kernels/kernels.ts';
import { createRng, normals } from '../../../support/random.ts';

const [rows, size, layers] = [16, 512, 12];

function cpuMs(): number {
  const { user, system } = process.cpuUsage();
  return (user + system) / 1000;
}

describe('threads of ggml', () => {
  let kernels: GgmlKernels;
  let program: Program;

  beforeAll(() => {
    kernels = new GgmlKernels({ threads: 2 });
    const weight = kernels.store('f32', [size, size]);
    const values = normals(createRng(3), size * size, size ** -0.5);
    kernels.write(weight, new Uint8Array(values.buffer), 0);
    program = kernels.compile(
      (ops) => {
        let x = ops.input('x', 'f32', [rows, size]);
        for (let i = 0; i < layers; i++) x = ops.linear(x, weight);
        return { x };
      },
      { segments: 0 },
    );
    program.write('x', normals(createRng(4), rows * size));
  });
  afterAll(() => kernels[Symbol.dispose]());

  const run = (): Float32Array => {
    program.run([]);
    const out = new Float32Array(rows * size);
    program.read('x', 0, out);
    return out;
  };

  it('computes the same with fewer of them', () => {
    const both = run();
    kernels.setThreads(1);
    expect(run()).toEqual(both);
    kernels.setThreads(2);
    expect(run()).toEqual(both);
  });

  // Here the time that passes is the thing measured: ggml's own polling goes on for 170 ms of CPU time after each run.
  it.each([2, 1])('lets all of them sleep when a run of %i has ended', (threads) => {
    kernels.setThreads(threads);
    for (let i = 0; i < 4; i++) run();
    const startMs = cpuMs();
    Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0, 300);
    expect(cpuMs() - startMs).toBeLessThan(40);
  });
});
