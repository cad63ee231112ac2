import { execFileSync } from 'node:child_process';
import { existsSync, mkdtempSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { describe, expect, it } from 'vitest';
import { instructionFlags, nativeKernels } from '../../../../src/kernels/ggml/native.ts';

const sources = join(import.meta.dirname, '../../../../src/kernels/ggml/native');
const v4 = [
  'avx512f',
  'avx512bw',
  'avx512dq',
  'avx512vl',
  'avx512cd',
  'fma',
  'avx2',
  'f16c',
  'bmi2',
];

describe('our own kernels', () => {
  it('are built for what the machine has, best first', () => {
    expect(instructionFlags('x64', new Set(v4))[0]).toBe('-march=x86-64-v4');
    expect(instructionFlags('x64', new Set([...v4, 'avx512_vnni'])).at(1)).toBe('-mavx512vnni');
    expect(instructionFlags('x64', new Set(v4.slice(1)))).toEqual(['-march=x86-64-v3']);
    expect(instructionFlags('x64', new Set(['sse2']))).toEqual([]);
    expect(instructionFlags('arm64', new Set(v4))).toEqual([]);
  });

  it('are found here by name, and say for what they were built', () => {
    const { addresses, why } = nativeKernels();
    expect(why).toMatch(/^own kernels for /);
    expect(addresses.size).toBeGreaterThan(5);
    expect(new Set(addresses.values()).size).toBe(addresses.size);
    for (const address of addresses.values()) expect(address).toBeGreaterThan(0n);
  });

  it('compile without a warning for every level, with vectors no wider than the machine’s', () => {
    const folder = mkdtempSync(join(tmpdir(), 'rankgate-native-'));
    try {
      for (const level of ['x86-64-v4', 'x86-64-v3', 'x86-64']) {
        const out = join(folder, `${level}.s`);
        const flags = ['-std=gnu11', '-O1', '-Wall', '-Wextra', '-Werror', `-march=${level}`, '-S'];
        for (const name of ['tiles.c', 'routing.c', 'low-rank.c']) {
          execFileSync('cc', [...flags, join(sources, name), '-o', out]);
        }
        expect(existsSync(out)).toBe(true);
        expect(readFileSync(out, 'utf8').includes('zmm')).toBe(level === 'x86-64-v4');
      }
    } finally {
      rmSync(folder, { recursive: true, force: true });
    }
  });
});
