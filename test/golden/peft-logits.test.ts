import { readdirSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { describe, expect, it } from 'vitest';
import { unpackPeft } from '../../src/adapters/pack-peft.ts';
import { generationOf, openPacked } from '../../src/adapters/pack.ts';
import { packPeft } from '../../src/adapters/pack-peft.ts';
import { logitsPerToken } from '../support/generate.ts';
import { packDirectory, writeAdapter } from '../support/load-adapter.ts';
import { openTiny } from '../support/open-test-decoder.ts';

// Goldens by test/oracle/peft-golden.py: PEFT's logits on the f32 base at full rank, and those of the adapter cut to
// each smaller rank by torch's own SVD of every module's delta.

const folder = join(import.meta.dirname, 'adapters');
const cases = readdirSync(folder, { withFileTypes: true })
  .filter((entry) => entry.isDirectory())
  .map((entry) => entry.name);

interface Golden {
  readonly ids: number[];
  readonly rows: ReadonlyArray<number | 'peft'>;
  readonly shape: readonly [number, number, number];
  /** Largest change of a logit that dropping to this rank makes: what a test must be able to see. */
  readonly effect: readonly number[];
}

function readGolden(name: string): { golden: Golden; logits: Float32Array } {
  const golden = JSON.parse(readFileSync(join(folder, name, 'logits.json'), 'utf8')) as Golden;
  const bytes = new Uint8Array(readFileSync(join(folder, name, 'logits.f32')));
  return { golden, logits: new Float32Array(bytes.buffer) };
}

/** Largest difference of any logit over the range of the wanted ones. */
function relativeError(got: readonly Float32Array[], wanted: Float32Array): number {
  const [low, high] = [Math.min(...wanted), Math.max(...wanted)];
  const vocabulary = got[0]!.length;
  let worst = 0;
  got.forEach((row, i) => {
    row.forEach((logit, j) => {
      worst = Math.max(worst, Math.abs(logit - wanted[i * vocabulary + j]!));
    });
  });
  return worst / (high - low);
}

describe('logits with an adapter equal PEFT’s within 1e-3 of their range', () => {
  it('there are adapters of every kind', () => {
    expect(cases.length).toBeGreaterThanOrEqual(6);
  });

  for (const name of cases) {
    it(`${name}: at full rank and at every prefix`, async () => {
      const { decoder, config } = await openTiny({ pages: 12 });
      using stepper = decoder;
      const { golden, logits } = readGolden(name);
      const [, count, vocabulary] = golden.shape;
      const packed = packDirectory(join(folder, name), config);
      const rowsAt = writeAdapter(stepper, packed, 1);
      for (const [i, row] of golden.rows.entries()) {
        const rank = row === 'peft' ? packed.manifest.rankMax : row;
        const wanted = logits.subarray(i * count * vocabulary, (i + 1) * count * vocabulary);
        const got = logitsPerToken(stepper, golden.ids, rowsAt(rank));
        expect(relativeError(got, wanted), `rank ${row}`).toBeLessThanOrEqual(1e-3);
      }
      // The same comparison must fail for a neighbour that differs visibly, or it compares nothing.
      const base = logitsPerToken(stepper, golden.ids, null);
      const full = logits.subarray((golden.rows.length - 1) * count * vocabulary);
      expect(relativeError(base, full)).toBeGreaterThan(1e-2);
    });

    it(`${name}: an exported prefix, imported again, gives the logits of that rank`, async () => {
      const { decoder, config } = await openTiny({ pages: 24 });
      using stepper = decoder;
      const { golden } = readGolden(name);
      const packed = packDirectory(join(folder, name), config);
      const rank = Math.max(1, Math.floor(packed.manifest.rankMax / 2));
      const files = unpackPeft(packed, rank, config);
      const base = { config, hash: 'ab'.repeat(32), names: [] };
      const again = packPeft({ ...files, base, acceptBaseName: null });
      const reopened = openPacked(again.bytes, generationOf(again.bytes));
      const wanted = logitsPerToken(stepper, golden.ids, writeAdapter(stepper, packed, 1)(rank));
      const got = logitsPerToken(stepper, golden.ids, writeAdapter(stepper, reopened, 13)(rank));
      expect(relativeError(got, Float32Array.from(wanted.flatMap((row) => [...row])))).toBeLessThanOrEqual(1e-3);
    });
  }
});
