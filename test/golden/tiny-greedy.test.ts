import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { describe, expect, it } from 'vitest';
import { generateGreedy } from '../support/generate.ts';
import { openTiny } from '../support/open-test-decoder.ts';

interface Golden {
  readonly runs: ReadonlyArray<{ readonly ids: number[]; readonly greedy: number[] }>;
}
const golden = JSON.parse(
  readFileSync(join(import.meta.dirname, 'tiny/greedy.json'), 'utf8'),
) as Golden;

describe('the tiny model', () => {
  for (const backend of ['ggml', 'reference'] as const) {
    it(`continues every prompt as transformers does (${backend})`, async () => {
      const { decoder } = await openTiny({ backend });
      using stepper = decoder;
      expect(golden.runs.length).toBeGreaterThan(1);
      for (const { ids, greedy } of golden.runs) {
        expect(generateGreedy(stepper, ids, { count: greedy.length })).toEqual(greedy);
      }
    });
  }
});
