import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, describe, expect, it } from 'vitest';
import {
  changedOutsideModules,
  type ExtractTarget,
  extractModules,
  weightChange,
} from '../../../src/adapters/extract.ts';
import { generationOf, openPacked, type PackedAdapter } from '../../../src/adapters/pack.ts';
import { packPairs } from '../../../src/adapters/pack-pairs.ts';
import { type GgufFile, openGguf } from '../../../src/model/gguf.ts';
import { openDecoder } from '../../../src/model/open-decoder.ts';
import { scrapCells } from '../../../src/model/step-inputs.ts';
import { logitsPerToken } from '../../support/generate.ts';
import { rewriteWeights } from '../../support/gguf-rewrite.ts';
import { writeAdapter } from '../../support/load-adapter.ts';
import { openTiny, tinyPath } from '../../support/open-test-decoder.ts';
import { createRng } from '../../support/random.ts';

const folder = mkdtempSync(join(tmpdir(), 'rankgate-extract-'));
afterAll(() => rmSync(folder, { recursive: true }));

/** The tiny model with every projection of `blocks` moved at random: not by a matrix of low rank. */
function fineTuned(name: string, changes: (tensor: string) => boolean): string {
  const path = join(folder, name);
  const rng = createRng(31);
  const bytes = rewriteWeights(tinyPath, (tensor, values) =>
    changes(tensor) ? values.map((value) => value + 0.01 * rng.normal()) : null,
  );
  writeFileSync(path, bytes);
  return path;
}

const isProjection = (name: string): boolean =>
  /\.(attn_(q|k|v|output)|ffn_)/.test(name) && !name.includes('norm');
const tunedPath = fineTuned('tuned.gguf', isProjection);

function withFiles<T>(path: string, work: (files: { from: GgufFile; base: GgufFile }) => T): T {
  using from = openGguf(path);
  using base = openGguf(tinyPath);
  return work({ from, base });
}

function extracted(path: string, target: ExtractTarget): PackedAdapter {
  const about = {
    kind: 'lora',
    describe: '',
    baseHash: 'ab'.repeat(32),
    levels: 'uniform',
  } as const;
  const source = { format: 'rankgate', by: 'extract', from: [] } as const;
  const { bytes } = withFiles(path, (files) =>
    packPairs(extractModules(files, target), { ...about, source }),
  );
  return openPacked(bytes, generationOf(bytes));
}

const ids = [294, 71, 293, 275, 72, 261, 223, 25];

describe('extract', () => {
  it("at full rank gives the fine-tune's logits", async () => {
    const tuned = await openDecoder({
      ...{ modelPath: tunedPath, modelHash: 'tuned', mode: 'exact', backend: 'ggml', threads: 1 },
      ...{ cacheDirectory: null, cells: 256, pages: 1, tokensMax: 32, segmentsMax: 4 },
    });
    using reference = tuned.decoder;
    const { decoder } = await openTiny({ pages: 9 });
    using stepper = decoder;
    const packed = extracted(tunedPath, { rank: 64 });
    expect(packed.manifest.rankMax).toBe(64);
    const wanted = logitsPerToken(reference, ids);
    const got = logitsPerToken(stepper, ids, writeAdapter(stepper, packed, 1)(64));
    const base = logitsPerToken(stepper, ids);
    const worst = (rows: readonly Float32Array[]): number =>
      Math.max(...rows.flatMap((row, t) => [...row.map((x, i) => Math.abs(x - wanted[t]![i]!))]));
    expect(worst(base)).toBeGreaterThan(0.1); // the fine-tune is another model
    expect(worst(got)).toBeLessThan(1e-3);
  });

  it('of full rank, rank 1 and rank 32 share a batch: each row is as it is alone, to 1e-4', async () => {
    const { decoder } = await openTiny({ pages: 14 });
    using stepper = decoder;
    let page = 1;
    const uses = [64, 1, 32].map((rank) => {
      const packed = extracted(tunedPath, { rank });
      const rows = writeAdapter(stepper, packed, page)(rank);
      page += packed.pages;
      return rows;
    });
    const segments = uses.map((adapter, run) => {
      const cells = { cellBase: scrapCells + 32 * run, position: 0 };
      return { tokens: Int32Array.from(ids), ...cells, adapter, wantsLogits: true };
    });
    const alone = segments.map((one) => stepper.step([one]).logits(0).slice());
    const batch = stepper.step(segments);
    const worst = (x: Float32Array, y: Float32Array): number =>
      x.reduce((most, value, i) => Math.max(most, Math.abs(value - y[i]!)), 0);
    alone.forEach((logits, i) => {
      expect(worst(batch.logits(i), logits)).toBeLessThan(1e-4);
      expect(worst(logits, alone[(i + 1) % 3]!)).toBeGreaterThan(1e-2);
    });
  });

  it('at a lower rank misses the spectral tail', () => {
    withFiles(tunedPath, (files) => {
      for (const rank of [1, 7, 32]) {
        const whole = extractModules(files, { rank: 64 });
        for (const [i, { module, squeeze }] of extractModules(files, { rank }).entries()) {
          const change = weightChange(files, module);
          const { a, b } = squeeze();
          const { sigma } = whole[i]!.squeeze();
          const left = change.data.slice();
          for (let c = 0; c < change.columns; c++) {
            for (let r = 0; r < rank; r++) {
              const factor = a[r * change.columns + c]!;
              for (let o = 0; o < change.rows; o++) {
                left[c * change.rows + o]! -= factor * b[r * change.rows + o]!;
              }
            }
          }
          const error = Math.sqrt(left.reduce((sum, x) => sum + x * x, 0));
          const tail = Math.sqrt(sigma.slice(rank).reduce((sum, x) => sum + x * x, 0));
          expect(Math.abs(error - tail)).toBeLessThan(1e-6 * sigma[0]!);
          if (sigma.length > rank) expect(error / tail).toBeCloseTo(1, 6);
        }
      }
    });
  });

  it('by energy takes the fewest ranks of each module that hold it', () => {
    withFiles(tunedPath, (files) => {
      const whole = extractModules(files, { rank: 64 });
      for (const [i, { squeeze }] of extractModules(files, { energy: 0.9 }).entries()) {
        const energies = whole[i]!.squeeze().sigma.map((value) => value ** 2);
        const total = energies.reduce((sum, x) => sum + x, 0);
        const upTo = (k: number): number => energies.slice(0, k).reduce((sum, x) => sum + x, 0);
        const { rank } = squeeze();
        expect(upTo(rank)).toBeGreaterThanOrEqual(0.9 * total * (1 - 1e-9));
        expect(upTo(rank - 1)).toBeLessThan(0.9 * total);
      }
    });
  });

  it('has only the modules that were changed, and says what no adapter can change', () => {
    const path = fineTuned('partly.gguf', (name) =>
      ['blk.1.ffn_up.weight', 'blk.0.attn_norm.weight', 'output_norm.weight'].includes(name),
    );
    withFiles(path, (files) => {
      const modules = extractModules(files, { rank: 4 }).map(({ module }) => module);
      expect(modules).toEqual([{ block: 1, projection: 'ffn_up' }]);
      expect(changedOutsideModules(files)).toEqual([
        'output_norm.weight',
        'blk.0.attn_norm.weight',
      ]);
    });
  });

  it('of a model with itself has nothing to pack', () => {
    expect(() => extracted(tinyPath, { rank: 4 })).toThrow('no module would be changed');
  });
});
