import { createHash } from 'node:crypto';
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { describe, expect, it } from 'vitest';
import {
  divergence,
  type FidelityOptions,
  keepFidelity,
  keptFidelity,
  measureFidelity,
} from '../../../src/model/mode-fidelity.ts';
import { tinyPath } from '../../support/open-test-decoder.ts';
import { createRng } from '../../support/random.ts';

const options: FidelityOptions = {
  modelPath: tinyPath,
  modelHash: createHash('sha256').update(readFileSync(tinyPath)).digest('hex'),
  mode: 'faithful',
  backend: 'ggml',
  threads: 1,
  cacheDirectory: null,
};

describe('measureFidelity', () => {
  it('faithful is next to f32, and exact is f32 itself', async () => {
    const text = () => ({ start: 1, tokens: 64, draw: createRng(3).next });
    const faithful = await measureFidelity(options, text());
    expect(faithful.tokens).toBe(64);
    // f16 cells, and sums in another order.
    expect(faithful.kl).toBeLessThan(1e-4);
    expect(faithful.kl).toBeGreaterThan(0);
    expect(faithful.description).toContain('faithful');
    const exact = await measureFidelity({ ...options, mode: 'exact' }, text());
    expect(exact.kl).toBe(0);
  });

  it('divergence is worked out by hand, whatever is added to all logits', () => {
    const p = Float32Array.from([Math.log(1 / 2), Math.log(1 / 2)]);
    const q = Float32Array.from([Math.log(1 / 4) + 7, Math.log(3 / 4) + 7]);
    const wanted = 0.5 * Math.log(2) + 0.5 * Math.log(2 / 3);
    expect(divergence(p, q)).toBeCloseTo(wanted, 6);
    expect(divergence(q, p)).toBeCloseTo(0.25 * Math.log(0.5) + 0.75 * Math.log(1.5), 6);
  });

  it('is kept by file, mode and backend; what is damaged was never measured', async () => {
    const cacheDirectory = mkdtempSync(join(tmpdir(), 'rankgate-fidelity-'));
    try {
      const kept = { ...options, cacheDirectory: join(cacheDirectory, 'new') };
      const fidelity = { kl: 0.5, tokens: 3, description: 'x' };
      expect(keptFidelity(kept)).toBeNull();
      await keepFidelity(kept, fidelity);
      expect(keptFidelity(kept)).toEqual(fidelity);
      expect(keptFidelity({ ...kept, mode: 'fast' })).toBeNull();
      expect(keptFidelity({ ...kept, modelHash: '0' })).toBeNull();
      await keepFidelity(kept, { ...fidelity, tokens: 0 });
      expect(keptFidelity(kept)).toBeNull();
      writeFileSync(join(cacheDirectory, 'file'), '');
      const nowhere = { ...kept, cacheDirectory: join(cacheDirectory, 'file') };
      await expect(keepFidelity(nowhere, fidelity)).rejects.toThrow();
    } finally {
      rmSync(cacheDirectory, { recursive: true });
    }
  });
});
