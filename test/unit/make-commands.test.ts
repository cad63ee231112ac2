import { mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { generationOf, openPacked, type PackedAdapter } from '../../src/adapters/pack.ts';
import { importPacked } from '../../src/adapters/packed-import.ts';
import { sha256OfFile } from '../../src/model/file-hash.ts';
import { openDecoder } from '../../src/model/open-decoder.ts';
import { logitsPerToken } from '../support/generate.ts';
import { buildTinyLlama } from '../support/gguf-builder.ts';
import { rewriteWeights, roundedTo } from '../support/gguf-rewrite.ts';
import { writeAdapter } from '../support/load-adapter.ts';
import { tinyPath } from '../support/open-test-decoder.ts';
import { createRng } from '../support/random.ts';
import { runAsScript } from '../support/run-command.ts';
import { tinyBase } from '../support/tiny-base.ts';

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
