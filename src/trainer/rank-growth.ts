// When a triangular adapter grows, and where (TriAdaptLoRA, algorithms.md section 3): every so many steps the modules whose cores
// have risen most since they were last looked at gain ranks, until all together have the target. Memory for the most that a
// module may get is there from the start: ranks that are not on yet have a core of zeros, which nothing moves.

import {
  chooseGrowth,
  type GrowthSchedule,
  modulesToGrow,
} from '../adapters/families/triangular.ts';

export interface GrowthOptions extends Pick<GrowthSchedule, 'curve' | 'target' | 'quantum'> {
  /** Of a module at the start. */
  readonly rank: number;
  readonly rankMax: number;
  /** Steps between two looks. */
  readonly interval: number;
  /** Of all steps, before the first growth. */
  readonly warmupShare: number;
}

/** A core [R,R] of a module, and its gradient. */
export interface Core {
  readonly values: Float32Array;
  readonly gradient: Float32Array;
}

export class RankGrowth {
  /** Ranks that are on in each module, then the size of its core per entry when it was last looked at. */
  readonly state: Float32Array; // [2, M]
  readonly #options: GrowthOptions;
  readonly #cores: readonly Core[];

  constructor(options: GrowthOptions, cores: readonly Core[]) {
    this.#options = options;
    this.#cores = cores;
    this.state = new Float32Array(2 * cores.length).fill(options.rank, 0, cores.length);
  }

  get ranks(): Float32Array {
    return this.state.subarray(0, this.#cores.length);
  }

  /** Sets what is not on to zero: gradients before a step, and values after it, as some optimisers mix columns. */
  hold(what: keyof Core): void {
    this.#cores.forEach((core, m) => {
      const [numbers, on] = [core[what], this.ranks[m]!];
      const size = Math.sqrt(numbers.length);
      for (let i = 0; i < size; i++) numbers.fill(0, i * size + (i < on ? on : 0), (i + 1) * size);
    });
  }

  /** After step `step` of `steps`, counted from 1. */
  look(step: number, steps: number): void {
    const { curve, target, quantum, interval, warmupShare, rankMax } = this.#options;
    if (step % interval !== 0) return;
    const before = this.state.subarray(this.#cores.length);
    const rises = this.#cores.map((_, m) =>
      // One that is full does not grow.
      this.ranks[m]! + quantum > rankMax ? -Infinity : this.#sizeOf(m) - before[m]!,
    );
    const total = this.ranks.reduce((sum, rank) => sum + rank, 0);
    const modules = rises.filter((rise) => rise > -Infinity).length;
    const warmUpSteps = Math.round(warmupShare * steps);
    const schedule = { curve, target, quantum, warmUpSteps, steps };
    const count = modulesToGrow(schedule, { step, total, modules });
    for (const m of chooseGrowth(rises, count)) this.ranks[m]! += quantum;
    this.#cores.forEach((_, m) => {
      before[m] = this.#sizeOf(m);
    });
  }

  /** ‖C‖ per entry that is on. */
  #sizeOf(m: number): number {
    const { values } = this.#cores[m]!;
    return Math.sqrt(values.reduce((sum, value) => sum + value ** 2, 0)) / this.ranks[m]! ** 2;
  }
}
