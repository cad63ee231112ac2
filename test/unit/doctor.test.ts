import { describe, expect, it } from 'vitest';
import { loadConfig } from '../../src/config.ts';
import { examine } from '../../src/doctor.ts';

describe('doctor', () => {
  it('times our own kernels against ggml’s ops', async () => {
    const config = loadConfig({ flags: {}, environment: {} });
    const { kernels } = await examine(config);
    const [, linear, adapters] =
      /linear q4_1 .*\(([\d.]+) ×\); adapters of rank 16 .*\(([\d.]+) ×\)/.exec(kernels!)!;
    expect(Number(linear)).toBeGreaterThan(1);
    expect(Number(adapters)).toBeGreaterThan(1);
    const other = await examine({ ...config, backend: 'tfjs' });
    expect(other.kernels).toBe('not used by this backend');
  });
});
