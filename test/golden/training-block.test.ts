import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { describe, expect, it } from 'vitest';
import { elementCount } from '../../src/kernels/check.ts';
import { GgmlKernels } from '../../src/kernels/ggml/ggml-kernels.ts';
import type { Kernels, StoredTensor } from '../../src/kernels/kernels.ts';
import { ReferenceKernels } from '../../src/kernels/reference-kernels.ts';
import { TfjsKernels } from '../../src/kernels/tfjs/tfjs-kernels.ts';
import type { BlockWeights, DecoderWeights } from '../../src/model/decoder.ts';
import {
  type DecoderConfig,
  projectionShape,
  projections,
} from '../../src/model/decoder-config.ts';
import type { TrainingBatch } from '../../src/model/loss-graph.ts';
import { lowRankDelta, tensorName } from '../../src/model/trained-delta.ts';
import { TrainingDecoder } from '../../src/model/training-decoder.ts';
import { loadForTest, whyNoTensorflow } from '../support/tensorflow.ts';

// A one-block decoder with low-rank deltas against torch in f64 (test/oracle/torch-block.py): loss and every gradient.

interface Golden {
  readonly sizes: Readonly<
    Record<'E' | 'H' | 'Hkv' | 'D' | 'F' | 'V' | 'R' | 'eps' | 'base', number>
  >;
  readonly windows: ReadonlyArray<readonly number[]>;
  readonly tokens: readonly number[];
  readonly targets: readonly number[];
  readonly learnt: readonly number[];
  readonly gate: string;
  readonly weights: Readonly<Record<string, string>>;
  readonly factors: Readonly<Record<string, string>>;
  readonly loss: number;
  readonly gradients: Readonly<Record<string, string>>;
}

const golden = JSON.parse(
  readFileSync(join(import.meta.dirname, 'training/block.json'), 'utf8'),
) as Golden;
const { E, H, Hkv, D, F, V, R } = golden.sizes;
const windowRows = golden.windows[0]!.reduce((sum, rows) => sum + rows, 0);

const config: DecoderConfig = {
  family: 'llama',
  name: 'block',
  blocks: 1,
  width: E,
  heads: H,
  kvHeads: Hkv,
  headSize: D,
  ffnWidth: F,
  vocabSize: V,
  contextLength: 64,
  ropeSize: D,
  ropeBase: golden.sizes.base,
  ropeStyle: 'norm',
  normEps: golden.sizes.eps,
  tiedEmbeddings: false,
};

function unpack(text: string): Float32Array {
  return new Float32Array(Uint8Array.from(Buffer.from(text, 'base64')).buffer);
}

function load(kernels: Kernels): DecoderWeights {
  const put = (name: string, shape: readonly number[]): StoredTensor => {
    const stored = kernels.store('f32', shape);
    const numbers = unpack(golden.weights[name]!);
    expect(numbers.length).toBe(elementCount(shape));
    kernels.write(stored, new Uint8Array(numbers.buffer), 0);
    return stored;
  };
  const block = Object.fromEntries([
    ...projections.map((name) => {
      const shape = projectionShape(config, name);
      return [name, put(name, [shape.out, shape.in])] as const;
    }),
    ...(['attn_norm', 'ffn_norm'] as const).map((name) => [name, put(name, [E])] as const),
  ]) as BlockWeights;
  const [tokenEmbedding, output] = [put('token_embd', [V, E]), put('output', [V, E])];
  return { tokenEmbedding, output, outputNorm: put('output_norm', [E]), blocks: [block] };
}

function batch(): TrainingBatch {
  const lengths = golden.windows.flat();
  return {
    tokens: Int32Array.from(golden.tokens),
    sequences: Int32Array.from(lengths.flatMap((length, i) => Array(length).fill(i) as number[])),
    gate: unpack(golden.gate),
    answers: golden.learnt.map((row) => ({
      row,
      target: golden.targets[row]!,
      weight: 1 / golden.learnt.length,
    })),
  };
}

function open(kernels: Kernels, recompute: boolean): TrainingDecoder {
  const windows = golden.windows.length;
  const answersMax = golden.tokens.length;
  const delta = lowRankDelta(config, () => R);
  const sizes = { delta, windows, windowRows, answersMax, recompute };
  const decoder = new TrainingDecoder({ config, kernels, weights: load(kernels), ...sizes });
  for (const name of projections) {
    for (const factor of ['a', 'b'] as const) {
      const numbers = unpack(golden.factors[`${name}.${factor}`]!);
      decoder.write(tensorName({ block: 0, projection: name }, factor), numbers);
    }
  }
  return decoder;
}

const backends: Record<string, () => Kernels> = {
  reference: () => new ReferenceKernels(),
  ggml: () => new GgmlKernels({ threads: 1 }),
};
const missing = whyNoTensorflow('@tensorflow/tfjs-node');
if (missing === null) {
  const tensorflow = await loadForTest('@tensorflow/tfjs-node');
  backends.tfjs = () => new TfjsKernels(tensorflow);
}

describe('one block with low-rank deltas, as torch differentiates it', () => {
  for (const [backend, create] of Object.entries(backends)) {
    for (const recompute of [false, true]) {
      it(`${backend}, ${recompute ? 'values computed again' : 'values kept'}`, () => {
        using kernels = create();
        using decoder = open(kernels, recompute);
        const loss = decoder.step(batch());
        expect(Math.abs(loss - golden.loss)).toBeLessThan(1e-5);
        for (const name of projections) {
          for (const factor of ['a', 'b'] as const) {
            const wanted = unpack(golden.gradients[`${name}.${factor}`]!);
            const got = new Float32Array(wanted.length);
            decoder.read(tensorName({ block: 0, projection: name }, factor), got);
            const away = Math.hypot(...wanted.map((value, i) => value - got[i]!));
            expect(away / Math.hypot(...wanted), `${name}.${factor}`).toBeLessThan(1e-5);
          }
        }
        expect(decoder.step(batch())).toBe(loss); // a replay
      });
    }
  }

  if (missing !== null) it.skip(`tfjs (skipped: ${missing})`, () => undefined);

  it('every sequence, weight and rank of the batch counts', () => {
    using kernels = new ReferenceKernels();
    using decoder = open(kernels, false);
    const whole = batch();
    const loss = decoder.step(whole);
    const joined = whole.sequences.map((sequence) => Math.floor(sequence / 2));
    expect(Math.abs(decoder.step({ ...whole, sequences: joined }) - loss)).toBeGreaterThan(1e-3);
    const gate = whole.gate.map(() => 0.5);
    expect(Math.abs(decoder.step({ ...whole, gate }) - loss)).toBeGreaterThan(1e-3);
    const answers = whole.answers.slice(1);
    expect(Math.abs(decoder.step({ ...whole, answers }) - loss)).toBeGreaterThan(1e-3);
  });
});
