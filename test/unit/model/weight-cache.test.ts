import {
  mkdtempSync,
  readdirSync,
  readFileSync,
  rmSync,
  truncateSync,
  writeFileSync,
} from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { openDecoder } from '../../../src/model/open-decoder.ts';
import { scrapCells } from '../../../src/model/step-inputs.ts';
import { openWeightCache } from '../../../src/model/weight-cache.ts';
import { baseModelPath } from '../../support/base-model.ts';

let directory: string;
beforeEach(() => {
  directory = mkdtempSync(join(tmpdir(), 'rankgate-weights-'));
});
afterEach(() => rmSync(directory, { recursive: true, force: true }));

const a = Uint8Array.from({ length: 1000 }, (_, i) => i);
const b = Uint8Array.from({ length: 77 }, (_, i) => 255 - i);

function fill(): string {
  using cache = openWeightCache(directory, 'model');
  expect(cache.get('a', a.length)).toBeNull();
  cache.put('a', a);
  cache.put('b', b);
  cache.finish();
  return join(directory, 'model.weights');
}

describe('weight cache', () => {
  it('gives back what was put, in any order', () => {
    fill();
    using cache = openWeightCache(directory, 'model');
    expect(cache.get('b', b.length)).toEqual(Buffer.from(b));
    expect(cache.get('a', a.length)).toEqual(Buffer.from(a));
  });

  it('is not there until it is finished', () => {
    {
      using cache = openWeightCache(directory, 'model');
      cache.put('a', a);
    }
    expect(readdirSync(directory)).toEqual([]);
  });

  it('never gives a tensor whose bytes have changed, and is written anew after that', () => {
    const path = fill();
    const bytes = readFileSync(path);
    bytes[500] = bytes[500]! ^ 1;
    writeFileSync(path, bytes);
    {
      using cache = openWeightCache(directory, 'model');
      expect(cache.get('b', b.length)).toEqual(Buffer.from(b));
      expect(cache.get('a', a.length)).toBeNull();
    }
    fill();
    using again = openWeightCache(directory, 'model');
    expect(again.get('a', a.length)).toEqual(Buffer.from(a));
  });

  it('removes what a killed process left half written, of this model only', () => {
    const other = 'other.weights.7.tmp';
    for (const name of ['model.weights.7.tmp', other]) writeFileSync(join(directory, name), a);
    fill();
    expect(readdirSync(directory).sort()).toEqual(['model.weights', other]);
    writeFileSync(join(directory, 'model.weights.8.tmp'), a);
    openWeightCache(directory, 'model')[Symbol.dispose]();
    expect(readdirSync(directory).sort()).toEqual(['model.weights', other]);
  });

  it('writes nothing, and breaks nothing, when another process takes its file away', () => {
    const mine = openWeightCache(directory, 'model');
    mine.put('a', a);
    fill();
    mine.put('b', b);
    mine.finish();
    mine[Symbol.dispose]();
    using cache = openWeightCache(directory, 'model');
    expect(cache.get('a', a.length)).toEqual(Buffer.from(a));
  });

  it.each([0, 10, 900, 1077, 1100])('a file cut to %i bytes counts as none', (size) => {
    const path = fill();
    truncateSync(path, size);
    fill();
    using cache = openWeightCache(directory, 'model');
    expect(cache.get('a', a.length)).toEqual(Buffer.from(a));
  });

  it('refuses a tensor of another size or name', () => {
    fill();
    using cache = openWeightCache(directory, 'model');
    expect(cache.get('a', a.length - 1)).toBeNull();
    expect(cache.get('c', 4)).toBeNull();
  });

  it('the default model gives the same logits from its file, from the cache and from a damaged cache', async () => {
    const modelPath = await baseModelPath();
    const logits = async (): Promise<Float32Array> => {
      const { decoder } = await openDecoder({
        modelPath,
        modelHash: 'b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53',
        mode: 'faithful',
        backend: 'ggml',
        threads: 1,
        native: false, // bf16 is what a machine without a compiler computes with
        cacheDirectory: directory,
        cells: 64,
        pages: 1,
        tokensMax: 16,
        segmentsMax: 1,
      });
      using stepper = decoder;
      const tokens = Int32Array.of(504, 3575, 282);
      const segment = {
        tokens,
        cellBase: scrapCells,
        position: 0,
        adapter: null,
        wantsLogits: true,
      };
      return stepper.step([segment]).logits(0).slice();
    };
    const converted = await logits();
    const [name] = readdirSync(directory);
    expect(await logits()).toEqual(converted);
    const path = join(directory, name!);
    const bytes = readFileSync(path);
    bytes.fill(0, 1_000_000, 1_000_100);
    writeFileSync(path, bytes);
    expect(await logits()).toEqual(converted);
  });
});
