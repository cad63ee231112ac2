// Tiles have code of their own for every level of instructions: each level that this machine can run is built and run here,
// not only the best one, which is all that the conformance suite sees.

import { execFileSync } from 'node:child_process';
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { describe, expect, it } from 'vitest';
import { instructionLevels } from '../../../support/instruction-levels.ts';

const root = join(import.meta.dirname, '../../../..');

describe('tiles', () => {
  for (const { name, lacks, flags } of instructionLevels) {
    it.skipIf(lacks !== '')(
      `give what linears give with ${name}${lacks}`,
      { timeout: 120_000 },
      () => {
        const folder = mkdtempSync(join(tmpdir(), 'rankgate-tiles-'));
        try {
          const native = join(root, 'src/kernels/ggml/native');
          const sources = [join(native, 'linear.c'), join(native, 'tiles.c')];
          const program = join(folder, 'check');
          const common = ['-std=gnu11', '-O1', '-ffp-contract=fast', '-o', program];
          const check = join(root, 'test/support/tiles-check.c');
          execFileSync('cc', [...common, ...flags, check, ...sources, '-lm']);
          const lines = execFileSync(program, { encoding: 'utf8' }).trim().split('\n');
          expect(lines).toHaveLength(14); // 7 types, 8 and 16 bits
          for (const line of lines) {
            const [type, bits, error] = line.split(' ') as [string, string, string];
            // 16 bits: 2^-16 of a block's largest number; the K types' scales are rounded to f16.
            const largest = bits === '8' ? 2e-4 : type.endsWith('k') ? 5e-7 : 2e-9;
            expect(Number(error), line).toBeLessThan(largest);
            if (bits === '8') expect(Number(error), line).toBeGreaterThan(1e-6);
          }
        } finally {
          rmSync(folder, { recursive: true, force: true });
        }
      },
    );
  }
});
