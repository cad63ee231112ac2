import { readdirSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { expect, it } from 'vitest';

const root = join(import.meta.dirname, '../..');

it('docs/structure.md has one line for every file of src and no other', () => {
  const files = readdirSync(join(root, 'src'), { recursive: true, encoding: 'utf8' }).filter(
    (name) => /\.(ts|c)$/.test(name),
  );
  const page = readFileSync(join(root, 'docs/structure.md'), 'utf8');
  const named = [...page.matchAll(/^- `([^`]+)` \S/gm)].map((match) => match[1]!);
  expect(files.length).toBeGreaterThan(20);
  expect(named.length).toBe(new Set(named).size);
  expect(files.filter((name) => !named.includes(name))).toEqual([]);
  expect(named.filter((name) => !files.includes(name))).toEqual([]);
});
