// The kernel suite on one of the packages that the tfjs backend runs on, and what only that backend promises: no tensor is
// left behind; and the tiny model on it, adapters and all. One package a test file: TensorFlow.js is one engine a process.

import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { describe, expect, it } from 'vitest';
import { GatewayError } from '../../src/errors.ts';
import type { Kernels, Ops, StoredTensor, Tensor } from '../../src/kernels/kernels.ts';
import { ReferenceKernels } from '../../src/kernels/reference-kernels.ts';
import type { TensorFlowPackage } from '../../src/kernels/tfjs/tensorflow.ts';
import { TfjsKernels } from '../../src/kernels/tfjs/tfjs-kernels.ts';
import { Decoder } from '../../src/model/decoder.ts';
import { readDecoderConfig } from '../../src/model/decoder-config.ts';
import { openGguf } from '../../src/model/gguf.ts';
import type { Stepper } from '../../src/model/stepper.ts';
import { loadWeights } from '../../src/model/weights.ts';
import { generateGreedy } from '../support/generate.ts';
import { packDirectory, writeAdapter } from '../support/load-adapter.ts';
import { tinyPath } from '../support/open-test-decoder.ts';
import { createRng, normals } from '../support/random.ts';
import { loadForTest, whyNoTensorflow } from '../support/tensorflow.ts';
import { kernelSuite } from './kernels.suite.ts';
import { trainingSuite } from './training.suite.ts';

const [rows, cells, width, pages] = [6, 300, 32, 9];
const goldenFolder = join(import.meta.dirname, '../golden');
const adapterNames = ['plain-r4', 'patterns-r16', 'qv-r8'] as const;

/** One of everything that stores, caches or writes: where a tensor could be left behind. */
function buildStep(
  ops: Ops,
  stored: Readonly<Record<string, StoredTensor>>,
): Record<string, Tensor> {
  const x = ops.embed(stored.w!, ops.input('ids', 'i32', [rows]));
  const at = ops.input('at', 'i32', [rows]);
  const cell = ops.input('cell', 'i64', [rows]);
  const page = ops.input('page', 'i32', [rows, 2]);
  const turned = ops.rope(ops.reshape(x, [rows, 2, 16]), at, {
    size: 16,
    base: 10_000,
    style: 'neox',
  });
  ops.writeCells(stored.k!, ops.reshape(turned, [rows, width]), cell);
  ops.writeCells(stored.v!, x, cell);
  const seen = ops.attend(turned, stored.k!, stored.v!);
  const gate = ops.slice(ops.input('gate', 'f32', [2, rows, 16]), 1);
  const uses = ops.input('uses', 'i32', [rows]);
  const [h] = ops.shrink(seen, page, [{ a: stored.a!, gate }], uses);
  const [kept] = ops.routeRanks(seen, [h!], {
    uses,
    groups: ops.input('groups', 'i32', [rows, 2]),
    temperatures: ops.input('temperatures', 'f32', [rows, 2]),
    biases: [gate],
  });
  const router = { query: stored.query!, summary: stored.summary!, context: stored.query! };
  const shares = ops.routeAtoms(kept!, [h!], router, {
    uses,
    keys: ops.input('keys', 'f32', [rows, 2, 8]),
    bias: ops.input('bias', 'f32', [rows, 2]),
    topK: ops.input('topK', 'i32', [rows]),
  });
  const mixed = ops.mixRanks(kept!, stored.atoms!, shares);
  const [y] = ops.expand(page, [{ y: ops.linear(seen, stored.w!), h: mixed, b: stored.b! }]);
  return { y: ops.add(y!, ops.linear(ops.rmsNorm(x, stored.norm!, 1e-5), stored.w!)) };
}

function storeAll(kernels: Kernels): Record<string, StoredTensor> {
  const rng = createRng(5);
  const write = (tensor: StoredTensor, from = 0): StoredTensor => {
    const numbers = normals(rng, (tensor.bytes - from) / 4, 0.1);
    kernels.write(tensor, new Uint8Array(numbers.buffer), from);
    return tensor;
  };
  const pool = { dtype: 'f32', width } as const;
  const [a, b] = kernels.storePages(pages, [
    { use: 'shrink', ...pool },
    { use: 'expand', ...pool },
  ]) as [StoredTensor, StoredTensor];
  const pageBytes = 8 * width * 4;
  return {
    w: write(kernels.store('f32', [width, width])),
    norm: write(kernels.store('f32', [width])),
    k: kernels.store('f16', [cells, width], 'undefined'),
    v: kernels.store('f16', [cells, width], 'undefined'),
    a: write(a, pageBytes),
    b: write(b, pageBytes),
    query: write(kernels.store('f32', [8, 12])),
    summary: write(kernels.store('f32', [12, 12])),
    atoms: write(kernels.store('f32', [2, 12, 12])),
  };
}

function runOften(kernels: Kernels, count: () => number): { before: number; after: number } {
  const stored = storeAll(kernels);
  using program = kernels.compile((ops) => buildStep(ops, stored), { segments: 2 });
  const rng = createRng(6);
  const out = new Float32Array(rows * width);
  program.write(
    'groups',
    Int32Array.from({ length: rows * 2 }, (_, i) => i % 4),
  ); // k of a page
  program.write(
    'temperatures',
    Float32Array.from({ length: rows * 2 }, (_, i) => i % 2),
  );
  program.write('keys', normals(rng, rows * 2 * 8));
  program.write('bias', normals(rng, rows * 2));
  program.write(
    'topK',
    Int32Array.from({ length: rows }, (_, i) => i % 3),
  );
  const step = (i: number): void => {
    const base = (i * 7) % (cells - 40);
    program.write(
      'ids',
      Int32Array.from({ length: rows }, () => rng.below(width)),
    );
    program.write(
      'at',
      Int32Array.from({ length: rows }, (_, row) => row),
    );
    program.write(
      'cell',
      BigInt64Array.from({ length: rows }, (_, row) => BigInt(base + row)),
    );
    program.write(
      'page',
      Int32Array.from({ length: rows * 2 }, () => rng.below(pages)),
    );
    program.write('gate', normals(rng, 2 * rows * 16));
    program.write(
      'uses',
      Int32Array.from({ length: rows }, () => rng.below(rows)),
    );
    program.run([
      { rowStart: 0, rowCount: 2, cellBase: base, cells: 2 + (i % 30) },
      { rowStart: 2, rowCount: 1, cellBase: base, cells: 1 + (i % 30) },
    ]);
    program.read('y', 0, out);
    expect(out.slice(0, 3 * width).every(Number.isFinite)).toBe(true);
  };
  // Every part of the caches and both layouts of the weight exist after a round over the cells.
  for (let i = 0; i < cells; i++) step(i);
  const before = count();
  for (let i = 0; i < 1000; i++) step(i);
  return { before, after: count() };
}

function openTinyOver(kernels: Kernels): Decoder {
  using file = openGguf(tinyPath);
  const config = readDecoderConfig(file);
  const weights = loadWeights(file, config, { kernels, mode: 'exact', cache: null });
  const memory = { cells: 600, cellType: 'f32', pages: 20, pageType: 'f16' } as const;
  return new Decoder({ config, weights, kernels, ...memory, tokensMax: 64, segmentsMax: 8 });
}

/** Logits of a prefill and of a decode step of rows under different adapters, ranks and none. */
function mixedLogits(stepper: Stepper): Float32Array[] {
  let page = 1;
  const adapters = adapterNames.map((name) => {
    const packed = packDirectory(join(goldenFolder, 'adapters', name), stepper.config);
    const at = writeAdapter(stepper, packed, page);
    page += packed.pages;
    return at;
  });
  const rankOf = [adapters[0]!(4), null, adapters[1]!(16), adapters[1]!(1), adapters[2]!(3)];
  const step = (position: number, tokens: readonly number[]): Float32Array[] => {
    const segments = rankOf.map((adapter, run) => ({
      tokens: Int32Array.from(tokens),
      cellBase: 50 + 64 * run,
      position,
      adapter,
      wantsLogits: true,
    }));
    const result = stepper.step(segments);
    return segments.map((_, i) => result.logits(i).slice());
  };
  return [...step(0, [5, 80, 21, 300]), ...step(4, [42])];
}

function largestDifference(a: Float32Array, b: Float32Array): number {
  return a.reduce((worst, value, i) => Math.max(worst, Math.abs(value - b[i]!)), 0);
}

export function tfjsSuite(name: TensorFlowPackage): void {
  const missing = whyNoTensorflow(name);
  if (missing !== null) {
    describe(name, () => {
      it.skip(`computes what the reference computes (skipped: ${missing})`, () => undefined);
    });
    return;
  }
  describe(name, async () => {
    const loaded = await loadForTest(name);
    const { tf } = loaded;
    const create = (): Kernels => new TfjsKernels(loaded);
    kernelSuite(loaded.description, create);
    trainingSuite(loaded.description, create);

    it('the tiny model continues every prompt as transformers does', () => {
      using decoder = openTinyOver(create());
      const text = readFileSync(join(goldenFolder, 'tiny/greedy.json'), 'utf8');
      const { runs } = JSON.parse(text) as { runs: Array<{ ids: number[]; greedy: number[] }> };
      for (const { ids, greedy } of runs) {
        expect(generateGreedy(decoder, ids, { count: greedy.length })).toEqual(greedy);
      }
    });

    it('the tiny model under a batch of adapters gives the logits of the reference', () => {
      using decoder = openTinyOver(create());
      using reference = openTinyOver(new ReferenceKernels());
      const [got, wanted] = [mixedLogits(decoder), mixedLogits(reference)];
      got.forEach((row, i) => {
        expect(largestDifference(row, wanted[i]!), `row ${i}`).toBeLessThan(1e-4);
      });
      // The bar can be missed: rows that differ in the adapter or the rank only are far apart.
      expect(largestDifference(wanted[0]!, wanted[2]!)).toBeGreaterThan(0.01);
      expect(largestDifference(wanted[2]!, wanted[3]!)).toBeGreaterThan(0.01);
    });

    it('says what computes', () => {
      using kernels = create();
      expect(kernels.description).toMatch(new RegExp(`^${name} \\d+\\.\\d+\\.\\d+, .*, f32$`));
    });

    it('a thousand runs leave as many tensors as there were, and disposing leaves none', () => {
      const empty = tf.memory().numTensors;
      {
        using kernels = create();
        const { before, after } = runOften(kernels, () => tf.memory().numTensors);
        expect(before).toBeGreaterThan(empty);
        expect(after).toBe(before);
      }
      expect(tf.memory().numTensors).toBe(empty);
    });

    it('a run that fails half way leaves no tensor more when it fails again', () => {
      const empty = tf.memory().numTensors;
      {
        using kernels = create();
        const stored = storeAll(kernels);
        using program = kernels.compile((ops) => buildStep(ops, stored), { segments: 1 });
        for (const input of ['ids', 'at']) program.write(input, new Int32Array(rows));
        program.write('cell', new BigInt64Array(rows));
        program.write('page', new Int32Array(rows * 2));
        const fail = (): number => {
          // The gates were never written, which comes out after the cells have been.
          expect(() => program.run([])).toThrow(GatewayError);
          return tf.memory().numTensors;
        };
        expect(fail()).toBe(fail());
      }
      expect(tf.memory().numTensors).toBe(empty);
    });
  });
}
