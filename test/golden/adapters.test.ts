import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { describe, expect, it } from 'vitest';
import { generationOf, openPacked } from '../../src/adapters/pack.ts';
import { packPeft } from '../../src/adapters/pack-peft.ts';
import { createResidency } from '../../src/adapters/residency.ts';
import type { AdapterRows, Stepper } from '../../src/model/stepper.ts';
import { openTiny } from '../support/open-test-decoder.ts';

// PEFT's own logits for every adapter of test/golden/adapters (test/oracle/peft-golden.py): at full rank, and at each
// smaller rank those of the best approximation of every module. What differs here: factors in f16, and our pipeline.

interface Golden {
  readonly ids: readonly number[];
  readonly rows: ReadonlyArray<number | 'peft'>;
  readonly shape: readonly [number, number, number];
  /** Largest difference of each row from PEFT's: what the adapter does beyond that rank. */
  readonly effect: readonly number[];
}

const names = [
  'plain-r4',
  'rslora-r8',
  'patterns-r16',
  'qv-r8',
  'bf16-r8',
  'bf16-r256',
  'regex-r64',
];
const folder = join(import.meta.dirname, 'adapters');

function readGolden(name: string) {
  const golden = JSON.parse(readFileSync(join(folder, name, 'logits.json'), 'utf8')) as Golden;
  const bytes = readFileSync(join(folder, name, 'logits.f32'));
  const logits = new Float32Array(new Uint8Array(bytes).buffer);
  const [, tokens, vocab] = golden.shape;
  const row = (index: number) =>
    logits.subarray(index * tokens * vocab, (index + 1) * tokens * vocab);
  return { ...golden, row };
}

async function load(stepper: Stepper, name: string) {
  const baseHash = '0'.repeat(64);
  const { bytes, manifest } = packPeft({
    config: readFileSync(join(folder, name, 'adapter_config.json'), 'utf8'),
    weights: readFileSync(join(folder, name, 'adapter_model.safetensors')),
    base: { config: stepper.config, hash: baseHash, names: ['tiny-random'] },
    acceptBaseName: null,
  });
  const generation = generationOf(bytes);
  const open = async () => openPacked(bytes, generation);
  const residency = createResidency({ stepper, baseHash, open });
  await new Promise<void>((resolve) => {
    residency.beginLoad(generation, resolve);
  });
  expect(residency.beginLoad(generation, () => {}).advance(Number.POSITIVE_INFINITY)).toBe('done');
  const { rows } = residency.acquire(generation)!;
  return { manifest, rows: (rank: number) => (rank === 0 ? null : rows(rank)) };
}

/** Logits of every position, one token a step (reference), or of the last one after a single prefill (ggml). */
function logitsAt(stepper: Stepper, ids: readonly number[], use: Use): readonly Float32Array[] {
  const { adapter } = use;
  const step = (tokens: readonly number[], position: number): Float32Array => {
    const sequence = { tokens: Int32Array.from(tokens), cellBase: 16, position };
    return Float32Array.from(stepper.step([{ ...sequence, adapter, wantsLogits: true }]).logits(0));
  };
  return use.steps === 'one' ? [step(ids, 0)] : ids.map((id, position) => step([id], position));
}

interface Use {
  readonly adapter: AdapterRows | null;
  readonly steps: 'one' | 'many';
}

/** Of the positions in `got`, the last ones of `want` [tokens, vocab]. */
function largestDifference(got: readonly Float32Array[], want: Float32Array): number {
  const flat = got.flatMap((row) => [...row]);
  const tail = want.subarray(want.length - flat.length);
  expect(tail).toHaveLength(flat.length);
  return flat.reduce((most, value, i) => Math.max(most, Math.abs(value - tail[i]!)), 0);
}

describe('logits under an imported adapter', () => {
  const ways = [
    ['reference', 'many'],
    ['ggml', 'one'],
  ] as const;
  for (const [backend, steps] of ways) {
    for (const name of names) {
      it(`${name}: equal PEFT's at every rank (${backend})`, async () => {
        const { decoder } = await openTiny({ backend, pages: 9 });
        using stepper = decoder;
        const golden = readGolden(name);
        const { manifest, rows } = await load(stepper, name);
        expect(golden.rows.at(-2)).toBe(manifest.rankMax);
        // f16 keeps 11 bits: 0.0005 of each factor's entries. Seen: at most 0.0007 of the adapter's whole effect.
        const room = 0.001 * golden.effect[0]!;
        golden.rows.forEach((row, index) => {
          const rank = row === 'peft' ? manifest.rankMax : row;
          const got = logitsAt(stepper, golden.ids, { adapter: rows(rank), steps });
          const error = largestDifference(got, golden.row(index));
          expect(error, `rank ${row}`).toBeLessThan(rank === 0 ? 1e-4 : room);
          // The comparison tells ranks apart: the next rank's answer would not pass for this one's.
          const other = golden.rows.findIndex((next) => next !== 'peft' && next > rank);
          if (rank <= 4 && other > 0) {
            const distance = largestDifference(got, golden.row(other));
            expect(distance, `rank ${rank} for ${golden.rows[other]}`).toBeGreaterThan(20 * room);
          }
        });
      });
    }
  }
});
