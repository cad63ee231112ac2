import { readdirSync, readFileSync } from 'node:fs';
import { dirname, join, relative } from 'node:path';
import { describe, expect, it } from 'vitest';

// The rules of the tree that no linter holds: the layer table of docs/structure.md, reachability, size, banned words.

const root: string = join(import.meta.dirname, '..');
const linesMax = 47_500; // docs/decisions/2026-11-25-line-budget-5.md; raised only by another record

/** A folder may import itself and what is listed for it. */
const layers: Readonly<Record<string, readonly string[]>> = {
  server: ['router', 'engine', 'jobs', 'adapters', 'model'],
  router: ['engine', 'adapters', 'model'],
  engine: ['adapters', 'model', 'kernels'],
  trainer: ['jobs', 'adapters', 'model', 'kernels'],
  jobs: ['adapters', 'model'],
  adapters: ['model', 'kernels'],
  model: ['kernels'],
  kernels: [],
};
/** Entry points of processes and threads: reached by name, not by import. */
const entries = [
  'main.ts',
  'cli.ts',
  'engine/engine-process.ts',
  'engine/text-worker.ts',
  'adapters/import-worker.ts',
  'trainer/trainer-process.ts',
  'model/training-decoder.ts', // bench trainstep; the trainer's when it is there
  'adapters/families/lora.ts', // what the trainer of step 4 makes: imports come as PEFT
];
/** Folders of the gateway process: they must not reach native tensor code (design.md section 1). */
const gatewayFolders = ['server', 'router', 'jobs'];

interface Source {
  readonly path: string;
  readonly text: string;
  readonly imports: readonly string[];
}

function readTree(folder: string, ending: string): Source[] {
  return readdirSync(join(root, folder), { recursive: true, encoding: 'utf8' })
    .filter((name) => name.endsWith(ending))
    .map((name) => {
      const path = join(folder, name);
      const text = readFileSync(join(root, path), 'utf8');
      const imports = [...text.matchAll(/(?:from|import\()\s*'(\.[^']+)'/g)].map((match) =>
        relative(root, join(root, dirname(path), match[1]!)),
      );
      return { path, text, imports };
    });
}

const sources: Source[] = readTree('src', '.ts');
const folderOf = (path: string): string => path.split('/').slice(1, -1)[0] ?? '';

describe('tidy', () => {
  it('reads a plausible number of files', () => {
    expect(sources.length).toBeGreaterThan(10);
  });

  it('a folder imports only to its right', () => {
    const upward = sources.flatMap((source) =>
      source.imports
        .filter((target) => {
          const [from, to] = [folderOf(source.path), folderOf(target)];
          return from !== '' && to !== '' && from !== to && !layers[from]?.includes(to);
        })
        .map((target) => `${source.path} -> ${target}`),
    );
    expect(upward).toEqual([]);
  });

  it('the gateway folders never import kernels', () => {
    const native = sources.filter(
      (source) =>
        gatewayFolders.includes(folderOf(source.path)) &&
        (source.imports.some((target) => folderOf(target) === 'kernels') ||
          source.text.includes("'koffi'")),
    );
    expect(native.map((source) => source.path)).toEqual([]);
  });

  it('every file is reached from an entry point', () => {
    const byPath = new Map(sources.map((source) => [source.path, source]));
    const reached = new Set<string>();
    const queue = entries.map((entry) => `src/${entry}`);
    for (let path = queue.pop(); path !== undefined; path = queue.pop()) {
      const source = byPath.get(path);
      if (reached.has(path) || source === undefined) continue;
      reached.add(path);
      queue.push(...source.imports);
    }
    expect(sources.map((source) => source.path).filter((path) => !reached.has(path))).toEqual([]);
  });

  it('holds no leftovers and stays within the line budget', () => {
    const banned = /\bFIXME\b|\.only\(|@ts-ignore|@ts-nocheck/;
    const tests = readTree('test', '.ts').filter((source) => !source.path.endsWith('tidy.test.ts'));
    const bad = [...sources, ...tests].filter((source) => banned.test(source.text));
    expect(bad.map((source) => source.path)).toEqual([]);
    const lines = sources.reduce((sum, source) => sum + source.text.split('\n').length, 0);
    expect(lines).toBeLessThanOrEqual(linesMax);
  });
});
