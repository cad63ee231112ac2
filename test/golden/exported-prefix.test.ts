import { describe, expect, it } from 'vitest';
import { generationOf, openPacked } from '../../src/adapters/pack.ts';
import { packPeft, unpackPeft } from '../../src/adapters/pack-peft.ts';
import { createRowMaker } from '../../src/adapters/rows.ts';
import type { AdapterRows } from '../../src/model/stepper.ts';
import { logitsPerToken } from '../support/generate.ts';
import { packDirectory, writeAdapter } from '../support/load-adapter.ts';
import { openTiny } from '../support/open-test-decoder.ts';
import { goldenAdapters, goldenDirectory } from '../support/tiny-base.ts';

const ids = [294, 71, 293, 275, 72, 261, 223, 25];

function range(values: readonly number[]): number {
  return Math.max(...values) - Math.min(...values);
}

describe('an exported prefix', () => {
  it.each(goldenAdapters)('of %s, imported again, gives the logits of that rank', async (name) => {
    const { decoder, config } = await openTiny({ pages: 24 });
    using stepper = decoder;
    const packed = packDirectory(goldenDirectory(name), config);
    const rank = Math.max(1, Math.floor(packed.manifest.rankMax / 8));
    const base = { config, hash: 'ab'.repeat(32), names: [] };
    const again = packPeft({ ...unpackPeft(packed, rank, config), base, acceptBaseName: null });
    const reopened = openPacked(again.bytes, generationOf(again.bytes));
    const rowsAt = writeAdapter(stepper, packed, 1);
    const flat = (rows: readonly Float32Array[]): number[] => rows.flatMap((row) => [...row]);
    const wanted = flat(logitsPerToken(stepper, ids, rowsAt(rank)));
    const got = flat(logitsPerToken(stepper, ids, writeAdapter(stepper, reopened, 13)(rank)));
    const full = flat(logitsPerToken(stepper, ids, rowsAt(packed.manifest.rankMax)));
    const worst = (a: number[]): number =>
      Math.max(...a.map((logit, i) => Math.abs(logit - wanted[i]!)));
    expect(worst(got)).toBeLessThanOrEqual(1e-3 * range(wanted));
    expect(worst(full)).toBeGreaterThan(1e-3 * range(wanted)); // the other ranks would show
  });

  it.each(goldenAdapters)('of a level of %s has the ranks that the level has', async (name) => {
    const { decoder, config } = await openTiny({ pages: 24 });
    using stepper = decoder;
    const packed = packDirectory(goldenDirectory(name), config, 'energy');
    const { rankMax } = packed.manifest;
    const level = Math.max(1, Math.floor(rankMax / 4));
    const base = { config, hash: 'ab'.repeat(32), names: [] };
    const again = packPeft({ ...unpackPeft(packed, level, config), base, acceptBaseName: null });
    const reopened = openPacked(again.bytes, generationOf(again.bytes));
    const maker = createRowMaker(packed, config.blocks);
    writeAdapter(stepper, packed, 1);
    const rowsAt = (k: number): AdapterRows =>
      maker.make(
        k,
        Array.from({ length: maker.pagesFor(k) }, (_, i) => 1 + i),
      );
    const flat = (rows: readonly Float32Array[]): number[] => rows.flatMap((row) => [...row]);
    const wanted = flat(logitsPerToken(stepper, ids, rowsAt(level)));
    const all = writeAdapter(stepper, reopened, 13)(reopened.manifest.rankMax);
    const got = flat(logitsPerToken(stepper, ids, all));
    const other = flat(logitsPerToken(stepper, ids, rowsAt(Math.min(rankMax, level + 1))));
    const worst = (a: number[]): number =>
      Math.max(...a.map((logit, i) => Math.abs(logit - wanted[i]!)));
    expect(worst(got)).toBeLessThanOrEqual(1e-3 * range(wanted));
    expect(worst(other)).toBeGreaterThan(1e-3 * range(wanted)); // another level would show
  });
});
