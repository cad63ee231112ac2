import { expect, it } from 'vitest';
import { createRandom } from '../../../src/adapters/families/seeded-random.ts';
import { parseRecipe } from '../../../src/jobs/recipe.ts';
import { projections } from '../../../src/model/decoder-config.ts';
import { factorName, TrainingDecoder } from '../../../src/model/training-decoder.ts';
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
    const open = (size: number): TrainingDecoder =>
      new TrainingDecoder({
        ...{ config, weights, kernels, targets: projections, recompute: false },
        ...{ rank: size, windows: windows.length, windowRows: 48 },
        answersMax: layout.answers.length,
      });
    using diag = open(rank);
    using sum = open(stacked.length);
    const random = createRandom(9n);
    const factors = new Map<string, Float32Array>();
    for (let block = 0; block < config.blocks; block++) {
      for (const projection of projections) {
        for (const side of ['a', 'b'] as const) {
          const target = diag.factors[block]![projection]![side];
          const width = target.shape[1]!;
          const rows = Array.from({ length: rank }, () =>
            Float32Array.from({ length: width }, () => random.normal() / Math.sqrt(width)),
          );
          kernels.write(target, bytesOf(rows), 0);
          const wide = stacked.map(({ r }) => rows[r]!);
          kernels.write(sum.factors[block]![projection]![side], bytesOf(wide), 0);
          factors.set(factorName(block, projection, side), new Float32Array(rank * width));
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
    for (const [name, gradient] of factors) diag.gradient(name, gradient);
    const parts = sum.step({ ...layout, gate: gateOf(scales) });
    expect(Math.abs(whole / parts - 1)).toBeLessThan(1e-6);
    for (const [name, gradient] of factors) {
      const width = gradient.length / rank;
      const wide = new Float32Array(stacked.length * width);
      sum.gradient(name, wide);
      const added = new Float64Array(gradient.length);
      wide.forEach((value, i) => {
        added[stacked[Math.floor(i / width)]!.r * width + (i % width)]! += value;
      });
      const away = Math.hypot(...added.map((value, i) => value - gradient[i]!));
      expect(away / Math.hypot(...added), name).toBeLessThan(1e-4);
    }
    // The adapter is there: without it the loss is another one.
    expect(
      Math.abs(diag.evaluate({ ...layout, gate: gateOf([0, 0, 0, 0]) }) - whole),
    ).toBeGreaterThan(1e-3);
  },
);

function bytesOf(rows: readonly Float32Array[]): Uint8Array {
  const all = Float32Array.from(rows.flatMap((row) => Array.from(row)));
  return new Uint8Array(all.buffer);
}
