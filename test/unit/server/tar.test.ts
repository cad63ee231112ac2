import { execFileSync } from 'node:child_process';
import { mkdtempSync, readFileSync, rmSync, statSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { describe, expect, it } from 'vitest';
import { packTar } from '../../../src/server/tar.ts';

describe('packTar', () => {
  it("is unpacked by the system's tar to the same bytes, times and modes", () => {
    const directory = mkdtempSync(join(tmpdir(), 'rankgate-tar-'));
    try {
      const sizes = [0, 1, 511, 512, 513, 5000];
      const entries = sizes.map((size) => ({
        name: `a-r8/file-${size}`,
        bytes: Uint8Array.from({ length: size }, (_, i) => (i * 7 + size) % 256),
      }));
      writeFileSync(join(directory, 'x.tar'), packTar(entries, 1_700_000_000));
      execFileSync('tar', ['-xf', 'x.tar'], { cwd: directory });
      for (const { name, bytes } of entries) {
        const path = join(directory, name);
        expect(new Uint8Array(readFileSync(path))).toEqual(bytes);
        expect(statSync(path).mtimeMs).toBe(1_700_000_000_000);
        expect(statSync(path).mode & 0o111).toBe(0);
      }
    } finally {
      rmSync(directory, { recursive: true });
    }
  });

  it('is a whole number of blocks and ends with two of zeros', () => {
    const bytes = packTar([{ name: 'a', bytes: new Uint8Array(600).fill(9) }], 0);
    expect(bytes.length).toBe(512 * 5);
    expect(bytes.subarray(-1024).every((byte) => byte === 0)).toBe(true);
  });

  it.each(['', 'x'.repeat(101), 'é', 'a b'])('refuses the name %j', (name) => {
    expect(() => packTar([{ name, bytes: new Uint8Array() }], 0)).toThrow(RangeError);
  });
});
