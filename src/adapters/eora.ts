// EoRA (arXiv 2410.21271): what quantisation took from each projection, given back as far as `rank` ranks can, where "far"
// is measured in outputs on a text. With E = W_reference − W_served and C the covariance of the inputs, the pair nearest to
// E in outputs is B·A = U·Uᵀ·E, U the first left singular vectors of E·C^½. The published form goes by C's eigenvectors and
// divides by their values, cutting small ones; this is the same on the text and needs neither. It projects E, so no input,
// seen or not, is further from the reference with more ranks.

import type { ModuleRef } from '../model/stepper.ts';
import { type CalibrationInput, calibrate } from './calibration.ts';
import { changedModules, type FilePair, weightChange } from './extract.ts';
import type { PairSource } from './pack-pairs.ts';
import { squeezeMatrix } from './squeeze.ts';

export interface CompensateOptions {
  readonly rank: number;
  readonly seed: number;
}

/** The modules that differ, block by block: a block's inputs are measured when its first module is asked for. The text runs
 *  through the weights that are served. Throws BASE_MISMATCH for files of other sizes. */
export function* compensateModules(
  files: FilePair,
  input: CalibrationInput,
  { rank, seed }: CompensateOptions,
): Generator<PairSource, void> {
  const changed = new Map<number, ModuleRef[]>();
  for (const module of changedModules(files)) {
    changed.set(module.block, [...(changed.get(module.block) ?? []), module]);
  }
  let block = 0;
  for (const covariances of calibrate(input)) {
    for (const module of changed.get(block) ?? []) {
      const covariance = covariances[module.projection];
      const squeeze = () =>
        squeezeMatrix(weightChange(files, module), { rankMax: rank, seed, covariance });
      yield { module, squeeze };
    }
    block += 1;
  }
}
