import { expect, it } from 'vitest';
import { createRandom } from '../../../src/adapters/families/seeded-random.ts';
import { parseRecipe } from '../../../src/jobs/recipe.ts';
import { projectionShape, projections } from '../../../src/model/decoder-config.ts';
import { LossDecoder } from '../../../src/model/loss-graph.ts';
import { lowRankDelta, noDelta, tensorName } from '../../../src/model/trained-delta.ts';
import { TrainingDecoder } from '../../../src/model/training-decoder.ts';
import { passesOf } from '../../../src/trainer/objective.ts';
import { answersIn, layOut, packWindows } from '../../../src/trainer/packing.ts';
import { openTinyBase, tinyExamples } from '../../support/training-base.ts';

// algorithms.md section 1, acceptance 2, in the whole decoder: one pass with P is the sum of the prefixes' deltas. The sum is
// computed by a decoder that has every prefix's ranks beside each other.

const [rank, ranks] = [4, [1, 2, 4]] as const;
const stacked = ranks.flatMap((q) => Array.from({ length: q }, (_, r) => ({ r, q })));

it.each(['none', 'rank', 'sqrt'] as const)(
  'diag is the sum of all prefixes, scaling %s',
  async (scaling) => {
    const base = await openTinyBase();
    using kernels = base.kernels;
    const { config, weights } = base;
    const examples = tinyExamples(6, 48);
    const windows = packWindows(examples, 48, null);
    const weight = 1 / answersIn(examples, windows);
    const layout = layOut(examples, windows, { windows: windows.length, windowRows: 48, weight });
    const sizesOf = (size: number) => ({
      ...{ config, weights, kernels, recompute: false },
      delta: lowRankDelta(config, () => size),
      ...{ windows: windows.length, windowRows: 48, answersMax: layout.answers.length },
    });
    const open = (size: number): TrainingDecoder => new TrainingDecoder(sizesOf(size));
    using diag = open(rank);
    using sum = open(stacked.length);
    const random = createRandom(9n);
    const factors = new Map<string, Float32Array>();
    for (let block = 0; block < config.blocks; block++) {
      for (const projection of projections) {
        for (const side of ['a', 'b'] as const) {
          const name = tensorName({ block, projection }, side);
          const shape = projectionShape(config, projection);
          const width = side === 'a' ? shape.in : shape.out;
          const rows = Array.from({ length: rank }, () =>
            Float32Array.from({ length: width }, () => random.normal() / Math.sqrt(width)),
          );
          diag.write(name, joined(rows));
          const wide = stacked.map(({ r }) => rows[r]!);
          sum.write(name, joined(wide));
          factors.set(name, new Float32Array(rank * width));
        }
      }
    }
    const [pass] = passesOf(parseRecipe({ rank, ranks, scaling, order: 'svd' }, 'recipe'), 0);
    const scales = stacked.map(
      ({ q }) => ({ none: 1, rank: 1 / q, sqrt: 1 / Math.sqrt(q) })[scaling],
    );
    const gateOf = (gates: ArrayLike<number>): Float32Array =>
      Float32Array.from(
        { length: layout.tokens.length * gates.length },
        (_, i) => gates[i % gates.length]!,
      );
    const whole = diag.step({ ...layout, gate: gateOf(pass!.gates) });
    for (const [name, gradient] of factors) diag.read(name, gradient);
    const parts = sum.step({ ...layout, gate: gateOf(scales) });
    expect(Math.abs(whole / parts - 1)).toBeLessThan(1e-6);
    for (const [name, gradient] of factors) {
      const width = gradient.length / rank;
      const wide = new Float32Array(stacked.length * width);
      sum.read(name, wide);
      const added = new Float64Array(gradient.length);
      wide.forEach((value, i) => {
        added[stacked[Math.floor(i / width)]!.r * width + (i % width)]! += value;
      });
      const away = Math.hypot(...added.map((value, i) => value - gradient[i]!));
      expect(away / Math.hypot(...added), name).toBeLessThan(1e-4);
    }
    // The adapter is there: without it the loss is another one.
    using alone = new LossDecoder({ ...sizesOf(rank), delta: noDelta });
    const without = alone.evaluate({ ...layout, gate: gateOf([0]) });
    expect(Math.abs(without - whole)).toBeGreaterThan(1e-3);
  },
);

function joined(rows: readonly Float32Array[]): Float32Array {
  return Float32Array.from(rows.flatMap((row) => Array.from(row)));
}
