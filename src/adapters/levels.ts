// Levels (design.md section 7): level k of an adapter may use the bytes of uniform rank k, spent where they keep the most
// energy. Ranks of all modules are taken by σ² per byte, within a module in order, so every level is a prefix in each module
// and contains the levels below it. No level keeps less than uniform rank k does: greedy choice of whole ranks can, by what
// does not fit at the end, so the levels start out as uniform for as long as that is needed.

export interface RankedModule {
  /** Descending: what each rank is worth is its square. */
  readonly sigma: Float64Array; // [rank]
  /** Of one rank. */
  readonly rankBytes: number;
}

export interface Levels {
  /** Per module [rank], the level from which each rank is on: 1 … the largest rank of any module, non-decreasing. */
  readonly levels: readonly (readonly number[])[];
  /** Share of the energy of all modules that level k keeps, at index k-1; ends at exactly 1. */
  readonly curve: readonly number[];
}

export function planLevels(modules: readonly RankedModule[]): Levels {
  const plan = new LevelPlan(modules);
  // All levels uniform keep what uniform keeps: the doubling ends there at the latest.
  for (let uniform = 0; ; uniform = 2 * uniform || 1) {
    const levels = plan.levelsAfter(uniform);
    if (levels !== null) return { levels, curve: plan.curveOf(levels) };
  }
}

/** Of all energy: what sums in different orders may differ by. */
const rounding = 1e-12;

interface Item {
  readonly module: number;
  /** From 0. */
  readonly rank: number;
  readonly energy: number;
  readonly bytes: number;
}

class LevelPlan {
  readonly #modules: readonly RankedModule[];
  readonly #top: number;
  /** Best first; ties by rank, then by module, so that the same adapter always has the same levels. */
  readonly #items: readonly Item[];
  readonly #total: number;

  constructor(modules: readonly RankedModule[]) {
    this.#modules = modules;
    this.#top = Math.max(...modules.map(({ sigma }) => sigma.length));
    this.#items = modules
      .flatMap(({ sigma, rankBytes }, module) =>
        Array.from(sigma, (value, rank) => ({
          module,
          rank,
          energy: value ** 2,
          bytes: rankBytes,
        })),
      )
      .sort(
        (x, y) => y.energy / y.bytes - x.energy / x.bytes || x.rank - y.rank || x.module - y.module,
      );
    this.#total = this.#items.reduce((sum, { energy }) => sum + energy, 0);
  }

  /** The first `uniform` levels uniform, the others greedy; null when one of these keeps less than uniform does. */
  levelsAfter(uniform: number): number[][] | null {
    const levels = this.#modules.map(({ sigma }) =>
      Array.from({ length: Math.min(uniform, sigma.length) }, (_, rank) => rank + 1),
    );
    let waiting = this.#items.filter(({ rank }) => rank >= uniform);
    let [spare, ahead] = [0, 0]; // bytes left, and energy kept beyond uniform's
    for (let level = uniform + 1; level <= this.#top; level++) {
      for (const { sigma, rankBytes } of this.#modules) {
        if (level > sigma.length) continue;
        spare += rankBytes;
        ahead -= sigma[level - 1]! ** 2;
      }
      waiting = waiting.filter(({ module, rank, energy, bytes }) => {
        const ranks = levels[module]!;
        if (bytes > spare || rank !== ranks.length) return true;
        ranks.push(level);
        spare -= bytes;
        ahead += energy;
        return false;
      });
      if (ahead < -rounding * this.#total) return null;
    }
    return levels;
  }

  curveOf(levels: readonly (readonly number[])[]): number[] {
    const gains = new Float64Array(this.#top);
    this.#modules.forEach(({ sigma }, module) => {
      sigma.forEach((value, rank) => {
        gains[levels[module]![rank]! - 1]! += value ** 2;
      });
    });
    let kept = 0;
    return Array.from(gains, (gain, i) => {
      kept += gain;
      return this.#total === 0 || i === gains.length - 1 ? 1 : Math.min(1, kept / this.#total);
    });
  }
}
