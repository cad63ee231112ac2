import { describe, expect, it } from 'vitest';
import { createKernels } from '../../src/kernels/create-kernels.ts';
import type { Kernels } from '../../src/kernels/kernels.ts';
import { TfjsKernels } from '../../src/kernels/tfjs/tfjs-kernels.ts';
import type { Decoder } from '../../src/model/decoder.ts';
import { scrapCells } from '../../src/model/step-inputs.ts';
import { type AdapterRows, type Segment, uniformRows } from '../../src/model/stepper.ts';
import {
  openDeepTiny,
  PageBook,
  perModule,
  randomAtoms,
  randomBank,
  routedRows,
  tinyBlocks,
} from '../support/adapter-kinds.ts';
import { tinyPath } from '../support/open-test-decoder.ts';
import { PlainDecoder, type PlainToken } from '../support/plain-decoder.ts';
import { createRng } from '../support/random.ts';
import { loadForTest, whyNoTensorflow } from '../support/tensorflow.ts';

// Rows of every kind of adapter in one batch, against the same rows alone and against a plain f64 computation. In f32 the
// difference is the order of sums only: nowhere near the 0.05 by which another kind, rank, group or mix moves the logits.

const wasm = '@tensorflow/tfjs';
const backends: ReadonlyArray<{ readonly name: string; readonly open: () => Promise<Kernels> }> = [
  { name: 'reference', open: () => createKernels('reference', { threads: 1 }) },
  { name: 'ggml', open: () => createKernels('ggml', { threads: 1 }) },
  { name: 'tfjs wasm', open: async () => new TfjsKernels(await loadForTest(wasm)) },
];

const blocks = 5; // two blocks of two layers, and one of one
const bank = randomBank({ r: 8, dq: 6, K: 5, blockLayers: 2 });
const runCells = 32;
const equal = 1e-4;
const visible = 0.05;

interface Row {
  readonly kind: string;
  readonly prompt: readonly number[];
  readonly adapter: AdapterRows | null;
}

const difference = (a: ArrayLike<number>, b: ArrayLike<number>): number => {
  let worst = 0;
  for (let i = 0; i < a.length; i++) worst = Math.max(worst, Math.abs(a[i]! - b[i]!));
  return worst;
};

/** A use of each kind, some of them of one adapter. */
function usesOf({ config }: Decoder, book: PageBook): Record<string, AdapterRows | null> {
  const rng = createRng(3);
  const one = book.take(1);
  const two = book.take(2);
  const mixed = book.take(4);
  const queryable = book.take(1);
  const gates = perModule(config, two, (module, rank) => (rank < module % 16 ? rng.normal() : 0));
  const routed = (pages: number, topK: number, temperature = 0): AdapterRows =>
    routedRows(book, config, book.take(pages), { topK, temperature });
  const parts = routedRows(book, config, mixed, { topK: 3, temperature: 0 });
  const { bias } = parts.routing!;
  return {
    base: null,
    'lora at 1': uniformRows(one, 1),
    'lora at 2': uniformRows(one, 2),
    'lora at 4': uniformRows(one, 4),
    'lora at 8': uniformRows(one, 8),
    'lora at 13': uniformRows(two, 13),
    'gates by module': { ...uniformRows(two, 16), gates },
    'fly 1 of 8': routed(1, 1),
    'fly 8 of 32': routed(4, 8),
    'fly 32 of 32': routed(4, 32),
    'mora 4 of 16': routed(2, 4, 0.1),
    'mora 1 of 8': routed(1, 1, 1),
    queryable: { ...uniformRows(queryable, 8), atoms: randomAtoms(bank, 2, 1) },
    "another queryable's keys": { ...uniformRows(queryable, 8), atoms: randomAtoms(bank, 5, 2) },
    'queryable, fly, gates, mora': {
      ...parts,
      gates: perModule(config, mixed, (_, rank) => (rank >> 3 === 2 ? 0.5 : 1)),
      routing: {
        groups: [
          { firstPage: 1, pages: 1, topK: 3, temperature: 0 },
          { firstPage: 3, pages: 1, topK: 2, temperature: 0.5 },
        ],
        bias,
      },
      atoms: randomAtoms(bank, 3, 3),
    },
  };
}

function openRows(kernels: Kernels): { decoder: Decoder; book: PageBook; rows: Row[] } {
  const decoder = openDeepTiny(kernels, { blocks, pages: 40 });
  decoder.setAtomBank(bank);
  const book = new PageBook(decoder, 11);
  const rng = createRng(7);
  const rows = Object.entries(usesOf(decoder, book)).map(([kind, adapter], i) => ({
    kind,
    prompt: Array.from({ length: 1 + (i % 5) }, () => rng.below(320)),
    adapter,
  }));
  return { decoder, book, rows };
}

function segment(row: Row, run: number, position: number, tokens: readonly number[]): Segment {
  const cellBase = scrapCells + run * runCells;
  const own = { tokens: Int32Array.from(tokens), cellBase, position };
  return { ...own, adapter: row.adapter, wantsLogits: true };
}

it('ggml without our own kernels refuses what it cannot choose by, and serves the rest', async () => {
  const kernels = await createKernels('ggml', { threads: 1, native: false });
  const decoder = openDeepTiny(kernels, { blocks, pages: 4 });
  using owned = decoder;
  const book = new PageBook(owned, 11);
  const pages = book.take(1);
  const refusal = expect.objectContaining({ code: 'UNSUPPORTED' }) as Error;
  expect(() => owned.setAtomBank(bank)).toThrow(refusal);
  const routed = routedRows(book, owned.config, pages, { topK: 2, temperature: 0 });
  const row = (adapter: AdapterRows): Row => ({ kind: '', prompt: [7, 300], adapter });
  const step = (one: Row): Float32Array => owned.step([segment(one, 0, 0, one.prompt)]).logits(0);
  expect(() => step(row(routed))).toThrow(refusal);
  const gates = perModule(owned.config, pages, (module, rank) => (module + rank) % 3);
  const gated = { ...uniformRows(pages, 8), gates };
  const plain = new PlainDecoder(tinyPath, owned.config, tinyBlocks);
  const wanted = plain.run([7, 300], { rows: gated, page: book.page, bank: null });
  // ggml's products with f16 pages round x to f16.
  expect(difference(step(row(gated)), wanted.at(-1)!.logits)).toBeLessThan(visible / 10);
});

describe.each(backends)('rows of every kind on $name', ({ name, open }) => {
  const missing = name === 'tfjs wasm' ? whyNoTensorflow(wasm) : null;
  if (missing !== null) {
    it.skip(missing, () => {});
    return;
  }

  it('equal a plain computation in f64, alone and beside each other', async () => {
    const { decoder, book, rows } = openRows(await open());
    using owned = decoder;
    const plain = new PlainDecoder(tinyPath, owned.config, tinyBlocks);
    const wanted = rows.map(({ prompt, adapter }): PlainToken[] =>
      plain.run([...prompt, 42], adapter && { rows: adapter, page: book.page, bank }),
    );
    const alone = rows.map((row, run) => {
      const prefill = owned
        .step([segment(row, run, 0, row.prompt)])
        .logits(0)
        .slice();
      const result = owned.step([segment(row, run, row.prompt.length, [42])]);
      return { prefill, decode: result.logits(0).slice(), atoms: result.atomWeights(0) };
    });
    const prefill = owned.step(rows.map((row, run) => segment(row, run, 0, row.prompt)));
    const prefilled = rows.map((_, i) => prefill.logits(i).slice());
    const decode = owned.step(rows.map((row, run) => segment(row, run, row.prompt.length, [42])));
    rows.forEach(({ kind, prompt, adapter }, i) => {
      const [last, next] = [wanted[i]![prompt.length - 1]!, wanted[i]!.at(-1)!];
      const off = {
        prefillAlone: difference(alone[i]!.prefill, last.logits),
        decodeAlone: difference(alone[i]!.decode, next.logits),
        prefillMixed: difference(prefilled[i]!, last.logits),
        decodeMixed: difference(decode.logits(i), next.logits),
      };
      for (const [where, worst] of Object.entries(off)) {
        expect(worst, `${kind}, ${where}`).toBeLessThan(equal);
      }
      const weights = next.atomWeights.flat();
      expect(weights).toHaveLength(adapter?.atoms ? 3 * bank.K : 0);
      for (const got of [decode.atomWeights(i), alone[i]!.atoms]) {
        expect(difference(got ?? [], weights), `${kind}, atoms`).toBeLessThan(equal);
        expect(got === null, kind).toBe(weights.length === 0);
      }
    });
  });

  it('and not what the same pages give without gates, choices or mixes', async () => {
    const { decoder, book, rows } = openRows(await open());
    using owned = decoder;
    const plain = new PlainDecoder(tinyPath, owned.config, tinyBlocks);
    rows.forEach(({ kind, prompt, adapter }, run) => {
      if (adapter === null) return;
      const got = owned.step([segment(rows[run]!, run, 0, prompt)]).logits(0);
      const without = (less: Partial<AdapterRows>): number => {
        const use = { rows: { ...adapter, ...less }, page: book.page, bank };
        return difference(got, plain.run(prompt, use).at(-1)!.logits);
      };
      expect(difference(got, plain.run(prompt, null).at(-1)!.logits), kind).toBeGreaterThan(
        visible,
      );
      expect(without({ scale: 2 }) > visible, `${kind}, scale`).toBe(adapter.gates === null);
      if (adapter.gates !== null) expect(without({ gates: null }), kind).toBeGreaterThan(visible);
      if (adapter.atoms !== null) expect(without({ atoms: null }), kind).toBeGreaterThan(visible);
      // All 32 of 32 ranks are no choice.
      const chooses = adapter.routing !== null && kind !== 'fly 32 of 32';
      expect(without({ routing: null }) > visible, `${kind}, routing`).toBe(chooses);
    });
  });

  it('prefill equals one token a step', async () => {
    const { decoder, rows } = openRows(await open());
    using owned = decoder;
    const prompt = Array.from({ length: 9 }, (_, i) => 31 * i + 5);
    const whole = owned.step(rows.slice(0, 13).map((row, run) => segment(row, run, 0, prompt)));
    const kept = rows.slice(0, 13).map((_, i) => whole.logits(i).slice());
    for (const [position, token] of prompt.entries()) {
      const step = owned.step(
        rows.slice(0, 13).map((row, run) => segment(row, run, position, [token])),
      );
      if (position < prompt.length - 1) continue;
      kept.forEach((logits, i) => {
        expect(difference(step.logits(i), logits), rows[i]!.kind).toBeLessThan(equal);
      });
    }
  });
});
