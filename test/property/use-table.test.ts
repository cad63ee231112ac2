import fc from 'fast-check';
import { beforeAll, describe, expect, it } from 'vitest';
import { GatewayError } from '../../src/errors.ts';
import { createKernels } from '../../src/kernels/create-kernels.ts';
import type { Decoder } from '../../src/model/decoder.ts';
import { scrapCells } from '../../src/model/step-inputs.ts';
import { type AdapterRows, uniformRows } from '../../src/model/stepper.ts';
import {
  openDeepTiny,
  PageBook,
  perModule,
  randomAtoms,
  randomBank,
  tinyBlocks,
} from '../support/adapter-kinds.ts';

// Whatever a use says, native code sees it only when it fits: a step is refused with SHAPE_MISMATCH and the decoder goes on,
// or it gives finite logits that are those of the row alone.

const bank = randomBank({ r: 8, dq: 4, K: 3, blockLayers: 1 });
const pagesMax = 6;
const near = (max: number): fc.Arbitrary<number> =>
  fc.oneof(
    { weight: 12, arbitrary: fc.integer({ min: 0, max }) },
    { weight: 1, arbitrary: fc.constantFrom(-1, max + 1, 0.5, 2 ** 31, Number.NaN) },
  );

interface Sketch {
  readonly pages: readonly number[];
  readonly rank: number;
  readonly gates: number | null; // of how many pages
  readonly groups: ReadonlyArray<{
    readonly firstPage: number;
    readonly pages: number;
    readonly topK: number;
    readonly temperature: number;
  }> | null;
  readonly topK: number | null;
  readonly bank: string;
}

const sketches: fc.Arbitrary<Sketch> = fc
  .array(fc.integer({ min: 1, max: pagesMax }), { minLength: 1, maxLength: 4 })
  .chain((pages) => {
    const count = pages.length;
    const group = fc.record({
      firstPage: near(count - 1),
      pages: near(2),
      topK: near(8),
      temperature: fc.oneof(fc.constant(0), fc.double({ min: 0.05, max: 4, noNaN: true }), near(1)),
    });
    return fc.record({
      pages: fc.oneof(
        { weight: 12, arbitrary: fc.constant(pages) },
        { weight: 1, arbitrary: fc.constantFrom([], [0], [7], [1.5], new Array(33).fill(1)) },
      ),
      rank: near(8 * count),
      gates: fc.option(fc.oneof({ weight: 9, arbitrary: fc.constant(count) }, near(count))),
      groups: fc.option(fc.array(group, { maxLength: 2 })),
      topK: fc.option(near(bank.K)),
      bank: fc.oneof({ weight: 12, arbitrary: fc.constant(bank.id) }, fc.string()),
    });
  });

describe.each(['reference', 'ggml'] as const)('any use on %s', (backend) => {
  let decoder: Decoder;
  beforeAll(async () => {
    const kernels = await createKernels(backend, { threads: 1 });
    decoder = openDeepTiny(kernels, { blocks: tinyBlocks, pages: pagesMax + 1 });
    new PageBook(decoder, 9).take(pagesMax);
    decoder.setAtomBank(bank);
    return () => decoder[Symbol.dispose]();
  });

  const useOf = (sketch: Sketch): AdapterRows => {
    const { pages, rank, groups, topK } = sketch;
    const ones = (count: number): Float32Array =>
      perModule(
        decoder.config,
        new Array(Math.max(0, Math.floor(count) || 0) % 40).fill(1),
        () => 1,
      );
    return {
      ...uniformRows(pages, rank),
      gates: sketch.gates === null ? null : ones(sketch.gates),
      routing: groups && { groups, bias: ones(pages.length) },
      atoms: topK === null ? null : { ...randomAtoms(bank, topK, 1), bank: sketch.bank },
    };
  };
  const step = (uses: ReadonlyArray<AdapterRows | null>): Float32Array[] | 'refused' => {
    try {
      const result = decoder.step(
        uses.map((adapter, run) => {
          const cellBase = scrapCells + 8 * run;
          const tokens = Int32Array.of(5, 77);
          return { tokens, cellBase, position: 0, adapter, wantsLogits: true };
        }),
      );
      return uses.map((_, i) => result.logits(i).slice());
    } catch (error) {
      expect(error).toBeInstanceOf(GatewayError);
      expect((error as GatewayError).code).toBe('SHAPE_MISMATCH');
      return 'refused';
    }
  };

  it('is refused, or computed as if it were alone', () => {
    let refused = 0;
    let computed = 0;
    const plain = uniformRows([2, 3], 11);
    const [base] = step([null]) as Float32Array[];
    fc.assert(
      fc.property(sketches, (sketch) => {
        const use = useOf(sketch);
        const alone = step([use]);
        const beside = step([plain, use, null]) as Float32Array[];
        if (alone === 'refused') {
          refused += 1;
          expect(beside).toBe('refused');
        } else {
          computed += 1;
          expect(alone[0]!.every(Number.isFinite)).toBe(true);
          const worst = alone[0]!.reduce(
            (most, logit, k) => Math.max(most, Math.abs(logit - beside[1]![k]!)),
            0,
          );
          expect(worst).toBeLessThan(1e-4);
        }
        const [again] = step([null]) as Float32Array[];
        expect(again).toEqual(base);
      }),
      { numRuns: 150, seed: 4 },
    );
    expect(Math.min(refused, computed)).toBeGreaterThan(20);
  });
});
