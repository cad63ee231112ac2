import { expect, it } from 'vitest';
import { numbersOf, weightName } from '../../src/adapters/extract.ts';
import { rankAtEnergy, singularBasis } from '../../src/adapters/families/singular-basis.ts';
import { projectionShape, readDecoderConfig } from '../../src/model/decoder-config.ts';
import { openGguf } from '../../src/model/gguf.ts';
import { baseModelPath } from '../support/base-model.ts';

// Section 40 of algorithms.md measured these on the same file with numpy: "top r" is not small.
it.each([
  [0, 227],
  [14, 355],
])(
  'q in block %i of SmolLM2 needs %i ranks for 99 percent of its energy',
  async (block, wanted) => {
    using file = openGguf(await baseModelPath());
    const module = { block, projection: 'attn_q' } as const;
    const sizes = projectionShape(readDecoderConfig(file), module.projection);
    const data = Float64Array.from(numbersOf(file, weightName(module)));
    const site = {
      ...module,
      ...sizes,
      weight: () => ({ rows: sizes.in, columns: sizes.out, data }),
    };
    expect(rankAtEnergy(singularBasis(site).sigma, 0.99)).toBe(wanted);
  },
  120_000,
);
