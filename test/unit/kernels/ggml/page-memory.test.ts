// Pools of adapter pages take the memory of the pages that were written, and their pages keep to themselves.

import { describe, expect, it } from 'vitest';
import { GatewayError } from '../../../../src/errors.ts';
import { GgmlKernels } from '../../../../src/kernels/ggml/ggml-kernels.ts';
import type { PagePool } from '../../../../src/kernels/kernels.ts';

const megabyte = 2 ** 20;

describe('pools of adapter pages in ggml', () => {
  it('cost memory by the page that is written, not by the pages there are', () => {
    using kernels = new GgmlKernels({ threads: 1, native: false });
    const width = 4096;
    const pools = Array.from(
      { length: 40 },
      (): PagePool => ({ use: 'shrink', dtype: 'f16', width }),
    );
    const pageBytes = 8 * width * 2 * pools.length; // 2.5 MB
    const before = process.memoryUsage.rss();
    const stored = kernels.storePages(1000, pools);
    const grown = (): number => process.memoryUsage.rss() - before;
    expect(grown()).toBeLessThan(pageBytes + 32 * megabyte); // page 0, and what JavaScript took
    const halves = new Uint16Array(8 * width).fill(0x3c00);
    for (let page = 100; page < 120; page++) {
      for (const pool of stored) kernels.writePage(pool, page, halves);
    }
    expect(grown()).toBeGreaterThan(20 * pageBytes);
    expect(grown()).toBeLessThan(21 * pageBytes + 64 * megabyte); // of 2500
  });

  it('are read and written across pages as if they lay in a row, and are not moved', () => {
    using kernels = new GgmlKernels({ threads: 1 });
    const [first, second] = kernels.storePages(3, [
      { use: 'shrink', dtype: 'f32', width: 32 },
      { use: 'shrink', dtype: 'f16', width: 64 },
    ]);
    const bytes = Uint8Array.from({ length: first!.bytes - 8 }, (_, i) => i % 251);
    kernels.write(first!, bytes, 8);
    kernels.write(second!, new Uint8Array(second!.bytes).fill(255), 0);
    const seen = new Uint8Array(bytes.length - 20);
    kernels.read(first!, seen, 20);
    expect(seen).toEqual(bytes.subarray(12, bytes.length - 8));
    expect(() => kernels.copyWithin(first!, { from: 0, to: 1024, bytes: 1024 })).toThrow(
      GatewayError,
    );
  });
});
