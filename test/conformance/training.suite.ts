// What every Kernels must compute for training: each rule's outputs and gradients, by the tape, against the reference
// backend (which test/property/autodiff.test.ts holds to central differences).

import { describe, expect, it } from 'vitest';
import { GatewayError } from '../../src/errors.ts';
import type { Kernels } from '../../src/kernels/kernels.ts';
import { ReferenceKernels } from '../../src/kernels/reference-kernels.ts';
import { readAll, tapeGradients } from '../support/differentiate.ts';
import { createRng } from '../support/random.ts';
import { ruleCases } from '../support/rule-cases.ts';

const seeds = [1, 2, 3, 4, 5, 6];
/** Largest distance as a share of the norm: f32 sums in another order, and cancellation in them. */
const distanceMax = 2e-5;

function distance(got: Float32Array, wanted: Float32Array): number {
  const norm = Math.hypot(...wanted);
  return Math.hypot(...wanted.map((value, i) => value - got[i]!)) / Math.max(norm, 1e-2);
}

export function trainingSuite(name: string, create: () => Kernels): void {
  describe(`training: ${name}`, () => {
    for (const [index, { name: rule }] of ruleCases(createRng(0)).entries()) {
      it(rule, () => {
        using kernels = create();
        using reference = new ReferenceKernels();
        for (const seed of seeds) {
          const test = ruleCases(createRng(seed))[index]!;
          const got = tapeGradients(kernels, test);
          for (const [output, wanted] of Object.entries(tapeGradients(reference, test))) {
            expect(distance(got[output]!, wanted), `${output}, seed ${seed}`).toBeLessThan(
              distanceMax,
            );
          }
        }
      });
    }

    it('the loss is finite and exact where every share but one underflows', () => {
      using kernels = create();
      const logits = Float32Array.of(1000, -1000, 0, -500, 500, 499);
      using program = kernels.compile(
        (ops) => ({
          loss: ops.training.crossEntropy(
            ops.input('x', 'f32', [2, 3]),
            ops.input('t', 'i32', [2]),
            ops.input('w', 'f32', [2]),
          ),
        }),
        { segments: 0 },
      );
      program.write('x', logits);
      program.write('t', Int32Array.of(1, 2));
      program.write('w', Float32Array.of(0.5, 0.5));
      program.run([]);
      const wanted = (2000 + Math.log1p(Math.exp(-1)) + 1) / 2;
      expect(readAll(program, 'loss', 1)[0]).toBeCloseTo(wanted, 3);
    });

    it('refuses wrong shapes before native code sees them', () => {
      using kernels = create();
      const build = (rows: number): void => {
        kernels
          .compile(
            (ops) => {
              const x = ops.input('x', 'f32', [4, 6]);
              return { y: ops.training.outer(x, ops.input('z', 'f32', [rows, 6])) };
            },
            { segments: 0 },
          )
          [Symbol.dispose]();
      };
      build(4);
      expect(() => build(5)).toThrow(GatewayError);
    });
  });
}
