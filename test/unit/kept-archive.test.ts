import {
  existsSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  rmSync,
  writeFileSync,
} from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { openArchive } from '../../src/kept-archive.ts';
import type { Elite } from '../../src/router/archive.ts';

let dir: string;
let path: string;
let warnings: string[];
beforeEach(() => {
  dir = mkdtempSync(join(tmpdir(), 'rankgate-archive-'));
  path = join(dir, 'archive.json');
  warnings = [];
});
afterEach(() => rmSync(dir, { recursive: true, force: true }));

const open = (): ReturnType<typeof openArchive> => openArchive(path, (text) => warnings.push(text));
const elite = (objective: number): Elite => ({
  adapter: null,
  generation: null,
  kind: 'base',
  rank: 0,
  objective,
  latencyMs: 100,
});
const always = (): boolean => true;

describe('openArchive', () => {
  it('finds again what was saved, and leaves no unfinished file', async () => {
    const first = open();
    first.map.offer('/law', elite(0.5), always);
    await first.save();
    first.map.offer('/code', elite(0.25), always);
    await Promise.all([first.save(), first.save()]);
    expect(open().map.rows()).toEqual(first.map.rows());
    expect(readdirSync(dir)).toEqual(['archive.json']);
    expect(warnings).toEqual([]);
  });

  it('writes nothing when nothing changed', async () => {
    const first = open();
    await first.save();
    writeFileSync(path, 'somebody else');
    await first.save();
    expect(readFileSync(path, 'utf8')).toBe('somebody else');
  });

  it('sets aside what is no archive, and starts with an empty one', async () => {
    writeFileSync(path, '{"format":"rankgate-archive/1"}');
    const archive = open();
    expect(archive.map.rows()).toEqual([]);
    expect(warnings).toHaveLength(1);
    await archive.save();
    expect(readFileSync(`${path}.unreadable`, 'utf8')).toBe('{"format":"rankgate-archive/1"}');
    expect(open().map.rows()).toEqual([]);
  });

  it('a save that the disk refuses fails, and the next one does not', async () => {
    const archive = open();
    archive.map.offer('/law', elite(0.5), always);
    mkdirSync(path); // a directory is not renamed over
    await expect(archive.save()).rejects.toMatchObject({ code: 'INTERNAL' });
    rmSync(path, { recursive: true });
    await archive.save();
    expect(existsSync(path)).toBe(true);
    expect(open().map.rows()).toEqual(archive.map.rows());
  });

  it('does not start over a file that it may not read', () => {
    mkdirSync(path);
    expect(open).toThrow(expect.objectContaining({ code: 'INTERNAL' }));
  });
});
