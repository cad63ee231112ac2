// Routing compares vectors as wide as the machine's: each width that this machine can run is built and run here, not only
// the best one, which is all that the conformance suite sees.

import { execFileSync } from 'node:child_process';
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { describe, expect, it } from 'vitest';
import { instructionLevels } from '../../../support/instruction-levels.ts';

const root = join(import.meta.dirname, '../../../..');

describe('routing', () => {
  for (const { name, lacks, flags } of instructionLevels) {
    const build = { timeout: 120_000 };
    it.skipIf(lacks !== '')(`chooses what the best k are with ${name}${lacks}`, build, () => {
      const folder = mkdtempSync(join(tmpdir(), 'rankgate-routing-'));
      try {
        const program = join(folder, 'check');
        const common = ['-std=gnu11', '-O1', '-ffp-contract=fast', '-o', program];
        const check = join(root, 'test/support/routing-check.c');
        const source = join(root, 'src/kernels/ggml/native/routing.c');
        execFileSync('cc', [...common, ...flags, check, source, '-lm']);
        const lines = execFileSync(program, { encoding: 'utf8' }).trim().split('\n');
        expect(lines).toHaveLength(18); // 7 page counts, 11 numbers of atoms
        for (const line of lines) {
          const [, , others, error] = line.split(' ');
          expect(Number(others), line).toBe(0);
          expect(Number(error), line).toBeLessThan(2e-6);
        }
      } finally {
        rmSync(folder, { recursive: true, force: true });
      }
    });
  }
});
