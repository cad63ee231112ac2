import { mkdirSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { createServer, type Server } from 'node:http';
import type { AddressInfo } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { createBlobStore } from '../../src/adapters/blobs.ts';
import { generationOf, openPacked } from '../../src/adapters/pack.ts';
import type { Packed } from '../../src/adapters/pack-pairs.ts';
import { packedConfig } from '../../src/adapters/packed-import.ts';
import { LossesAlone } from '../../src/trainer/compare.ts';
import { gainAurac } from '../../src/trainer/evaluation.ts';
import { writePublished } from '../../src/trainer/publish.ts';
import { TrainingSession } from '../../src/trainer/session.ts';
import { tinyPath } from '../support/open-test-decoder.ts';
import { runAsScript } from '../support/run-command.ts';
import { goldenDirectory } from '../support/tiny-base.ts';
import { openTinyBase, tinyEncoder, tinyRecipe } from '../support/training-base.ts';

const breathe = async (): Promise<void> => {};
const words = 'one two three four five six seven'.split(' ');
const line = (i: number) => {
  const [prompt, completion] = [`after ${words[i % 7]} ${i}`, ` ${words[(i + 1) % 7]}`];
  return { prompt, completion };
};
const lines = Array.from({ length: 40 }, (_, i) => line(i));

let root: string;
let data: string;
let dataDir: string;
let few: Packed;
let more: Packed;

/** Two adapters of the same start, of 4 steps and of 24; and one whose tokens choose ranks. */
beforeAll(async () => {
  root = mkdtempSync(join(tmpdir(), 'rankgate-compare-'));
  data = join(root, 'data.jsonl');
  dataDir = join(root, 'data');
  writeFileSync(data, lines.map((one) => JSON.stringify(one)).join('\n'));
  const base = await openTinyBase();
  using _ = base.kernels;
  const encode = tinyEncoder(48);
  const training = lines.map((one) => encode({ kind: 'text', ...one }));
  const open = (recipe: object) =>
    new TrainingSession({
      ...{ base, training, heldOut: [], start: null },
      recipe: tinyRecipe({ stepsMax: 24, learningRate: 1e-2, ...recipe }),
    });
  using session = open({});
  while (session.step < 4) await session.takeStep(breathe);
  few = session.publish();
  while (session.step < 24) await session.takeStep(breathe);
  more = session.publish();
  using routed = open({ kind: 'fly', rank: 8 });
  await routed.takeStep(breathe);
  for (const [name, { bytes }] of Object.entries({ few, more })) {
    await writePublished(join(root, name), { config: packedConfig, bytes });
  }
  await writePublished(join(root, 'fly'), routed.files());
  await createBlobStore(join(dataDir, 'blobs')).put(more.bytes);
});
afterAll(() => rmSync(root, { recursive: true }));

async function compare(a: string, b: string, ...flags: string[]) {
  const args = ['adapters', 'compare', a, b, '--data', data, '--model', tinyPath];
  const all = [...args, '--threads', '1', ...flags];
  return runAsScript(all, { RANKGATE_DATA_DIR: dataDir, ...environment });
}
let environment: NodeJS.ProcessEnv = {};
const at = (name: string): string => join(root, name);

describe('rankgate adapters compare', () => {
  it('says who is better at each rank, by how much, and that it is no accident', async () => {
    const { exitCode, out, err } = await compare(at('few'), at('more'), '--json', '--window', '48');
    expect({ exitCode, err }).toEqual({ exitCode: 0, err: '' });
    const got = JSON.parse(out);
    expect(got).toMatchObject({
      examples: 40,
      winner: 'b',
      base: { score: null },
      a: { generation: generationOf(few.bytes), kind: 'matryoshka', rank_max: 4 },
      b: { generation: generationOf(more.bytes) },
      tournament: { resolved: true },
    });
    expect(got.ranks.map(({ rank }: { rank: number }) => rank)).toEqual([1, 2, 4]);

    // Against each example's own loss, computed beside it.
    const base = await openTinyBase();
    using _ = base.kernels;
    const encode = tinyEncoder(48);
    const heldOut = lines.map((one) => encode({ kind: 'text', ...one }));
    using alone = new LossesAlone({ base, heldOut, guard: [], breathe }, 4);
    const mean = (values: readonly number[]): number =>
      values.reduce((sum, value) => sum + value, 0) / values.length;
    const none = mean(await alone.ofBase());
    expect(got.base.loss).toBeCloseTo(none, 6);
    const curves: { rank: number; loss: number }[][] = [[], []];
    for (const [i, rank] of [1, 2, 4].entries()) {
      const [a, b] = [
        await alone.heldOutAt(openPacked(few.bytes, generationOf(few.bytes)), rank),
        await alone.heldOutAt(openPacked(more.bytes, generationOf(more.bytes)), rank),
      ];
      const row = got.ranks[i];
      expect(row.losses[0]).toBeCloseTo(mean(a), 6);
      expect(row.losses[1]).toBeCloseTo(mean(b), 6);
      expect(row.won[1]).toBe(b.filter((loss, e) => loss < a[e]!).length);
      expect(row.scores).toBeNull();
      curves[0]!.push({ rank, loss: mean(a) });
      curves[1]!.push({ rank, loss: mean(b) });
    }
    const [areaA, areaB] = curves.map((curve) => gainAurac(none, curve));
    expect(got.a.aurac.v1).toBeCloseTo(areaA!.v1, 6);
    expect(got.b.aurac.v2).toBeCloseTo(areaB!.v2, 6);
    expect(got.gain.v1).toBeCloseTo(areaB!.v1 - areaA!.v1, 6);
    expect(got.gain.v1).toBeGreaterThan(2 * got.gain.error);
    const { games, masses } = got.tournament;
    expect(games).toBeLessThan(3 * 40); // of three pairs: known before every example was played
    expect(masses[2]).toBeGreaterThan(0.99);
    expect(masses.reduce((sum: number, mass: number) => sum + mass, 0)).toBeCloseTo(1, 9);
  });

  it('is told the other way round by the same numbers', async () => {
    const args = ['--json', '--window', '48', '--ranks', '4'];
    const [one, other] = [
      JSON.parse((await compare(at('few'), at('more'), ...args)).out),
      JSON.parse((await compare(at('more'), at('few'), ...args)).out),
    ];
    expect(other.winner).toBe('a');
    expect(other.gain.v1).toBeCloseTo(-one.gain.v1, 9);
    expect(other.ranks[0].losses).toEqual([...one.ranks[0].losses].reverse());
  });

  it('proves nothing of an adapter and itself, or by a few examples', async () => {
    const same = JSON.parse((await compare(at('more'), at('more'), '--json')).out);
    expect(same).toMatchObject({ winner: null, gain: { v1: 0, v2: 0 } });
    expect(same.tournament.resolved).toBe(false);
    expect(same.ranks[0].won).toEqual([0, 0]);
    const args = ['--examples', '8', '--json'];
    const little = JSON.parse((await compare(at('few'), at('more'), ...args)).out);
    expect(little).toMatchObject({ examples: 8, winner: null });
    expect(little.gain.v1).toBeGreaterThan(0);
  });

  it('draws by the seed where there are more examples than are wanted', async () => {
    const lossOf = async (seed: string): Promise<number> => {
      const args = ['--examples', '5', '--ranks', '1', '--seed', seed, '--json'];
      return JSON.parse((await compare(at('few'), at('more'), ...args)).out).base.loss;
    };
    expect(await lossOf('1')).toBe(await lossOf('1'));
    expect(await lossOf('1')).not.toBe(await lossOf('2'));
  });

  it('scores answers where a reward is asked for, and prints a table', async () => {
    const reward = JSON.stringify({ kind: 'similarity', metric: 'fuzzy_match' });
    const flags = ['--reward', reward, '--answer-tokens', '8', '--examples', '20'];
    const { exitCode, out, err } = await compare(at('few'), at('more'), ...flags);
    expect(exitCode, err).toBe(0);
    const rows = out.split('\n').map((row) => row.trim().split(/\s{2,}/));
    expect(rows[1]).toEqual([
      ...['rank', 'loss of A', 'of B', 'won by A', 'by B', 'score of A', 'of B'],
    ]);
    expect(rows[2]![0]).toBe('base');
    expect(rows.slice(3, 6).map(([rank]) => rank)).toEqual(['1', '2', '4']);
    const [, , , , , scoreA, scoreB] = rows[5]!.map(Number);
    expect(scoreB).toBeGreaterThan(Number(rows[2]![3])); // better than the base's answers
    expect(scoreB).toBeGreaterThan(scoreA!);
    expect(out).toMatch(/B gains \d\.\d{4} nats of AURAC over A, .*: B is better\n$/);
    expect(err).toContain('losses of B at rank 4\n');
    expect(err).toContain('scores of the base\n');
  });

  it('takes PEFT’s directories, generations of the data directory, and names', async () => {
    const generation = generationOf(more.bytes);
    const server: Server = createServer((request, response) => {
      response.writeHead(request.url === '/v1/adapters/support' ? 200 : 404);
      response.end(JSON.stringify({ generation, error: { code: 'x', message: 'none' } }));
    });
    await new Promise<void>((done) => server.listen(0, '127.0.0.1', done));
    environment = { RANKGATE_URL: `http://127.0.0.1:${(server.address() as AddressInfo).port}` };
    try {
      const by = async (a: string, b: string) =>
        JSON.parse((await compare(a, b, '--ranks', '4', '--examples', '4', '--json')).out);
      const peft = await by(goldenDirectory('plain-r4'), generation);
      expect(peft.a).toMatchObject({ kind: 'lora', rank_max: 4 });
      expect(peft.b.generation).toBe(generation);
      const named = await by(`old@${generation}`, 'support');
      expect(named.a).toEqual(named.b);
      expect(named.ranks[0].losses[0]).toBe(peft.ranks[0].losses[1]);
      expect(await compare('nobody', 'support')).toMatchObject({ exitCode: 1, err: 'none\n' });
      const gone = await compare(`x@sha256:${'0'.repeat(64)}`, 'support');
      expect(gone.err).toContain('is not stored');
    } finally {
      server.close();
      environment = {};
    }
  });

  it.each<[string, string[], number, string]>([
    ['no adapter of pairs', ['fly', 'more'], 1, 'a fly adapter is more than low-rank pairs'],
    ['ranks that fall', ['few', 'more', '--ranks', '4,2'], 2, '--ranks: want rising ranks'],
    ['a reward without its fields', ['few', 'more', '--reward', 'similarity'], 2, 'metric'],
    ['a reward that there is not', ['few', 'more', '--reward', 'feedback'], 2, '--reward: kind'],
    ['no examples', ['few', 'more', '--examples', '0'], 2, '--examples: want an integer from 1'],
  ])('refuses %s', async (_, [a, b, ...flags], code, message) => {
    const { exitCode, err } = await compare(at(a!), at(b!), ...flags);
    expect([exitCode, err]).toEqual([code, expect.stringContaining(message)]);
  });

  it('names what is wrong with the file, or that there is none', async () => {
    const folder = at('bad');
    mkdirSync(folder);
    const path = join(folder, 'bad.jsonl');
    writeFileSync(path, '{"prompt":"x","completion":"y"}\n{}\n');
    const args = ['adapters', 'compare', at('few'), at('more'), '--model', tinyPath];
    const environment = { RANKGATE_DATA_DIR: dataDir };
    const bad = await runAsScript([...args, '--data', path], environment);
    expect(bad).toMatchObject({ exitCode: 1, err: expect.stringContaining('line 2') });
    expect((await runAsScript(args, environment)).err).toContain('--data is wanted');
  });
});
