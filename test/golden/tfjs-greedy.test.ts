import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { describe, expect, it } from 'vitest';
import { generateGreedy } from '../support/generate.ts';
import { openBase } from '../support/open-test-decoder.ts';
import { quietTensorflow, tensorflowDirectory, whyNoTensorflow } from '../support/tensorflow.ts';

// The default model on real libtensorflow, found by name in the order that serving looks (the GPU package's code, here on
// the CPU library), against llama.cpp on the same weights as f32.

interface Prompt {
  readonly name: string;
  readonly promptIds: number[];
  readonly ids: number[];
}
const text = readFileSync(join(import.meta.dirname, 'llama-cpp/greedy-f32.json'), 'utf8');
const { prompts } = JSON.parse(text) as { prompts: readonly Prompt[] };
const missing = whyNoTensorflow('@tensorflow/tfjs-node-gpu');

describe('the default model on TensorFlow.js', () => {
  const title = 'greedy ids equal llama.cpp’s in f32';
  if (missing !== null) {
    it.skip(`${title} (skipped: ${missing})`, () => undefined);
    return;
  }
  quietTensorflow();
  it(title, async () => {
    const opened = await openBase({
      mode: 'faithful',
      backend: 'tfjs',
      libraryDirectory: tensorflowDirectory,
    });
    using decoder = opened.decoder;
    expect(opened.description).toMatch(/^@tensorflow\/tfjs-node-gpu .* libtensorflow .* exact$/);
    for (const name of ['chat-france', 'chat-sky']) {
      const { promptIds, ids } = prompts.find((prompt) => prompt.name === name)!;
      expect(ids.length).toBeGreaterThan(5);
      expect(generateGreedy(decoder, promptIds, { count: ids.length }), name).toEqual(ids);
    }
  }, 300_000);

  it('refuses the weights mode that is another backend’s kernels', async () => {
    const options = { mode: 'parity', backend: 'tfjs', libraryDirectory: tensorflowDirectory };
    await expect(openBase(options as Parameters<typeof openBase>[0])).rejects.toMatchObject({
      code: 'UNSUPPORTED',
    });
  });
});
