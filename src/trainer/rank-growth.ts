// When a triangular adapter grows, and where (TriAdaptLoRA, algorithms.md section 3): every so many steps the modules whose cores
// have risen most since they were last looked at gain ranks, until all together have the target.

import type { Tensors } from '../adapters/families/family.ts';
import {
  chooseGrowth,
  coreSize,
  type GrowthSchedule,
  modulesToGrow,
} from '../adapters/families/triangular.ts';

export interface GrowthOptions extends GrowthSchedule {
  /** Steps between two looks. */
  readonly interval: number;
}

export class RankGrowth {
  readonly #options: GrowthOptions;
  /** ‖C‖ per entry when a module was last looked at. */
  #before: readonly number[];

  constructor(options: GrowthOptions, modules: readonly Tensors[]) {
    this.#options = options;
    this.#before = modules.map(coreSize);
  }

  /** The modules that gain `quantum` ranks after this step. */
  look(step: number, modules: readonly Tensors[]): readonly number[] {
    if (step === 0 || step % this.#options.interval !== 0) return [];
    const sizes = modules.map(coreSize);
    const total = modules.reduce((sum, { c }) => sum + c!.columns, 0);
    const count = modulesToGrow(this.#options, { step, total, modules: modules.length });
    return chooseGrowth(
      sizes.map((size, i) => size - this.#before[i]!),
      count,
    );
  }

  /** With the modules as they are after they grew: a larger core is smaller per entry. */
  looked(modules: readonly Tensors[]): void {
    this.#before = modules.map(coreSize);
  }
}
