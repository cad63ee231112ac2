import { join } from 'node:path';
import { describe, expect, it } from 'vitest';
import { scrapCells } from '../../src/model/step-inputs.ts';
import {
  type AdapterRows,
  type Segment,
  type Stepper,
  uniformRows,
} from '../../src/model/stepper.ts';
import { packDirectory, writeAdapter } from '../support/load-adapter.ts';
import { openTiny } from '../support/open-test-decoder.ts';

// A row of a mixed batch against the same row alone: other adapters, ranks, lengths and base rows beside it must not
// reach it. In f32 the difference is the order of sums only.

const folder = join(import.meta.dirname, '../golden/adapters');
const names = ['plain-r4', 'rslora-r8', 'patterns-r16', 'qv-r8'] as const;
const runCells = 64;

interface Row {
  readonly prompt: number[];
  readonly adapter: AdapterRows | null;
}

function largestDifference(a: Float32Array, b: Float32Array): number {
  return a.reduce((worst, value, i) => Math.max(worst, Math.abs(value - b[i]!)), 0);
}

function segment(row: Row, run: number, position: number, tokens: number[]): Segment {
  return {
    tokens: Int32Array.from(tokens),
    cellBase: scrapCells + run * runCells,
    position,
    adapter: row.adapter,
    wantsLogits: true,
  };
}

async function openRows(): Promise<{ stepper: Stepper; rows: Row[] }> {
  const { decoder, config } = await openTiny({ pages: 20 });
  let page = 1;
  const adapters = names.map((name) => {
    const packed = packDirectory(join(folder, name), config);
    const rowsAt = writeAdapter(decoder, packed, page);
    page += packed.pages;
    return rowsAt;
  });
  const rows: Row[] = [
    { prompt: [5, 80, 21, 300], adapter: adapters[0]!(4) },
    { prompt: [7, 9, 11], adapter: null },
    { prompt: [5, 80, 21, 300], adapter: adapters[1]!(8) },
    { prompt: [100, 101, 102, 103, 104, 105, 106], adapter: adapters[2]!(24) },
    { prompt: [5, 80, 21, 300], adapter: adapters[2]!(1) },
    { prompt: [33], adapter: adapters[3]!(3) },
    { prompt: [5, 80, 21, 300], adapter: adapters[1]!(2) },
  ];
  return { stepper: decoder, rows };
}

describe('mixed batch', () => {
  it('prefill and decode rows of many adapters and ranks equal single runs', async () => {
    const { stepper, rows } = await openRows();
    using owned = stepper;
    const alone = rows.map((row, run) => {
      const prefill = owned
        .step([segment(row, run, 0, row.prompt)])
        .logits(0)
        .slice();
      const decode = owned.step([segment(row, run, row.prompt.length, [42])]).logits(0);
      return { prefill, decode: decode.slice() };
    });
    const prefill = owned.step(rows.map((row, run) => segment(row, run, 0, row.prompt)));
    const mixedPrefill = rows.map((_, i) => prefill.logits(i).slice());
    const decode = owned.step(rows.map((row, run) => segment(row, run, row.prompt.length, [42])));
    rows.forEach((_, i) => {
      expect(largestDifference(mixedPrefill[i]!, alone[i]!.prefill)).toBeLessThan(1e-4);
      expect(largestDifference(decode.logits(i), alone[i]!.decode)).toBeLessThan(1e-4);
    });
    // Rows that differ in the adapter or the rank only differ visibly: the bar above can be missed.
    const [a, b, c, d] = [0, 2, 4, 6].map((i) => alone[i]!.decode) as [
      Float32Array,
      Float32Array,
      Float32Array,
      Float32Array,
    ];
    for (const [p, q] of [
      [a, b],
      [b, d],
      [c, a],
      [c, d],
    ] as const) {
      expect(largestDifference(p, q)).toBeGreaterThan(0.05);
    }
  });

  it.each(['reference', 'ggml'] as const)(
    'ranks 1, 2, 4 and 8 of one adapter in a batch equal four single requests, to 1e-5 (%s)',
    async (backend) => {
      const { decoder, config } = await openTiny({ backend, pages: 2 });
      using owned = decoder;
      const rowsAt = writeAdapter(owned, packDirectory(join(folder, 'rslora-r8'), config), 1);
      const rows = [1, 2, 4, 8].map((rank) => ({
        prompt: [5, 80, 21, 300],
        adapter: rowsAt(rank),
      }));
      const alone = rows.map((row, run) => {
        const result = owned.step([segment(row, run, 0, row.prompt)]);
        return result.logits(0).slice();
      });
      const mixed = owned.step(rows.map((row, run) => segment(row, run, 0, row.prompt)));
      alone.forEach((logits, i) => {
        expect(largestDifference(mixed.logits(i), logits)).toBeLessThan(1e-5);
        if (i > 0) expect(largestDifference(alone[i - 1]!, logits)).toBeGreaterThan(0.01);
      });
    },
  );

  it('chunks of a prompt beside decode rows equal the prompt in one go', async () => {
    const { stepper, rows } = await openRows();
    using owned = stepper;
    const long = {
      prompt: Array.from({ length: 40 }, (_, i) => 20 + 5 * i),
      adapter: rows[3]!.adapter,
    };
    const whole = owned
      .step([segment(long, 0, 0, long.prompt)])
      .logits(0)
      .slice();
    owned.step([segment(rows[0]!, 2, 0, rows[0]!.prompt)]);
    for (let at = 0, beside = rows[0]!.prompt.length; at < 40; at += 8, beside++) {
      const result = owned.step([
        segment(rows[0]!, 2, beside, [beside]),
        segment(long, 1, at, long.prompt.slice(at, at + 8)),
      ]);
      if (at === 32) expect(largestDifference(result.logits(1), whole)).toBeLessThan(1e-4);
    }
  });

  it('copied cells continue as the originals do', async () => {
    const { stepper, rows } = await openRows();
    using owned = stepper;
    const row = rows[3]!;
    owned.step([segment(row, 0, 0, row.prompt)]);
    owned.copyCells(scrapCells, scrapCells + 5 * runCells, 16);
    const here = owned
      .step([segment(row, 0, row.prompt.length, [42])])
      .logits(0)
      .slice();
    const there = owned.step([segment(row, 5, row.prompt.length, [42])]).logits(0);
    expect(there).toEqual(here);
  });

  it('a page that another adapter used before carries nothing over', async () => {
    const { decoder, config } = await openTiny({ pages: 4 });
    using stepper = decoder;
    const row = (adapter: AdapterRows | null): Float32Array =>
      stepper
        .step([segment({ prompt: [], adapter }, 0, 0, [5, 80, 21])])
        .logits(0)
        .slice();
    const narrow = packDirectory(join(folder, 'qv-r8'), config);
    const fresh = row(writeAdapter(stepper, narrow, 1)(8));
    const wide = row(writeAdapter(stepper, packDirectory(join(folder, 'rslora-r8'), config), 1)(8));
    expect(largestDifference(wide, fresh)).toBeGreaterThan(0.05);
    expect(row(writeAdapter(stepper, narrow, 1)(8))).toEqual(fresh);
  });

  it('refuses batches that leave a run, a page list or a limit', async () => {
    const { stepper, rows } = await openRows();
    using owned = stepper;
    const good = segment(rows[0]!, 0, 0, rows[0]!.prompt);
    const bad: Segment[][] = [
      [],
      [{ ...good, cellBase: 0 }],
      [{ ...good, cellBase: 2046 }],
      [{ ...good, position: -1 }],
      [{ ...good, tokens: new Int32Array(0) }],
      [{ ...good, tokens: Int32Array.of(320) }],
      [{ ...good, adapter: uniformRows([1], 9) }],
      [{ ...good, adapter: uniformRows([20], 8) }],
      [{ ...good, adapter: uniformRows([], 0) }],
      Array.from({ length: 17 }, () => good),
    ];
    for (const segments of bad) expect(() => owned.step(segments)).toThrow(/step|tokens|pages/);
    owned.step([good]);
  });
});
