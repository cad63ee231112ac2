import { readFileSync } from 'node:fs';
import { describe, expect, it } from 'vitest';
import { inputMoments } from '../../../src/adapters/calibration.ts';
import { innerProducts } from '../../../src/adapters/orthogonal.ts';
import { GgmlKernels } from '../../../src/kernels/ggml/ggml-kernels.ts';
import {
  type Projection,
  projections,
  readDecoderConfig,
} from '../../../src/model/decoder-config.ts';
import { openGguf } from '../../../src/model/gguf.ts';
import { loadWeights } from '../../../src/model/weights.ts';
import { type EvaModule, evaModules, sharedOut } from '../../../src/trainer/eva.ts';
import { tinyPath } from '../../support/open-test-decoder.ts';

// algorithms.md section 15, against PEFT's own EVA on the same batch (test/oracle/eva.py).

interface Golden {
  readonly rank: number;
  readonly rho: number;
  readonly windowRows: number;
  readonly tokens: readonly number[];
  readonly learnt: readonly number[];
  readonly modules: Readonly<Record<string, { rank: number; a: string; scale: number | null }>>;
}

const golden = JSON.parse(
  readFileSync(new URL('../../golden/trainer/eva.json', import.meta.url), 'utf8'),
) as Golden;

function made(targets: readonly Projection[], rank = golden.rank, rho = golden.rho): EvaModule[] {
  using file = openGguf(tinyPath);
  const config = readDecoderConfig(file);
  using kernels = new GgmlKernels({ threads: 1 });
  const weights = loadWeights(file, config, { kernels, mode: 'exact', cache: null });
  const moments = inputMoments({
    config,
    weights,
    kernels,
    tokens: Int32Array.from(golden.tokens),
    windowRows: golden.windowRows,
    learnt: Uint8Array.from(golden.learnt),
  });
  return evaModules(moments, { rank, rho, targets });
}

const modules = made(projections);
const find = (block: number, projection: Projection): EvaModule =>
  modules.find((module) => module.block === block && module.projection === projection)!;

describe('eva', () => {
  it("has PEFT's rank in every module, and its directions", () => {
    expect(modules.length).toBe(14);
    let compared = 0;
    for (const { block, projection, a } of modules) {
      const name = `${block}.${projection}`;
      const theirs = golden.modules[name]!;
      expect(a.columns, name).toBe(theirs.rank);
      const rows = new Float32Array(Uint8Array.from(Buffer.from(theirs.a, 'base64')).buffer);
      for (let r = 0; r < a.columns; r++) {
        let dot = 0;
        for (let i = 0; i < a.rows; i++) dot += a.data[r * a.rows + i]! * rows[r * a.rows + i]!;
        expect(Math.abs(dot), `${name}, direction ${r}`).toBeGreaterThan(0.99);
        compared += 1;
      }
      // alpha goes with the rank, so the scale stays: ours has one for all.
      if (theirs.scale !== null) expect(theirs.scale).toBeCloseTo(8 / golden.rank, 10);
    }
    expect(compared).toBe(14 * golden.rank);
  });

  it('gives directions of length 1 at right angles', () => {
    for (const { a } of modules) {
      innerProducts(a, a).data.forEach((value, i) => {
        const wanted = i % (a.columns + 1) === 0 ? 1 : 0;
        expect(Math.abs(value - wanted)).toBeLessThan(1e-9);
      });
    }
  });

  it('spends the budget to the last rank, no module has more than rho times its share', () => {
    for (const [rank, rho] of [
      [4, 2],
      [3, 1],
      [2, 8],
    ] as const) {
      const ranks = made(projections, rank, rho).map(({ a }) => a.columns);
      expect(ranks.reduce((sum, own) => sum + own, 0)).toBe(14 * rank);
      expect(Math.max(...ranks)).toBeLessThanOrEqual(rank * rho);
      if (rho === 1) expect(new Set(ranks)).toEqual(new Set([rank]));
      else expect(new Set(ranks).size).toBeGreaterThan(1);
    }
  });

  it('gives projections of one input the same directions', () => {
    for (const others of [
      ['attn_q', 'attn_k', 'attn_v'],
      ['ffn_gate', 'ffn_up'],
    ] as const) {
      const all = others.map((projection) => find(1, projection).a);
      for (const a of all) {
        const shorter = Math.min(a.data.length, all[0]!.data.length);
        expect(a.data.slice(0, shorter)).toEqual(all[0]!.data.slice(0, shorter));
      }
    }
  });

  it('adapts the targets only', () => {
    const two = made(['attn_v', 'ffn_down']);
    expect(two.map(({ block, projection }) => `${block}.${projection}`)).toEqual([
      '0.attn_v',
      '0.ffn_down',
      '1.attn_v',
      '1.ffn_down',
    ]);
    expect(two.reduce((sum, { a }) => sum + a.columns, 0)).toBe(4 * golden.rank);
  });

  it('shares ranks out by what they explain, of equals to the first', () => {
    const shares = [
      [0.5, 0.3, 0.1],
      [0.3, 0.2, 0.05],
      [0.9, 0.05, 0.01],
    ].map((own) => Float64Array.from(own));
    expect(sharedOut(shares, 3)).toEqual([2, 0, 1]);
    expect(sharedOut(shares, 4)).toEqual([2, 1, 1]);
    expect(sharedOut(shares, 9)).toEqual([3, 3, 3]);
    expect(sharedOut(shares, 0)).toEqual([0, 0, 0]);
  });
});
