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
import { basename, join } from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { fly } from '../../src/adapters/families/fly.ts';
import { createRandom } from '../../src/adapters/families/seeded-random.ts';
import { writeSafetensors } from '../../src/model/safetensors.ts';
import { testSite, trainedTensors } from '../support/family-site.ts';
import { type GatewayProcess, startGatewayProcess } from '../support/gateway-process.ts';
import {
  queryableConfig,
  queryableTensors,
  writeQueryable,
} from '../support/queryable-directory.ts';
import { type Ran, runAsScript } from '../support/run-command.ts';
import { goldenDirectory } from '../support/tiny-base.ts';

// The command line against the built gateway over the tiny model: uploads of two tenants, what each sees, and what is there
// after kill -9 in the middle of an upload.

const keys = {
  operator: 'the-operators-key',
  acme: 'the-key-of-acme-0',
  rival: 'the-key-of-rival',
};
const modelPath = join(import.meta.dirname, '../golden/tiny/tiny-f32.gguf');
let dataDir: string;
let gateway: GatewayProcess;

const start = (): Promise<GatewayProcess> =>
  startGatewayProcess({
    modelPath,
    dataDir,
    flags: ['--threads', '1', '--adapter-pages', '16', '--kv-cells', '512'],
    environment: {
      RANKGATE_ADMIN_KEYS: `${keys.operator},acme@${keys.acme},rival@${keys.rival}`,
    },
  });

beforeAll(async () => {
  dataDir = mkdtempSync(join(tmpdir(), 'rankgate-e2e-'));
  gateway = await start();
}, 180_000);
afterAll(async () => {
  await gateway[Symbol.asyncDispose]();
  rmSync(dataDir, { recursive: true, force: true });
});

type Who = keyof typeof keys;

const cli = (who: Who, ...args: string[]): Promise<Ran> =>
  runAsScript(['adapters', ...args, '--json'], {
    RANKGATE_URL: gateway.url,
    RANKGATE_API_KEY: keys[who],
  });

async function ask(
  who: Who,
  model: string,
): Promise<{ status: number; ids: string; text: string }> {
  const response = await gateway.post(
    '/v1/completions',
    { model, prompt: [294, 71, 293, 275], max_tokens: 8, temperature: 0 },
    { authorization: `Bearer ${keys[who]}` },
  );
  const ids = response.headers.get('x-adapter-id') ?? '';
  return { status: response.status, ids, text: await response.text() };
}

const textOf = ({ text }: { text: string }): string =>
  (JSON.parse(text) as { choices: { text: string }[] }).choices[0]!.text;

const add = (who: Who, name: string, directory: string, ...more: string[]) =>
  cli(who, 'add', name, directory, '--accept-base-name', 'rankgate/tiny-random', ...more);

/** Of one module of the tiny model. */
function writeFly(folder: string): void {
  const family = fly({ rank: 16, topK: 4, alpha: 64, seed: 7n, score: 'abs_plus_bias' });
  const site = testSite({ in: 64, out: 64 });
  const tensors = trainedTensors(family, site, createRandom(1n));
  const named = Object.entries(tensors).map(([name, { rows, columns, data }]) => {
    const bytes = new Uint8Array(Float32Array.from(data).buffer);
    return [`blk.0.attn_q.${name}`, { dtype: 'F32', shape: [columns, rows], data: bytes }] as const;
  });
  mkdirSync(folder);
  const config = { kind: 'fly', rank: 16, top_k: 4, alpha: 64, seed: '0000000000000007' };
  writeFileSync(join(folder, 'rankgate.json'), JSON.stringify(config));
  writeFileSync(join(folder, 'adapter_model.safetensors'), writeSafetensors(new Map(named)));
}

/** A ustar archive's files, without their folder, into `folder`. */
function untar(path: string, folder: string): string {
  const archive = readFileSync(path);
  mkdirSync(folder);
  for (let at = 0; archive[at] !== 0; ) {
    const name = archive.toString('latin1', at, archive.indexOf(0, at));
    const size = Number.parseInt(archive.toString('latin1', at + 124, at + 135), 8);
    writeFileSync(join(folder, basename(name)), archive.subarray(at + 512, at + 512 + size));
    at += 512 + 512 * Math.ceil(size / 512);
  }
  return folder;
}

describe('adapters from the command line', () => {
  it('are sent, used by their tenant, and not there for another', async () => {
    expect(await add('acme', 'acme/plain', goldenDirectory('plain-r4'))).toMatchObject({
      exitCode: 0,
    });
    const own = await ask('acme', 'acme/plain');
    expect([own.status, own.ids]).toEqual([200, 'acme/plain']);
    expect(textOf(own)).not.toBe(textOf(await ask('acme', gateway.modelName)));
    const theirs = await ask('rival', 'acme/plain');
    expect(theirs.status).toBe(404);
    expect(theirs.text.replaceAll('plain', 'NAME')).toBe(
      (await ask('rival', 'acme/other')).text.replaceAll('other', 'NAME'),
    );
    expect(JSON.parse((await cli('rival', 'list')).out)).toMatchObject({ data: [] });
    const taken = await add('rival', 'acme/plain', goldenDirectory('qv-r8'), '--replace');
    expect(taken).toMatchObject({ exitCode: 1, err: expect.stringContaining('forbidden') });
    expect(readdirSync(join(dataDir, 'uploads'))).toEqual([]);
  });

  it('of another family are served', async () => {
    const folder = join(dataDir, 'fly');
    writeFly(folder);
    const added = await cli('operator', 'add', 'sparse', folder);
    expect(added.err).toBe('');
    expect(JSON.parse(added.out)).toMatchObject({ kind: 'fly', rank_max: 16 });
    const answer = await ask('rival', 'sparse');
    expect([answer.status, answer.ids]).toEqual([200, 'sparse']);
    expect(textOf(answer)).not.toBe(textOf(await ask('rival', gateway.modelName)));
    const refused = await cli('operator', 'export', 'sparse', '--output', join(dataDir, 'x.tar'));
    expect(refused).toMatchObject({ exitCode: 1, err: expect.stringContaining('unsupported') });
  });

  it('of kind queryable share a bank, hear an instruction, and come back from an export', async () => {
    const first = { seed: 1, labels: ['legal', 'casual'], bank: { atoms: 2, seed: 50 } };
    const from = writeQueryable(
      join(dataDir, 'q1'),
      queryableConfig(first),
      queryableTensors(first),
    );
    const added = await cli('operator', 'add', 'asks', from);
    expect(added.err).toBe('');
    const { generation, needs } = JSON.parse(added.out) as Record<string, string>;
    // By its directory on the server, over the same bank and more atoms: both are served by one.
    const second = { seed: 2, labels: ['legal', 'casual', 'code'], bank: needs!, more: 1 };
    const folder = join(gateway.adaptersRoot, 'q2');
    writeQueryable(folder, queryableConfig(second), queryableTensors(second));
    const later = await cli('operator', 'add', 'later', folder, '--on-server');
    expect(JSON.parse(later.out)).toMatchObject({ kind: 'queryable', rank_max: 4 });
    const texts = new Set<string>();
    for (const name of ['asks', 'later', gateway.modelName, 'asks']) {
      const answer = await ask('rival', name);
      expect(answer.status, answer.text).toBe(200);
      texts.add(textOf(answer));
    }
    expect(texts.size).toBe(3);
    const shares: number[] = [];
    for (const prior_strength of [0, 0.25, 0.5, 1, 2]) {
      const response = await gateway.post(
        '/v1/completions',
        {
          ...{ model: 'asks', prompt: [294, 71, 293, 275], max_tokens: 1, temperature: 0 },
          ...{ instruction_prior: 'legal', prior_strength },
        },
        { authorization: `Bearer ${keys.rival}` },
      );
      const { rankgate } = (await response.json()) as { rankgate: { atoms: number[][][] } };
      const [blocks = []] = rankgate.atoms;
      shares.push(blocks.reduce((sum, [named = 0]) => sum + named / blocks.length, 0));
    }
    expect(shares).toEqual([...shares].sort((x, y) => x - y));
    expect(new Set(shares).size).toBe(5);
    const file = join(dataDir, 'asks.tar');
    await cli('operator', 'export', 'asks', '--output', file);
    const again = await cli('operator', 'add', 'copy', untar(file, join(dataDir, 'q3')));
    expect(JSON.parse(again.out)).toMatchObject({ generation, needs });
  });

  it('and their aliases and pins outlive kill -9; half an upload does not', async () => {
    expect(await cli('acme', 'alias', 'acme/second', 'acme/plain')).toMatchObject({ exitCode: 0 });
    expect(await cli('operator', 'pin', 'acme/plain')).toMatchObject({ exitCode: 0 });
    const before = await ask('acme', 'acme/second');
    expect(before.ids).toBe('acme/plain');
    const body = new ReadableStream({
      start(controller) {
        const part = (name: string) =>
          `--x\r\nContent-Disposition: form-data; name="${name}"\r\n\r\n`;
        const text = `${part('name')}acme/half\r\n${part('adapter_config.json')}{}`;
        controller.enqueue(
          new TextEncoder().encode(`${text}\r\n${part('adapter_model.safetensors')}`),
        );
      },
    });
    const half = gateway
      .fetch('/v1/adapters', {
        method: 'POST',
        duplex: 'half',
        headers: {
          authorization: `Bearer ${keys.acme}`,
          'content-type': 'multipart/form-data; boundary=x',
        },
        body,
      } as RequestInit)
      .catch(() => null);
    await expect.poll(() => readdirSync(join(dataDir, 'uploads'))).toHaveLength(1);
    await gateway.stop('SIGKILL');
    await half;
    gateway = await start();
    expect(existsSync(join(dataDir, 'uploads'))).toBe(false);
    const shown = JSON.parse((await cli('acme', 'show', 'acme/second')).out);
    expect(shown).toMatchObject({ name: 'acme/plain', aliases: ['acme/second'], pinned: true });
    expect(textOf(await ask('acme', 'acme/second'))).toBe(textOf(before));
    const removed = await cli('acme', 'rm', 'acme/plain');
    expect(removed).toMatchObject({ exitCode: 1, err: expect.stringContaining('adapter_in_use') });
  }, 180_000);
});
