import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { ReferenceKernels } from '../../src/kernels/reference-kernels.ts';
import { differenceError, tapeGradients } from '../support/differentiate.ts';
import { createRng } from '../support/random.ts';
import { ruleCases } from '../support/rule-cases.ts';

// Every rule of the tape against central differences of the forward pass alone, over random sizes and numbers.

/** Share of the gradient's norm; f32 outputs leave about 1e-5, a wrong rule some tenths. */
const errorMax = 2e-3;

describe('the gradient by the tape is the slope of the forward pass', () => {
  for (const [index, { name }] of ruleCases(createRng(0)).entries()) {
    it(name, () => {
      fc.assert(
        fc.property(fc.nat(), (seed) => {
          const test = ruleCases(createRng(seed))[index]!;
          using kernels = new ReferenceKernels();
          const gradients = tapeGradients(kernels, test);
          for (const [leaf, { trainable }] of Object.entries(test.leaves)) {
            if (!trainable) continue;
            const error = differenceError(test, leaf, gradients[leaf]!, createRng(seed + 1));
            expect(error, leaf).toBeLessThan(errorMax);
          }
        }),
        { numRuns: 12 },
      );
    });
  }

  it('a gradient that is one per cent off is told apart from the slope', () => {
    for (const test of ruleCases(createRng(5))) {
      using kernels = new ReferenceKernels();
      const gradients = tapeGradients(kernels, test);
      for (const [leaf, { trainable }] of Object.entries(test.leaves)) {
        if (!trainable) continue;
        const wrong = gradients[leaf]!.map((value) => value * 1.01);
        if (Math.hypot(...wrong) < 1e-3) continue; // a constant, such as the loss over one word
        const along = differenceError(test, leaf, wrong, createRng(6));
        expect(along, `${test.name}: ${leaf}`).toBeGreaterThan(errorMax);
      }
    }
  });
});
