import { mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { type BlockCovariances, calibrate } from '../../src/adapters/calibration.ts';
import { generationOf, openPacked, type PackedAdapter } from '../../src/adapters/pack.ts';
import { prefixOf, ranksAt } from '../../src/adapters/pack-pairs.ts';
import { packPeft } from '../../src/adapters/pack-peft.ts';
import { importPacked } from '../../src/adapters/packed-import.ts';
import { createKernels } from '../../src/kernels/create-kernels.ts';
import { readDecoderConfig } from '../../src/model/decoder-config.ts';
import { sha256OfFile } from '../../src/model/file-hash.ts';
import { openGguf } from '../../src/model/gguf.ts';
import { openDecoder } from '../../src/model/open-decoder.ts';
import { createTokenizer, readTokenizerSource } from '../../src/model/tokenizer.ts';
import { loadWeights } from '../../src/model/weights.ts';
import { logitsPerToken } from '../support/generate.ts';
import { buildTinyLlama } from '../support/gguf-builder.ts';
import { rewriteWeights, roundedTo } from '../support/gguf-rewrite.ts';
import { writeAdapter } from '../support/load-adapter.ts';
import { tinyPath } from '../support/open-test-decoder.ts';
import { createRng } from '../support/random.ts';
import { runAsScript } from '../support/run-command.ts';
import { goldenDirectory, tinyBase } from '../support/tiny-base.ts';

let folder: string;
let tuned: string;
let coarse: string;
let text: string;
beforeAll(() => {
  folder = mkdtempSync(join(tmpdir(), 'rankgate-make-'));
  const write = (name: string, bytes: Uint8Array | string): string => {
    writeFileSync(join(folder, name), bytes);
    return join(folder, name);
  };
  const rng = createRng(4);
  tuned = write(
    'tuned.gguf',
    rewriteWeights(tinyPath, (name, values) =>
      /\.attn_[qv]\./.test(name) ? values.map((value) => value + 0.01 * rng.normal()) : null,
    ),
  );
  // The base with its projections in 3 bits, vocabulary included: the tiny model itself is the reference.
  coarse = write(
    'coarse.gguf',
    rewriteWeights(tinyPath, (name, values) =>
      /blk.*\.(attn_(q|k|v|output)|ffn_(gate|up|down))\./.test(name) ? roundedTo(3, values) : null,
    ),
  );
  text = write('calib.txt', 'the quick brown fox jumps over the lazy dog; '.repeat(40));
});
afterAll(() => rmSync(folder, { recursive: true }));

async function rankgate(...args: string[]): Promise<{ code: number; out: string; err: string }> {
  const environment = { RANKGATE_DATA_DIR: join(folder, 'data') };
  const { exitCode: code, out, err } = await runAsScript(args, environment);
  return { code, out, err };
}

async function madeIn(directory: string, basePath: string): Promise<PackedAdapter> {
  expect(readdirSync(directory).sort()).toEqual(['adapter_model.safetensors', 'rankgate.json']);
  const weights = readFileSync(join(directory, 'adapter_model.safetensors'));
  const config = readFileSync(join(directory, 'rankgate.json'), 'utf8');
  const base = { ...tinyBase, hash: await sha256OfFile(basePath) };
  const { bytes } = importPacked(config, weights, base); // what `adapters add` does with it
  return openPacked(bytes, generationOf(bytes));
}

async function logitsOf(modelPath: string, packed: PackedAdapter | null): Promise<number[]> {
  const { decoder } = await openDecoder({
    ...{ modelPath, modelHash: 'test', mode: 'exact', backend: 'ggml', threads: 1 },
    ...{ cacheDirectory: null, cells: 256, pages: 9, tokensMax: 32, segmentsMax: 4 },
  });
  using stepper = decoder;
  const rows = packed && writeAdapter(stepper, packed, 1)(packed.manifest.rankMax);
  return logitsPerToken(stepper, [294, 71, 293, 275, 72, 261], rows).flatMap((row) => [...row]);
}

const rms = (x: readonly number[], y: readonly number[]): number =>
  Math.sqrt(x.reduce((sum, value, i) => sum + (value - y[i]!) ** 2, 0) / x.length);

describe('rankgate adapters extract', () => {
  it("makes an adapter that gives the fine-tune's logits, and says what each rank holds", async () => {
    const output = join(folder, 'extracted');
    const files = ['--from', tuned, '--base', tinyPath, '--output', output];
    const { code, out, err } = await rankgate(
      'adapters',
      'extract',
      ...files,
      '--rank',
      '64',
      '--json',
    );
    expect({ code, err }).toEqual({ code: 0, err: '' });
    const result = JSON.parse(out);
    expect(result).toMatchObject({ kind: 'lora', modules: 4, rank_max: 64, warnings: [] });
    expect(result.share).toBeCloseTo(1, 6);
    const ranks = result.ranks.map(({ rank }: { rank: number }) => rank);
    expect(ranks).toEqual([...ranks].sort((x, y) => x - y));
    const wanted = await logitsOf(tuned, null);
    expect(rms(await logitsOf(tinyPath, null), wanted)).toBeGreaterThan(0.01);
    expect(rms(await logitsOf(tinyPath, await madeIn(output, tinyPath)), wanted)).toBeLessThan(
      1e-3,
    );
  });

  it('says what is not in it, and does not overwrite', async () => {
    const output = join(folder, 'small');
    const args = ['adapters', 'extract', '--from', tuned, '--base', tinyPath, '--output', output];
    const { code, out, err } = await rankgate(...args, '--rank', '2');
    expect(code).toBe(0);
    expect(out).toMatch(
      /lora, 4 modules, rank \d+, 0\.0 MB\nit holds \d+\.\d % of what was changed: .*99 % is not in it/,
    );
    expect(err).toBe('block 1 of 2\nblock 2 of 2\n');
    const again = await rankgate(...args, '--rank', '2');
    expect(again.code).toBe(1);
    expect(again.err).toContain('cannot be written (EEXIST)');
  });

  it.each<[string, string[], string]>([
    ['no output', ['--from', 'x', '--base', 'y', '--rank', '4'], '--output is wanted'],
    ['no base', ['--from', 'x', '--output', 'o', '--rank', '4'], '--base is wanted'],
    ['no target', ['--from', 'x', '--base', 'y', '--output', 'o'], 'one of --rank and --energy'],
    [
      'two targets',
      ['--from', 'x', '--base', 'y', '--output', 'o', '--rank', '4', '--energy', '0.9'],
      'one of --rank and --energy',
    ],
    ['rank 257', ['--from', 'x', '--base', 'y', '--output', 'o', '--rank', '257'], 'up to 256'],
    ['rank 0', ['--from', 'x', '--base', 'y', '--output', 'o', '--rank', '0'], 'at least 1'],
    ['energy 1.5', ['--from', 'x', '--base', 'y', '--output', 'o', '--energy', '1.5'], 'at most 1'],
    [
      'energy of words',
      ['--from', 'x', '--base', 'y', '--output', 'o', '--energy', 'all'],
      'not a number',
    ],
    [
      'other levels',
      ['--from', 'x', '--base', 'y', '--output', 'o', '--rank', '4', '--levels', 'odd'],
      'neither uniform nor energy',
    ],
  ])('with %s explains the usage', async (_, flags, message) => {
    const { code, err } = await rankgate('adapters', 'extract', ...flags);
    expect(code).toBe(2);
    expect(err).toContain(message);
  });
});

describe('rankgate adapters compensate', () => {
  it('makes a system adapter that brings a coarse base nearer to the reference', async () => {
    const output = join(folder, 'repair');
    const args = ['--model', coarse, '--reference', tinyPath, '--calib', text, '--output', output];
    const { code, out, err } = await rankgate(
      ...[
        'adapters',
        'compensate',
        ...args,
        '--method',
        'eora',
        '--rank',
        '16',
        '--threads',
        '1',
        '--json',
      ],
    );
    expect({ code, err }).toEqual({ code: 0, err: '' });
    expect(JSON.parse(out)).toMatchObject({ kind: 'eora', modules: 14, warnings: [] });
    const packed = await madeIn(output, coarse);
    expect(packed.manifest.source).toEqual({
      ...{ format: 'rankgate', from: [] },
      by: 'compensate by eora at rank 16, seed 0',
    });
    const wanted = await logitsOf(tinyPath, null);
    const before = rms(await logitsOf(coarse, null), wanted);
    const after = rms(await logitsOf(coarse, packed), wanted);
    expect(before).toBeGreaterThan(0.01);
    expect(after).toBeLessThan(0.7 * before);
  });

  it.each<[string, string[], number, string]>([
    ['another method', ['--method', 'svd'], 2, 'eora is there, svd is not'],
    ['no reference', ['--output', 'o', '--calib', 'x'], 2, '--reference is wanted'],
    [
      'a seed below 0',
      ['--output', 'o', '--reference', 'r', '--calib', 'x', '--seed', '-1'],
      2,
      '--seed',
    ],
  ])('with %s explains the usage', async (_, flags, exit, message) => {
    const { code, err } = await rankgate('adapters', 'compensate', ...flags);
    expect(code).toBe(exit);
    expect(err).toContain(message);
  });

  it('refuses a reference of another size', async () => {
    const output = join(folder, 'mismatch');
    const other = join(folder, 'other.gguf');
    writeFileSync(other, buildTinyLlama());
    const { code, err } = await rankgate(
      ...['adapters', 'compensate', '--model', coarse, '--reference', other, '--calib', text],
      ...['--output', output, '--threads', '1'],
    );
    expect(code).toBe(1);
    expect(err).toMatch(/is \d+, the base's is \d+/);
  });
});

describe('rankgate adapters squeeze with a text', () => {
  const from = goldenDirectory('patterns-r16');
  const accept = ['--accept-base-name', 'rankgate/tiny-random'];
  const squeeze = (output: string, ...more: string[]) =>
    rankgate(
      ...['adapters', 'squeeze', from, '--calib', text, '--output', output, '--model', tinyPath],
      ...['--threads', '1', '--json', ...accept, ...more],
    );

  /** C of the base's inputs on the text, by the slow backend, once. */
  let found: Promise<BlockCovariances[]> | null = null;
  async function covariancesOf(): Promise<BlockCovariances[]> {
    using file = openGguf(tinyPath);
    const config = readDecoderConfig(file);
    using kernels = await createKernels('reference', { threads: 1 });
    const weights = loadWeights(file, config, { kernels, mode: 'exact', cache: null });
    const tokens = createTokenizer(readTokenizerSource(file.metadata)).encodeText(
      readFileSync(text, 'utf8'),
      10_000,
    );
    return [...calibrate({ config, weights, kernels, tokens })];
  }

  /** The share of energy in outputs that a level has, of all modules: 1 - E|(BA - B'A')x|² / E|BAx|². */
  function keptOf(
    { packed, whole }: Readonly<Record<'packed' | 'whole', PackedAdapter>>,
    level: number,
    covariances: readonly BlockCovariances[],
  ): number {
    let [missed, all] = [0, 0];
    for (const [i, module] of whole.manifest.modules.entries()) {
      const { block, projection, in: width, out } = module;
      const c = covariances[block]![projection].data; // [in, in]
      const product = (adapter: PackedAdapter, ranks: number): Float64Array => {
        const w = new Float64Array(out * width);
        const { a, b } = prefixOf(adapter, module, ranks);
        for (let o = 0; o < out; o++)
          for (let r = 0; r < ranks; r++)
            for (let j = 0; j < width; j++)
              w[o * width + j]! += b[o * ranks + r]! * a[r * width + j]!;
        return w;
      };
      const energy = (w: Float64Array): number => {
        let sum = 0;
        for (let o = 0; o < out; o++)
          for (let j = 0; j < width; j++)
            for (let l = 0; l < width; l++)
              sum += w[o * width + j]! * c[j * width + l]! * w[o * width + l]!;
        return sum;
      };
      const full = product(whole, module.rank);
      const part = product(packed, ranksAt(packed.manifest, i, level));
      all += energy(full);
      missed += energy(full.map((value, at) => value - part[at]!));
    }
    return 1 - missed / all;
  }

  const plain = (levels: 'uniform' | 'energy'): PackedAdapter => {
    const config = readFileSync(join(from, 'adapter_config.json'), 'utf8');
    const weights = readFileSync(join(from, 'adapter_model.safetensors'));
    const { bytes } = packPeft(
      { config, weights, base: tinyBase, acceptBaseName: 'rankgate/tiny-random' },
      levels,
    );
    return openPacked(bytes, generationOf(bytes));
  };

  it.each(['uniform', 'energy'] as const)(
    'keeps at every level (%s) at least the output energy on that text that the order by weights keeps',
    async (levels) => {
      const output = join(folder, `ordered-${levels}`);
      const { code, out, err } = await squeeze(output, '--levels', levels);
      expect({ code, err }).toEqual({ code: 0, err: '' });
      expect(JSON.parse(out)).toMatchObject({ kind: 'lora', rank_max: 24, warnings: [] });
      const ordered = await madeIn(output, tinyPath);
      const other = plain(levels);
      found ??= covariancesOf();
      const covariances = await found;
      const gains: number[] = [];
      for (const level of [1, 2, 4, 8, 16, 24]) {
        const kept = keptOf({ packed: ordered, whole: other }, level, covariances);
        gains.push(kept - keptOf({ packed: other, whole: other }, level, covariances));
        // What the curve says is what outputs keep, up to the rounding of f16.
        expect(Math.abs(kept - ordered.manifest.rankCurve[level - 1]!)).toBeLessThan(2e-3);
      }
      for (const gain of gains) expect(gain).toBeGreaterThan(-1e-4); // f16
      expect(gains[0]).toBeGreaterThan(0.01);
    },
    60_000,
  );

  it('may keep fewer ranks', async () => {
    const output = join(folder, 'ordered-few');
    const { code, out } = await squeeze(output, '--rank', '3');
    expect(code).toBe(0);
    expect(JSON.parse(out)).toMatchObject({ rank_max: 3 });
    const few = await madeIn(output, tinyPath);
    expect(Math.max(...few.manifest.modules.map(({ rank }) => rank))).toBe(3);
    expect(few.manifest.source).toMatchObject({ by: 'squeeze by outputs to rank 3' });
  });

  it.each<[string, string[], number, string]>([
    ['two targets', ['--rank', '2', '--variance', '0.9'], 2, 'one of --rank and --variance'],
    ['a variance of 2', ['--variance', '2'], 2, 'at most 1'],
    ['a server', ['--url', 'http://localhost'], 2, '--url does not go with --calib'],
  ])('with %s explains the usage', async (_, more, exit, message) => {
    const { code, err } = await squeeze(join(folder, 'none'), ...more);
    expect(code).toBe(exit);
    expect(err).toContain(message);
  });

  it('by name takes nothing that goes with a text, and by text no other files than PEFT’s', async () => {
    const named = await rankgate('adapters', 'squeeze', 'support', '--rank', '2', '--output', 'x');
    expect(named).toMatchObject({ code: 2, err: expect.stringContaining('without --calib') });
    const made = join(folder, 'ordered-uniform');
    const again = await rankgate(
      ...['adapters', 'squeeze', made, '--calib', text, '--output', join(folder, 'again')],
      ...['--model', tinyPath, '--threads', '1'],
    );
    expect(again).toMatchObject({ code: 1, err: expect.stringContaining('as PEFT writes it') });
  });
});
