import { mkdirSync, mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { writeFileDurably } from '../../../src/model/file-hash.ts';

let folder: string;
beforeEach(() => {
  folder = mkdtempSync(join(tmpdir(), 'rankgate-durable-'));
});
afterEach(() => rmSync(folder, { recursive: true }));

describe('writeFileDurably', () => {
  it('replaces a file', async () => {
    const path = join(folder, 'a.json');
    writeFileSync(path, 'what was there, and longer');
    await writeFileDurably(path, 'new');
    expect(readFileSync(path, 'utf8')).toBe('new');
    expect(readdirSync(folder)).toEqual(['a.json']);
  });

  it('leaves one writer’s contents whole when many write the same file', async () => {
    const path = join(folder, 'a.json');
    const texts = Array.from({ length: 20 }, (_, i) => String(i).repeat(10_000 + 500 * i));
    await Promise.all(texts.map((text) => writeFileDurably(path, text)));
    expect(texts).toContain(readFileSync(path, 'utf8'));
    expect(readdirSync(folder)).toEqual(['a.json']);
  });

  it('that fails leaves nothing behind, and the old file as it was', async () => {
    const path = join(folder, 'taken');
    mkdirSync(path);
    writeFileSync(join(path, 'kept'), 'x');
    await expect(writeFileDurably(path, 'new')).rejects.toThrow();
    expect(readdirSync(folder)).toEqual(['taken']);
    expect(readdirSync(path)).toEqual(['kept']);
    await expect(writeFileDurably(join(folder, 'nowhere', 'a'), 'new')).rejects.toThrow('ENOENT');
  });
});
