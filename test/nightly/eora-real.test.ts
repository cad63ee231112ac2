import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, describe, expect, it } from 'vitest';
import { generationOf, openPacked, type PackedAdapter } from '../../src/adapters/pack.ts';
import { makeCompensation } from '../../src/make-adapter.ts';
import { openGguf } from '../../src/model/gguf.ts';
import { openDecoder } from '../../src/model/open-decoder.ts';
import { createTokenizer, readTokenizerSource } from '../../src/model/tokenizer.ts';
import { baseModelPath } from '../support/base-model.ts';
import { rewriteWeights, roundedTo } from '../support/gguf-rewrite.ts';
import { heldOutLoss, windowsOf } from '../support/held-out-loss.ts';
import { writeAdapter } from '../support/load-adapter.ts';

// The real model with its projections rounded to 3 bits, repaired by EoRA at rank 32 from the first half of a text, and
// measured on the other half: the gap to the model as it came must shrink.

const folder = mkdtempSync(join(tmpdir(), 'rankgate-eora-'));
afterAll(() => rmSync(folder, { recursive: true }));

const text = readFileSync(join(import.meta.dirname, '../../bench/fidelity-text.txt'), 'utf8');
const half = text.indexOf('\n', text.length / 2);
const rank = 32;

async function lossOf(
  modelPath: string,
  repair: { readonly packed: PackedAdapter; readonly ranks: readonly number[] } | null,
): Promise<number[]> {
  using file = openGguf(modelPath);
  const tokenizer = createTokenizer(readTokenizerSource(file.metadata));
  const windows = windowsOf(tokenizer.encodeText(text.slice(half), 10 ** 5), 14, 128);
  const { decoder } = await openDecoder({
    ...{ modelPath, modelHash: 'test', mode: 'faithful', backend: 'ggml', threads: 1 },
    ...{ cacheDirectory: null, cells: 512, pages: 5, tokensMax: 128, segmentsMax: 128 },
  });
  using stepper = decoder;
  if (repair === null) return [heldOutLoss(stepper, windows, null)];
  const rows = writeAdapter(stepper, repair.packed, 1);
  return repair.ranks.map((k) => heldOutLoss(stepper, windows, rows(k)));
}

describe('EoRA on the real model in 3 bits', () => {
  it('closes part of the gap in held-out loss, more with more ranks', {
    timeout: 3_600_000,
  }, async () => {
    const referencePath = await baseModelPath();
    const basePath = join(folder, 'coarse.gguf');
    const isProjection = (name: string): boolean =>
      /^blk\.\d+\.(attn_(q|k|v|output)|ffn_(gate|up|down))\./.test(name);
    writeFileSync(
      basePath,
      rewriteWeights(referencePath, (name, values) =>
        isProjection(name) ? roundedTo(3, values) : null,
      ),
    );
    const calibrationPath = join(folder, 'calibration.txt');
    writeFileSync(calibrationPath, text.slice(0, half));
    const started = process.cpuUsage();
    const { manifest, directory } = await makeCompensation({
      ...{ basePath, referencePath, calibrationPath, output: join(folder, 'repair') },
      ...{ levels: 'uniform', rank, seed: 0, threads: 1, onModule: () => {} },
    });
    const { user, system } = process.cpuUsage(started);
    const bytes = readFileSync(join(directory, 'adapter_model.safetensors'));
    const packed = openPacked(bytes, generationOf(bytes));
    expect(manifest.modules).toHaveLength(210);
    const [reference] = await lossOf(referencePath, null);
    const [coarse] = await lossOf(basePath, null);
    const [r8, r32] = await lossOf(basePath, { packed, ranks: [8, rank] });
    const closed = (loss: number): string =>
      `${((100 * (coarse! - loss)) / (coarse! - reference!)).toFixed(1)} % of the gap`;
    console.log(
      `held-out loss: as it came ${reference!.toFixed(4)}, 3 bits ${coarse!.toFixed(4)}, ` +
        `EoRA rank 8 ${r8!.toFixed(4)} (${closed(r8!)}), rank ${rank} ${r32!.toFixed(4)} (${closed(r32!)}); ` +
        `${((user + system) / 1e6).toFixed(0)} s of CPU to make it`,
    );
    expect(coarse!).toBeGreaterThan(reference! + 0.05); // there is a gap to close
    expect(r8!).toBeLessThan(coarse!);
    expect(r32!).toBeLessThan(r8!);
    expect(coarse! - r32!).toBeGreaterThan(0.2 * (coarse! - reference!));
  });
});
