import { existsSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { describe, expect, it } from 'vitest';
import { calibrate } from '../../src/adapters/calibration.ts';
import { generationOf, openPacked, type PackedAdapter } from '../../src/adapters/pack.ts';
import { type PairSource, packPairs, ranksAt } from '../../src/adapters/pack-pairs.ts';
import { readPeft } from '../../src/adapters/peft.ts';
import { squeezeModule } from '../../src/adapters/squeeze.ts';
import { createKernels } from '../../src/kernels/create-kernels.ts';
import { moduleIndex, readDecoderConfig } from '../../src/model/decoder-config.ts';
import { openGguf } from '../../src/model/gguf.ts';
import { openDecoder } from '../../src/model/open-decoder.ts';
import type { AdapterRows } from '../../src/model/stepper.ts';
import { createTokenizer, readTokenizerSource } from '../../src/model/tokenizer.ts';
import { loadWeights } from '../../src/model/weights.ts';
import { baseModelPath } from '../support/base-model.ts';
import { heldOutLoss, windowsOf } from '../support/held-out-loss.ts';
import { writeAdapter } from '../support/load-adapter.ts';

// A LoRA that PEFT trained on Python's docstrings (test/oracle/peft-train.py), on docstrings that it never saw: the loss at
// every level, against uniform ranks of the same bytes.

const directory = join(import.meta.dirname, '../../data/trained-adapter');
const isThere = existsSync(join(directory, 'adapter_model.safetensors'));
if (!isThere) {
  console.log(
    'levels-real: skipped, there is no trained adapter: venv/bin/python test/oracle/peft-train.py MODEL data/trained-adapter',
  );
}
const levels = [1, 2, 4, 8, 16];
const windowTokens = 128;
const windowCount = 24;
const calibrationTokens = 4096;

function read(name: string): string {
  return readFileSync(join(directory, name), 'utf8');
}

interface Sources {
  readonly plain: readonly PairSource[];
  readonly ordered: Iterable<PairSource>;
}

/** The adapter's modules, ordered by their weights and by their outputs on the training text. */
async function sourcesOf(modelPath: string): Promise<Sources> {
  using file = openGguf(modelPath);
  const config = readDecoderConfig(file);
  const adapter = readPeft({
    config: read('adapter_config.json'),
    weights: readFileSync(join(directory, 'adapter_model.safetensors')),
    base: { config, hash: 'ab'.repeat(32), names: ['SmolLM2-135M-Instruct'] },
    acceptBaseName: null,
  });
  const plain = adapter.modules.map((module) => ({
    module,
    squeeze: () => squeezeModule(adapter.read(module)),
  }));
  using kernels = await createKernels('ggml', { threads: 1, f32Activations: true });
  const weights = loadWeights(file, config, { kernels, mode: 'faithful', cache: null });
  const tokenizer = createTokenizer(readTokenizerSource(file.metadata));
  const tokens = tokenizer.encodeText(read('train.txt'), 10 ** 6).subarray(0, calibrationTokens);
  const ordered = [...calibrate({ config, weights, kernels, tokens })].flatMap(
    (covariances, block) =>
      adapter.modules
        .filter((module) => module.block === block)
        .map((module) => {
          const squeezed = squeezeModule(adapter.read(module), {
            covariance: covariances[module.projection],
          });
          return { module, squeeze: () => squeezed };
        }),
  );
  return { plain, ordered };
}

function packed(modules: Iterable<PairSource>, rule: 'energy' | 'uniform'): PackedAdapter {
  const source = { format: 'rankgate', by: 'test', from: [] } as const;
  const about = { kind: 'lora', describe: '', baseHash: 'ab'.repeat(32), source } as const;
  const { bytes } = packPairs(modules, { ...about, levels: rule });
  return openPacked(bytes, generationOf(bytes));
}

function rowsAt({ manifest }: PackedAdapter, pages: readonly number[], level: number): AdapterRows {
  const gates = new Float32Array(manifest.modules.length * pages.length * 8);
  manifest.modules.forEach(({ block, projection }, i) => {
    const at = moduleIndex(block, projection) * pages.length * 8;
    gates.fill(1, at, at + ranksAt(manifest, i, level));
  });
  return { pages, rank: level, scale: 1, gates, routing: null, atoms: null };
}

describe.runIf(isThere)('levels of a trained adapter', () => {
  it('never lose more than uniform ranks of the same bytes', { timeout: 3_600_000 }, async () => {
    const modelPath = await baseModelPath();
    const { plain, ordered } = await sourcesOf(modelPath);
    const { decoder } = await openDecoder({
      ...{ modelPath, modelHash: 'test', mode: 'faithful', backend: 'ggml', threads: 1 },
      ...{ cacheDirectory: null, cells: 512, pages: 3, tokensMax: 128, segmentsMax: 128 },
    });
    using stepper = decoder;
    using file = openGguf(modelPath);
    const tokenizer = createTokenizer(readTokenizerSource(file.metadata));
    const held = tokenizer.encodeText(read('held-out.txt'), 10 ** 6);
    const windows = windowsOf(held, windowCount, windowTokens);
    const made = JSON.parse(read('made.json')) as {
      readonly held_loss_before: number;
      readonly held_loss_after: number;
    };
    const adapters = {
      uniform: packed(plain, 'uniform'),
      levels: packed(plain, 'energy'),
      'uniform, by output': packed(ordered, 'uniform'),
      'levels, by output': packed(ordered, 'energy'),
    };
    const losses: Record<string, number[]> = {};
    for (const [name, adapter] of Object.entries(adapters)) {
      writeAdapter(stepper, adapter, 1);
      losses[name] = levels.map((level) =>
        heldOutLoss(stepper, windows, rowsAt(adapter, [1, 2], level)),
      );
    }
    const base = heldOutLoss(stepper, windows, null);
    const table = Object.entries(losses).map(
      ([name, row]) => `${name.padEnd(20)} ${row.map((loss) => loss.toFixed(4)).join('  ')}`,
    );
    console.log(
      `held-out loss, base ${base.toFixed(4)}, levels ${levels.join(', ')}\n${table.join('\n')}`,
    );
    const curves = Object.entries(adapters).map(
      ([name, { manifest }]) =>
        `${name.padEnd(20)} ${levels.map((k) => manifest.rankCurve[k - 1]!.toFixed(4)).join('  ')}`,
    );
    console.log(`energy kept\n${curves.join('\n')}`);
    // The same numbers as torch's, to what pages in q8_0 move.
    expect(Math.abs(base - made.held_loss_before)).toBeLessThan(0.01);
    expect(Math.abs(losses.uniform!.at(-1)! - made.held_loss_after)).toBeLessThan(0.02);
    losses.levels!.forEach((loss, i) => {
      expect(loss).toBeLessThanOrEqual(losses.uniform![i]! + 0.005);
    });
  });
});
