// The levels of instructions that native code has forms for, best first, and which of them this machine can run.

import { readFileSync } from 'node:fs';

const cpu = process.platform === 'linux' ? readFileSync('/proc/cpuinfo', 'latin1') : '';

export interface InstructionLevel {
  readonly name: string;
  readonly flags: readonly string[];
  /** Why a test of it is skipped; empty: this machine can run it. */
  readonly lacks: string;
}

export const instructionLevels: readonly InstructionLevel[] = [
  { name: 'AVX-512 with VNNI', wants: /avx512_vnni/, flags: ['-march=x86-64-v4', '-mavx512vnni'] },
  { name: 'AVX-512', wants: /avx512bw/, flags: ['-march=x86-64-v4'] },
  { name: 'AVX2', wants: /avx2/, flags: ['-march=x86-64-v3'] },
  { name: 'the baseline', wants: /^/, flags: [] },
].map(({ name, wants, flags }) => ({
  name,
  flags,
  lacks: wants.test(cpu) ? '' : ' (skipped: not on this machine)',
}));
