import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { type Ran, runAsScript } from '../support/run-command.ts';

let dir: string;
beforeEach(() => {
  dir = mkdtempSync(join(tmpdir(), 'rankgate-placement-'));
});
afterEach(() => rmSync(dir, { recursive: true }));

async function run(problem: unknown, ...flags: string[]): Promise<Ran> {
  const file = join(dir, 'problem.json');
  writeFileSync(file, typeof problem === 'string' ? problem : JSON.stringify(problem));
  return runAsScript(['placement', file, ...flags]);
}

const problem = {
  replicas: [
    { name: 'x', pages: 8, capacity: 1 },
    { name: 'y', pages: 8, capacity: 2 },
  ],
  adapters: [
    { name: 'hot', pages: 4, load: 1.2, copies: 2, on: ['x'] },
    { name: 'cold', pages: 4, load: 0.1, on: ['y'] },
    { name: 'cool', pages: 2, load: 0.3, on: ['x'] },
  ],
  moveCost: 0.05,
};

describe('rankgate placement', () => {
  it('prints what each replica holds, and what it has to load', async () => {
    const { exitCode, out } = await run(problem);
    expect(exitCode).toBe(0);
    // To change places with cool, cold would cost more than the busiest gains.
    expect(out).toBe('x: hot cool\ny: +hot cold\nbusiest 90.0 %, 4 pages to load (+)\n');
  });

  it('as JSON, the same for the same seed', async () => {
    const once = await run(problem, '--json', '--seed', '7', '--iterations', '50');
    expect(JSON.parse(once.out)).toMatchObject({
      hosts: [['x', 'y'], ['y'], ['x']],
      missing: [],
      pagesToLoad: 4,
    });
    expect(await run(problem, '--json', '--seed', '7', '--iterations', '50')).toEqual(once);
  });

  it('says why there is none', async () => {
    const tooMany = { ...problem, adapters: [{ name: 'hot', pages: 4, load: 1, copies: 3 }] };
    const { exitCode, out, err } = await run(tooMany);
    expect([exitCode, out]).toEqual([1, '']);
    expect(err).toBe('hot wants 3 copies of 4 pages: 2 of 2 replicas could hold one\n');
    const inPieces = {
      ...problem,
      adapters: ['a', 'b', 'c'].map((name) => ({ name, pages: 5, load: 0 })),
    };
    expect((await run(inPieces)).err).toMatch(/^no room was found for every copy of [abc]\n$/);
  });

  it.each([
    ['{', /problem\.json: /],
    [{ ...problem, replicas: [] }, /replicas: /],
    [{ ...problem, adapters: [{ name: 'a', pages: 1 }] }, /adapters\.0\.load: /],
    [{ ...problem, speed: 1 }, /speed/],
    [{ ...problem, adapters: [problem.adapters[0], problem.adapters[0]] }, /hot is there twice/],
  ])('refuses what it does not understand: %j', async (bad, words) => {
    const { exitCode, err } = await run(bad);
    expect(exitCode).toBe(1);
    expect(err).toMatch(words);
  });

  it.each([
    ['--seed', '-1'],
    ['--seed', 'x'],
    ['--iterations', '1.5'],
    ['--iterations', '1e9'],
  ])('%s %s is wrong usage', async (flag, value) => {
    expect((await run(problem, `${flag}=${value}`)).exitCode).toBe(2);
  });
});
