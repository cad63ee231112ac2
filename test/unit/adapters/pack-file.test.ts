import { createHash } from 'node:crypto';
import { mkdtempSync, renameSync, rmSync, statSync, utimesSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import type { Generation } from '../../../src/adapters/adapter.ts';
import { CheckedFiles, readBlob } from '../../../src/adapters/pack-file.ts';

let folder: string;
let path: string;
const right = Buffer.from('the right bytes');
const wrong = Buffer.from('the wrong bytes'); // as many
const generation: Generation = `sha256:${createHash('sha256').update(right).digest('hex')}`;
const corrupt = expect.objectContaining({ code: 'ADAPTER_CORRUPT' });
/** Of a reader for which every file is old. */
const later = (): CheckedFiles => new CheckedFiles(() => Date.now() + 60_000);

beforeEach(() => {
  folder = mkdtempSync(join(tmpdir(), 'rankgate-pack-file-'));
  path = join(folder, 'blob');
  writeFileSync(path, right);
});
afterEach(() => rmSync(folder, { recursive: true }));

/** Reads and says that what was read is a packed adapter. */
function readChecked(files: CheckedFiles): { text: string; isChecked: boolean } {
  const blob = readBlob(path, generation, files);
  blob.checked();
  return { text: Buffer.from(blob.bytes).toString(), isChecked: blob.isChecked };
}

describe('readBlob', () => {
  it('checks a file once while it stays the same', () => {
    const files = later();
    const answers = [0, 1, 2].map(() => readChecked(files));
    expect(answers.map(({ isChecked }) => isChecked)).toEqual([false, true, true]);
    expect(answers.map(({ text }) => text)).toEqual(Array(3).fill(right.toString()));
  });

  it('remembers nothing that was not found right by its reader', () => {
    const files = later();
    expect(readBlob(path, generation, files).isChecked).toBe(false);
    expect(readBlob(path, generation, files).isChecked).toBe(false);
  });

  it('checks again what was written to, although its size and times are as before', () => {
    const files = later();
    readChecked(files);
    const { atime, mtime } = statSync(path);
    writeFileSync(path, wrong);
    utimesSync(path, atime, mtime);
    expect(() => readBlob(path, generation, files)).toThrow(corrupt);
    writeFileSync(path, right);
    expect(readBlob(path, generation, files).isChecked).toBe(false);
  });

  it('checks again what took its place', () => {
    const files = later();
    readChecked(files);
    writeFileSync(`${path}.new`, wrong);
    renameSync(`${path}.new`, path);
    expect(() => readBlob(path, generation, files)).toThrow(corrupt);
  });

  it('does not trust the times of a file that was just written', () => {
    const files = new CheckedFiles(Date.now);
    readChecked(files);
    expect(readChecked(files).isChecked).toBe(false);
  });
});
