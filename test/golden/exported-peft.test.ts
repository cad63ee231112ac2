import { createHash } from 'node:crypto';
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { describe, expect, it } from 'vitest';
import { exportedPrefixes } from '../oracle/exported-prefixes.ts';
import { writeAdapter } from '../support/load-adapter.ts';
import { openTiny } from '../support/open-test-decoder.ts';

// Prefixes and levels are exported, loaded by PEFT itself, and compute there what they compute here: section 1, acceptance 4.

interface Golden {
  readonly ids: readonly number[];
  readonly cases: ReadonlyArray<Readonly<Record<'name' | 'config' | 'weights' | 'logits', string>>>;
}
const path = join(import.meta.dirname, 'adapters/exports.json');
const golden = JSON.parse(readFileSync(path, 'utf8')) as Golden;

const sha256 = (data: string | Uint8Array): string =>
  createHash('sha256').update(data).digest('hex');

/** f32, little endian. */
function numbers(text: string): number[] {
  const bytes = Buffer.from(text, 'base64');
  return Array.from({ length: bytes.length / 4 }, (_, i) => bytes.readFloatLE(4 * i));
}

const worst = (x: ArrayLike<number>, y: readonly number[]): number =>
  Math.max(...y.map((value, i) => Math.abs(value - x[i]!)));

describe('an exported prefix in PEFT', () => {
  const exported = exportedPrefixes();
  it('is what PEFT was given', () => {
    const ours = exported.map(({ name, config, weights }) => {
      return { name, config: sha256(config), weights: sha256(weights) };
    });
    const theirs = golden.cases.map(({ logits, ...rest }) => rest);
    expect(theirs).toEqual(ours.toSorted((x, y) => (x.name < y.name ? -1 : 1)));
  });

  it.each(['reference', 'ggml'] as const)(
    'has the logits of its rank here (%s)',
    async (backend) => {
      const { decoder } = await openTiny({ backend, pages: 9 });
      using stepper = decoder;
      const [tokens, cell] = [Int32Array.from(golden.ids), { cellBase: 16, position: 0 }];
      const answers = new Map<string, number[]>();
      for (const { name, packed, rank } of exported) {
        const adapter = writeAdapter(stepper, packed, 1)(rank);
        const result = stepper.step([{ tokens, ...cell, adapter, wantsLogits: true }]);
        answers.set(name, [...result.logits(0)]);
      }
      for (const { name, logits } of golden.cases) {
        expect(worst(answers.get(name)!, numbers(logits)), name).toBeLessThan(1e-4);
      }
      // Another rank of the same adapter would not pass.
      const [two, four] = ['rslora-r8-uniform-2', 'rslora-r8-uniform-4'].map(
        (name) => answers.get(name)!,
      );
      expect(worst(two!, four!)).toBeGreaterThan(1e-2);
    },
  );
});
