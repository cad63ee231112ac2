import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { type Levels, planLevels, type RankedModule } from '../../src/adapters/levels.ts';
import { createRng } from '../support/random.ts';

const anyModule: fc.Arbitrary<RankedModule> = fc.record({
  sigma: fc
    .array(fc.oneof(fc.double({ min: 0, max: 10, noNaN: true }), fc.constantFrom(0, 1, 2)), {
      minLength: 1,
      maxLength: 12,
    })
    .map((values) => Float64Array.from(values).sort().reverse()),
  rankBytes: fc.integer({ min: 1, max: 40 }),
});
const anyAdapter = fc.array(anyModule, { minLength: 1, maxLength: 8 });

/** Bytes and energy of the ranks that `isOn` says, summed in the order of the modules. */
function sums(modules: readonly RankedModule[], isOn: (module: number, rank: number) => boolean) {
  let [bytes, energy] = [0, 0];
  modules.forEach(({ sigma, rankBytes }, module) => {
    sigma.forEach((value, rank) => {
      if (!isOn(module, rank)) return;
      bytes += rankBytes;
      energy += value ** 2;
    });
  });
  return { bytes, energy };
}

const topOf = (modules: readonly RankedModule[]): number =>
  Math.max(...modules.map(({ sigma }) => sigma.length));
const onAt =
  ({ levels }: Levels, level: number) =>
  (module: number, rank: number): boolean =>
    levels[module]![rank]! <= level;

describe('levels of any adapter', () => {
  it('cost at most what uniform ranks cost, and keep at least as much', () => {
    fc.assert(
      fc.property(anyAdapter, (modules) => {
        const plan = planLevels(modules);
        const all = sums(modules, () => true);
        for (let level = 1; level <= topOf(modules); level++) {
          const uniform = sums(modules, (_, rank) => rank < level);
          const ours = sums(modules, onAt(plan, level));
          expect(ours.bytes).toBeLessThanOrEqual(uniform.bytes);
          expect(ours.energy).toBeGreaterThanOrEqual(uniform.energy - 1e-11 * all.energy);
          const share = all.energy === 0 ? 1 : ours.energy / all.energy;
          expect(plan.curve[level - 1]).toBeCloseTo(share, 10);
        }
      }),
      { numRuns: 2000 },
    );
  });

  it('are prefixes in every module, each within the next, and the last is everything', () => {
    fc.assert(
      fc.property(anyAdapter, (modules) => {
        const { levels, curve } = planLevels(modules);
        expect(curve).toHaveLength(topOf(modules));
        expect(curve.at(-1)).toBe(1);
        levels.forEach((level, module) => {
          expect(level).toHaveLength(modules[module]!.sigma.length);
          expect(level.every((k, r) => k >= (level[r - 1] ?? 1))).toBe(true);
          expect(level.every((k) => k <= curve.length)).toBe(true);
        });
        expect(curve.every((share, k) => share >= (curve[k - 1] ?? 0))).toBe(true);
      }),
    );
  });

  it('keep what the best choice keeps where all ranks cost the same', () => {
    const equalBytes = fc.array(
      anyModule.map((module) => ({ ...module, rankBytes: 7 })),
      { minLength: 1, maxLength: 8 },
    );
    fc.assert(
      fc.property(equalBytes, (modules) => {
        const plan = planLevels(modules);
        const energies = modules
          .flatMap(({ sigma }) => Array.from(sigma, (value) => value ** 2))
          .sort((x, y) => y - x);
        let count = 0;
        for (let level = 1; level <= topOf(modules); level++) {
          count += modules.filter(({ sigma }) => sigma.length >= level).length;
          const best = energies.slice(0, count).reduce((sum, value) => sum + value, 0);
          expect(sums(modules, onAt(plan, level)).energy).toBeCloseTo(best, 8);
        }
      }),
    );
  });
});

describe('planLevels', () => {
  it('spends the bytes of a module that matters little on one that matters much', () => {
    const [strong, weak] = [Float64Array.of(10, 9, 8, 7), Float64Array.of(1, 0.5, 0.2, 0.1)];
    const plan = planLevels([
      { sigma: strong, rankBytes: 100 },
      { sigma: weak, rankBytes: 100 },
    ]);
    expect(plan.levels).toEqual([
      [1, 1, 2, 2],
      [3, 3, 4, 4],
    ]);
    expect(plan.curve[0]).toBeCloseTo(181 / 295.3, 12);
  });

  it('counts bytes: a rank of a wide module must keep more', () => {
    const wide = { sigma: Float64Array.of(2, 0.1, 0.1, 0.1), rankBytes: 300 };
    const narrow = { sigma: Float64Array.of(1.5, 1.4, 1.3, 1.2), rankBytes: 100 };
    // Per byte narrow's last rank (1.44 / 100) is worth more than wide's first (4 / 300).
    expect(planLevels([wide, narrow]).levels).toEqual([
      [2, 3, 4, 4],
      [1, 1, 1, 1],
    ]);
  });

  it('stays uniform where greedy whole ranks would keep less', () => {
    // By density the small rank goes first, and then the large one, which holds nearly everything, no longer fits.
    const modules = [
      { sigma: Float64Array.of(10, 1), rankBytes: 100 },
      { sigma: Float64Array.of(3.2, 3.1), rankBytes: 10 },
    ];
    const greedyFirst = sums(modules, (module) => module === 1).energy;
    expect(greedyFirst).toBeLessThan(sums(modules, (_, rank) => rank === 0).energy);
    expect(planLevels(modules).levels).toEqual([
      [1, 2],
      [1, 2],
    ]);
  });
});

// Section 27's bar for choosing what of an adapter is sent over a link: 0.95 of an exact knapsack's, and more than uniform ranks.
describe('levels of twenty modules of the default base', () => {
  /** (in + out) / 192 of q, k, v, o, gate, up and down. */
  const rankBytes = [6, 4, 4, 6, 11, 11, 11];
  const ranks = 16;

  function modulesOf(seed: number): RankedModule[] {
    const rng = createRng(seed);
    return Array.from({ length: 20 }, (_, i) => {
      const [decay, size] = [0.3 + 1.2 * rng.next(), Math.exp(0.7 * rng.normal())];
      const sigma = Float64Array.from(
        { length: ranks },
        (_, k) => size * (k + 1) ** -decay * Math.exp(0.1 * rng.normal()),
      );
      return { sigma: sigma.sort().reverse(), rankBytes: rankBytes[i % rankBytes.length]! };
    });
  }

  /** The most energy that prefixes of so many bytes keep, by dynamic programming over bytes. */
  function mostEnergy(modules: readonly RankedModule[], bytesMax: number): Float64Array {
    let best = new Float64Array(bytesMax + 1);
    for (const { sigma, rankBytes: each } of modules) {
      const next = best.slice();
      let kept = 0;
      for (let k = 1; k <= sigma.length; k++) {
        kept += sigma[k - 1]! ** 2;
        for (let bytes = k * each; bytes <= bytesMax; bytes++) {
          next[bytes] = Math.max(next[bytes]!, best[bytes - k * each]! + kept);
        }
      }
      best = next;
    }
    return best;
  }

  it('keep at least 0.98 of what the best choice of the same bytes keeps', () => {
    for (let seed = 1; seed <= 50; seed++) {
      const modules = modulesOf(seed);
      const plan = planLevels(modules);
      const uniformOf = (level: number) => sums(modules, (_, rank) => rank < level);
      const best = mostEnergy(modules, uniformOf(ranks / 2).bytes);
      for (const level of [1, 2, 4, 8]) {
        const uniform = uniformOf(level);
        const { energy } = sums(modules, onAt(plan, level));
        expect(energy / best[uniform.bytes]!).toBeGreaterThanOrEqual(0.98);
        expect(energy).toBeGreaterThan(uniform.energy);
      }
    }
  });
});
