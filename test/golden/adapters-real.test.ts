import { createHash } from 'node:crypto';
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { describe, expect, it } from 'vitest';
import { generationOf, openPacked } from '../../src/adapters/pack.ts';
import { packPeft } from '../../src/adapters/pack-peft.ts';
import { createResidency } from '../../src/adapters/residency.ts';
import { logitsPerToken } from '../support/generate.ts';
import { makePeftAdapter, smolAdapter } from '../support/make-peft-adapter.ts';
import { openBase } from '../support/open-test-decoder.ts';

// A rank-16 adapter of all seven projections on the real SmolLM2-135M-Instruct: PEFT's twenty best tokens of every
// position, at all ranks, at the best approximation of rank 4 and without adapter (test/oracle/peft-smollm2.py).

interface Position {
  readonly tokens: readonly number[];
  readonly logits: readonly number[];
}

interface Golden {
  readonly adapterSha256: string;
  readonly prompts: ReadonlyArray<readonly number[]>;
  readonly answers: Readonly<Record<string, ReadonlyArray<readonly Position[]>>>;
}

const golden = JSON.parse(
  readFileSync(join(import.meta.dirname, 'adapters/smollm2-r16.json'), 'utf8'),
) as Golden;

/** Largest difference of a logit among PEFT's twenty best. */
function largestDifference(got: readonly Float32Array[], want: readonly Position[]): number {
  return Math.max(
    ...want.flatMap(({ tokens, logits }, position) =>
      tokens.map((token, i) => Math.abs(got[position]![token]! - logits[i]!)),
    ),
  );
}

describe('the real base under an imported adapter', () => {
  it("has PEFT's logits at ranks 0, 4 and 16", async () => {
    const files = makePeftAdapter(smolAdapter);
    const hash = createHash('sha256').update(files.weights).digest('hex');
    expect(hash, 'the adapter is the one the oracle saw').toBe(golden.adapterSha256);
    const { decoder } = await openBase({ mode: 'exact', pages: 3, cells: 64 });
    using stepper = decoder;
    const base = { config: stepper.config, hash: 'a'.repeat(64), names: ['SmolLM2-135M-Instruct'] };
    const { bytes, manifest } = packPeft({ ...files, base, acceptBaseName: null });
    expect(manifest.modules).toHaveLength(210);
    const generation = generationOf(bytes);
    const open = async () => openPacked(bytes, generation);
    const residency = createResidency({ stepper, baseHash: base.hash, open });
    await new Promise<void>((resolve) => {
      residency.beginLoad(generation, resolve);
    });
    residency.beginLoad(generation, () => {}).advance(Number.POSITIVE_INFINITY);
    const { rows } = residency.acquire(generation)!;

    const errors: Record<string, number> = {};
    for (const [rank, answers] of Object.entries(golden.answers)) {
      const k = Number(rank);
      const adapter = k === 0 ? null : rows(k);
      golden.prompts.forEach((prompt, i) => {
        const got = logitsPerToken(stepper, prompt, adapter);
        errors[rank] = Math.max(errors[rank] ?? 0, largestDifference(got, answers[i]!));
        for (const [other, others] of Object.entries(golden.answers)) {
          // Another rank's answer is far away: the comparison would notice.
          if (other !== rank) expect(largestDifference(got, others[i]!)).toBeGreaterThan(0.5);
        }
      });
    }
    // Seen: 0.00005 without adapter, 0.002 with its factors in f16.
    expect(errors['0']).toBeLessThan(0.0002);
    expect(errors['4']).toBeLessThan(0.01);
    expect(errors['16']).toBeLessThan(0.01);
  });
});
