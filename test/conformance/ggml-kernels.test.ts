import { describe, expect, it } from 'vitest';
import { GgmlKernels } from '../../src/kernels/ggml/ggml-kernels.ts';
import { createRng } from '../support/random.ts';
import { kernelSuite, ownSkips } from './kernels.suite.ts';
import { routingCases } from './routing.cases.ts';

const ownOnly = ownSkips('composed of ggml’s ops: its products have no q8_0 rows of 8 numbers');
for (const threads of [1, 2]) {
  const composed = { threads, native: false };
  kernelSuite(`ggml’s ops, ${threads} threads`, () => new GgmlKernels(composed), ownOnly);
  const own = { threads, f32Activations: true };
  kernelSuite(`own kernels, ${threads} threads`, () => new GgmlKernels(own));
}

describe('own kernels', () => {
  it('were built here', () => {
    using kernels = new GgmlKernels({ threads: 1, f32Activations: true });
    expect(kernels.description).toMatch(/own kernels for/);
    expect(kernels.f32Activations).toBe(true);
  });
});

describe('without our own kernels', () => {
  it('what rows choose themselves is refused by name, not computed otherwise', () => {
    using kernels = new GgmlKernels({ threads: 1, native: false });
    for (const test of routingCases.filter(({ name }) => name.startsWith('route'))) {
      const { stored } = test.make(createRng(1));
      const tensors = Object.fromEntries(
        Object.entries(stored).map(([name, { dtype, shape }]) => [
          name,
          kernels.store(dtype, shape),
        ]),
      );
      expect(() => kernels.compile((ops) => test.build(ops, tensors), { segments: 0 })).toThrow(
        expect.objectContaining({ code: 'UNSUPPORTED' }),
      );
    }
  });
});

describe('ggml memory', () => {
  it('thousands of stores, compiles and runs do not grow the process', () => {
    const round = (): void => {
      using kernels = new GgmlKernels({ threads: 1 });
      const w = kernels.store('f32', [256, 256]);
      for (let i = 0; i < 20; i++) {
        using program = kernels.compile(
          (ops) => ({ y: ops.linear(ops.input('x', 'f32', [4 + i, 256]), w) }),
          { segments: 0 },
        );
        program.write('x', new Float32Array((4 + i) * 256));
        program.run([]);
      }
    };
    for (let i = 0; i < 50; i++) round();
    const before = process.memoryUsage.rss();
    for (let i = 0; i < 150; i++) round(); // 3,000 programs, 150 devices with their thread pools
    expect(process.memoryUsage.rss() - before).toBeLessThan(24 * 1024 * 1024);
  });
});
