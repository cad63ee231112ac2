import { describe, expect, it } from 'vitest';
import { generationOf, openPacked, type PackedAdapter } from '../../../src/adapters/pack.ts';
import { prefixOf, ranksAt, squeezePacked } from '../../../src/adapters/pack-pairs.ts';
import { packPeft, unpackPeft } from '../../../src/adapters/pack-peft.ts';
import { readPeft } from '../../../src/adapters/peft.ts';
import type { LoraModule } from '../../../src/adapters/squeeze.ts';
import { goldenConfig, goldenWeights, tinyBase } from '../../support/tiny-base.ts';

const acceptBaseName = 'rankgate/tiny-random';

function packedGolden(name: string, levels: 'energy' | 'uniform'): PackedAdapter {
  const files = { config: goldenConfig(name), weights: goldenWeights(name) };
  const { bytes } = packPeft({ ...files, base: tinyBase, acceptBaseName }, levels);
  return openPacked(bytes, generationOf(bytes));
}

/** scale·B·A, [out, in]. */
function deltaOf({ rank, in: width, out, a, b, scale }: LoraModule): Float64Array {
  const delta = new Float64Array(out * width);
  for (let o = 0; o < out; o++) {
    for (let r = 0; r < rank; r++) {
      const factor = scale * b[o * rank + r]!;
      for (let i = 0; i < width; i++) delta[o * width + i]! += factor * a[r * width + i]!;
    }
  }
  return delta;
}

const norm = (x: Float64Array): number => Math.sqrt(x.reduce((sum, v) => sum + v * v, 0));
const distance = (x: Float64Array, y: Float64Array): number => norm(x.map((v, i) => v - y[i]!));

describe('an adapter packed with levels', () => {
  it.each(['plain-r4', 'patterns-r16', 'qv-r8'])(
    '%s: costs no more at any level, and keeps more',
    (name) => {
      const [uniform, levelled] = [packedGolden(name, 'uniform'), packedGolden(name, 'energy')];
      const { modules, rankMax, rankCurve } = levelled.manifest;
      expect(levelled.manifest.levels).toHaveLength(modules.length);
      const bytesAt = (packed: PackedAdapter, level: number): number =>
        modules.reduce(
          (sum, module, i) =>
            sum + 2 * (module.in + module.out) * ranksAt(packed.manifest, i, level),
          0,
        );
      for (let level = 1; level <= rankMax; level++) {
        expect(bytesAt(levelled, level)).toBeLessThanOrEqual(bytesAt(uniform, level));
        const other = uniform.manifest.rankCurve[level - 1]!;
        expect(rankCurve[level - 1]).toBeGreaterThanOrEqual(other - 1e-12);
      }
      expect(bytesAt(levelled, rankMax)).toBe(bytesAt(uniform, rankMax));
      // The pages are the same; a level only says which of their ranks are on.
      for (const module of modules)
        expect(levelled.page(module, 0)).toEqual(uniform.page(module, 0));
    },
  );

  it('is exported level by level: the ranks that are on, and modules without any left out', () => {
    const packed = packedGolden('patterns-r16', 'energy');
    const { manifest } = packed;
    const counts = new Set<number>();
    for (let level = 1; level <= manifest.rankMax; level++) {
      const files = unpackPeft(packed, level, tinyBase.config);
      const exported = readPeft({ ...files, base: tinyBase, acceptBaseName });
      expect(exported.warnings).toEqual([]);
      const on = manifest.modules.filter((_, i) => ranksAt(manifest, i, level) > 0);
      expect(exported.modules).toHaveLength(on.length);
      counts.add(on.length);
      for (const [i, module] of manifest.modules.entries()) {
        const kept = ranksAt(manifest, i, level);
        if (kept === 0) continue;
        const read = exported.read(module);
        expect(read.rank).toBe(kept);
        expect(distance(deltaOf(read), deltaOf(prefixOf(packed, module, kept)))).toBe(0);
      }
    }
    expect(counts.size).toBeGreaterThan(1); // some level does leave a module out
  });
});

describe('squeezePacked', () => {
  const packed = packedGolden('regex-r64', 'uniform');
  const f16Rounding = 2e-3; // of factors that are stored twice

  it.each([1, 8, 63])('to rank %i is the prefix, as an adapter of its own', (rank) => {
    const { manifest, bytes } = squeezePacked(packed, { rank });
    const squeezed = openPacked(bytes, generationOf(bytes));
    expect(manifest.rankMax).toBe(rank);
    expect(manifest.source).toEqual({
      format: 'rankgate',
      by: `squeeze to rank ${rank}`,
      from: [packed.generation],
    });
    for (const module of manifest.modules) {
      const kept = Math.min(rank, module.rank);
      const want = deltaOf(prefixOf(packed, module, kept));
      const got = deltaOf(prefixOf(squeezed, module, kept));
      expect(distance(got, want)).toBeLessThan(f16Rounding * norm(want));
    }
    const files = unpackPeft(squeezed, rank, tinyBase.config);
    expect(JSON.parse(files.config)).toMatchObject({ r: rank, lora_alpha: rank }); // alpha / r is 1 as before
  });

  it('to a variance keeps the fewest ranks of each module that hold it', () => {
    const variance = 0.6;
    const { manifest } = squeezePacked(packed, { variance });
    const whole = packed.manifest.modules;
    for (const [i, { rank }] of manifest.modules.entries()) {
      const energies = Array.from(
        { length: whole[i]!.rank },
        (_, r) => norm(deltaOf(prefixOf(packed, whole[i]!, r + 1))) ** 2,
      );
      const total = energies.at(-1)!;
      expect(energies[rank - 1]! / total).toBeGreaterThan(variance - 1e-3);
      if (rank > 1) expect(energies[rank - 2]! / total).toBeLessThan(variance + 1e-3);
    }
  });

  it('keeps levels where there were some', () => {
    const levelled = packedGolden('patterns-r16', 'energy');
    expect(squeezePacked(levelled, { rank: 4 }).manifest.levels).not.toBeNull();
    expect(squeezePacked(packed, { rank: 4 }).manifest.levels).toBeNull();
  });

  it('refuses more ranks than there are, and kinds whose ranks are no pairs', () => {
    expect(() => squeezePacked(packed, { rank: 65 })).toThrow('the adapter has 1 … 64');
    for (const kind of ['fly', 'svfit', 'mora', 'queryable', 'eora'] as const) {
      const other = { ...packed, manifest: { ...packed.manifest, kind } };
      expect(() => squeezePacked(other, { rank: 4 })).toThrow(`of kind ${kind} cannot be squeezed`);
    }
  });
});
