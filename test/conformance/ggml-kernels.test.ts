import { describe, expect, it } from 'vitest';
import { GgmlKernels } from '../../src/kernels/ggml/ggml-kernels.ts';
import { kernelSuite } from './kernels.suite.ts';

kernelSuite('ggml, one thread', () => new GgmlKernels({ threads: 1 }));
kernelSuite('ggml, two threads', () => new GgmlKernels({ threads: 2 }));

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
