import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { expect, it } from 'vitest';
import { numbersOf, weightName } from '../../../src/adapters/extract.ts';
import { createRandom } from '../../../src/adapters/families/seeded-random.ts';
import { packNative } from '../../../src/adapters/native-import.ts';
import { generationOf, openPacked } from '../../../src/adapters/pack.ts';
import { projectionShape, projections } from '../../../src/model/decoder-config.ts';
import { openGguf } from '../../../src/model/gguf.ts';
import { openDecoder } from '../../../src/model/open-decoder.ts';
import { type SafetensorsTensor, writeSafetensors } from '../../../src/model/safetensors.ts';
import type { Stepper } from '../../../src/model/stepper.ts';
import { normalColumns } from '../../support/family-site.ts';
import { logitsPerToken } from '../../support/generate.ts';
import { rewriteWeights } from '../../support/gguf-rewrite.ts';
import { writeAdapter } from '../../support/load-adapter.ts';
import { tinyPath } from '../../support/open-test-decoder.ts';
import { tinyBase } from '../../support/tiny-base.ts';

// Hydra's two branches beside the base, and the base into which they were merged by the publication's formula,
// W' = (I + s·B_s·A_s)·W0 + s·B_p·A_p: one model (algorithms.md section 20).

const [rank, alpha] = [4, 2];
const ids = [294, 71, 293, 275, 72, 261];

async function openAt(modelPath: string): Promise<Stepper & Disposable> {
  const { decoder } = await openDecoder({
    ...{ modelPath, modelHash: 'test', mode: 'exact', backend: 'ggml', threads: 1 },
    ...{ cacheDirectory: null, cells: 256, pages: 3, tokensMax: 32, segmentsMax: 4 },
  });
  return decoder;
}

const flat = (rows: readonly Float32Array[]): number[] => rows.flatMap((row) => [...row]);
const worst = (x: readonly number[], y: readonly number[]): number =>
  Math.max(...x.map((value, i) => Math.abs(value - y[i]!)));

it('hydra served in two branches has the logits of the base that it is merged into, to 1e-4', async () => {
  using file = openGguf(tinyPath);
  const random = createRandom(20n);
  const tensors = new Map<string, SafetensorsTensor>();
  const merged = new Map<string, Float32Array>();
  for (const block of [0, 1]) {
    for (const projection of projections) {
      const module = { block, projection };
      const { in: width, out } = projectionShape(tinyBase.config, projection);
      const draw = (length: number, size: number) =>
        normalColumns(random, rank, length, size / Math.sqrt(length)).data.map(Math.fround);
      const [ap, bp, as, bs] = [draw(width, 1), draw(out, 0.04), draw(out, 1), draw(out, 0.04)];
      for (const [name, length, values] of [
        ['parallel.a', width, ap],
        ['parallel.b', out, bp],
        ['sequential.a', out, as],
        ['sequential.b', out, bs],
      ] as const) {
        const data = new Uint8Array(Float32Array.from(values!).buffer);
        const shape = [rank, length];
        tensors.set(`blk.${block}.${projection}.${name}`, { dtype: 'F32', shape, data });
      }
      const w0 = numbersOf(file, weightName(module)); // [out, in]
      const whole = Float64Array.from(w0);
      const s = alpha / rank;
      for (let r = 0; r < rank; r++) {
        const looked = new Float64Array(width); // row r of A_s·W0
        for (let o = 0; o < out; o++)
          for (let i = 0; i < width; i++) looked[i]! += as![r * out + o]! * w0[o * width + i]!;
        for (let o = 0; o < out; o++)
          for (let i = 0; i < width; i++)
            whole[o * width + i]! +=
              s * (bp![r * out + o]! * ap![r * width + i]! + bs![r * out + o]! * looked[i]!);
      }
      merged.set(weightName(module), Float32Array.from(whole));
    }
  }
  const { bytes, manifest } = await packNative({
    config: JSON.stringify({ kind: 'hydra', rank, alpha }),
    weights: writeSafetensors(tensors),
    base: tinyBase,
    baseFile: file,
    levels: 'uniform',
    findBasis: () => Promise.resolve(null),
    storeShared: () => Promise.reject(new Error('hydra needs no other file')),
  });
  expect(manifest).toMatchObject({ kind: 'hydra', rankMax: 2 * rank });
  const folder = mkdtempSync(join(tmpdir(), 'rankgate-hydra-'));
  try {
    const path = join(folder, 'merged.gguf');
    writeFileSync(
      path,
      rewriteWeights(tinyPath, (name) => merged.get(name) ?? null),
    );
    using base = await openAt(tinyPath);
    using whole = await openAt(path);
    const plain = flat(logitsPerToken(base, ids, null));
    const rows = writeAdapter(base, openPacked(bytes, generationOf(bytes)), 1)(2 * rank);
    const wanted = flat(logitsPerToken(whole, ids, null));
    expect(worst(flat(logitsPerToken(base, ids, rows)), wanted)).toBeLessThan(1e-4);
    expect(worst(plain, wanted)).toBeGreaterThan(1e-2);
  } finally {
    rmSync(folder, { recursive: true });
  }
});
