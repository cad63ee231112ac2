// What every Kernels must compute for training: each rule's outputs and gradients, by the tape, against the reference
// backend (which test/property/autodiff.test.ts holds to central differences).

import { describe, expect, it } from 'vitest';
import { GatewayError } from '../../src/errors.ts';
import type { Kernels, Ops, Tensor } from '../../src/kernels/kernels.ts';
import { ReferenceKernels } from '../../src/kernels/reference-kernels.ts';
import { readAll, tapeGradients } from '../support/differentiate.ts';
import { createRng, normals } from '../support/random.ts';
import { ruleCases } from '../support/rule-cases.ts';

const seeds = [1, 2, 3, 4, 5, 6];
/** Largest distance as a share of the norm: f32 sums in another order, and cancellation in them. */
const distanceMax = 2e-5;

function distance(got: Float32Array, wanted: Float32Array): number {
  const norm = Math.hypot(...wanted);
  return Math.hypot(...wanted.map((value, i) => value - got[i]!)) / Math.max(norm, 1e-2);
}

/** `refused`: rules that need our own kernels, on backends that have none. */
export function trainingSuite(
  name: string,
  create: () => Kernels,
  refused: readonly string[] = [],
): void {
  describe(`training: ${name}`, () => {
    for (const [index, { name: rule }] of ruleCases(createRng(0)).entries()) {
      if (refused.includes(rule)) {
        it(`${rule} is refused`, () => {
          using kernels = create();
          const test = ruleCases(createRng(seeds[0]!))[index]!;
          expect(() => tapeGradients(kernels, test)).toThrow('needs the native kernels');
        });
        continue;
      }
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

    it('products of sizes that no panel or tile divides', () => {
      const build = (ops: Ops, w: Tensor): Record<string, Tensor> => {
        const [x, t] = [ops.input('x', 'f32', [29, 1031]), ops.input('t', 'f32', [29, 45])];
        return {
          linear: ops.linear(x, w), // [29, 45]
          linearT: ops.training.linearT(t, w), // [29, 1031]
          outer: ops.training.outer(t, x), // [45, 1031]
          tall: ops.training.outer(x, t), // [1031, 45]
        };
      };
      const run = (kernels: Kernels): Record<string, Float32Array> => {
        const rng = createRng(8);
        const w = kernels.store('f32', [45, 1031]);
        kernels.write(w, new Uint8Array(normals(rng, 45 * 1031).buffer), 0);
        using program = kernels.compile((ops) => build(ops, w), { segments: 0 });
        program.write('x', normals(rng, 29 * 1031));
        program.write('t', normals(rng, 29 * 45));
        program.run([]);
        const sizes = { linear: 29 * 45, linearT: 29 * 1031, outer: 45 * 1031, tall: 45 * 1031 };
        return Object.fromEntries(
          Object.entries(sizes).map(([output, count]) => [output, readAll(program, output, count)]),
        );
      };
      using kernels = create();
      using reference = new ReferenceKernels();
      const got = run(kernels);
      for (const [output, wanted] of Object.entries(run(reference)))
        expect(distance(got[output]!, wanted), output).toBeLessThan(distanceMax);
    });

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
