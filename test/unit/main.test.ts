import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { mkdirSync, mkdtempSync, rmSync, statSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { createInterface } from 'node:readline';
import { expect, it } from 'vitest';
import { loadConfig } from '../../src/config.ts';
import { startGateway } from '../../src/main.ts';
import { fetchBaseModel } from '../../src/model/model-source.ts';

const tiny = join(import.meta.dirname, '../golden/tiny/tiny-f32.gguf');

it('closes whole when it cannot keep what it has learned', async () => {
  const dataDir = mkdtempSync(join(tmpdir(), 'rankgate-main-'));
  const flags = { model: tiny, 'data-dir': dataDir, port: '0', threads: '1', log: 'none' };
  const config = loadConfig({ flags, environment: {} });
  const model = await fetchBaseModel(config.model, { dir: join(dataDir, 'models') });
  mkdirSync(join(dataDir, 'latency.json')); // Neither read nor replaced.
  const gateway = await startGateway(config, model);
  const pid = gateway.enginePid()!;
  process.kill(pid, 0);
  await gateway.close();
  expect(() => process.kill(pid, 0)).toThrow(expect.objectContaining({ code: 'ESRCH' }));
  // The registry is no longer held.
  const next = await startGateway(config, model);
  await next.close();
  expect(statSync(join(dataDir, 'latency.json')).isDirectory()).toBe(true);
  rmSync(dataDir, { recursive: true });
}, 60_000);

it('goes on serving when nobody reads its log any more', async () => {
  const dataDir = mkdtempSync(join(tmpdir(), 'rankgate-main-'));
  const cli = join(import.meta.dirname, '../../src/cli.ts');
  const flags = ['--model', tiny, '--data-dir', dataDir, '--port', '0', '--threads', '1'];
  const gateway = spawn(process.execPath, ['--import', 'tsx', cli, 'serve', '--json', ...flags], {
    stdio: ['ignore', 'pipe', 'ignore'],
  });
  const exit = once(gateway, 'exit');
  const [line] = (await once(createInterface(gateway.stdout), 'line')) as [string];
  const { url } = JSON.parse(line) as { url: string };
  gateway.stdout.destroy();
  await once(gateway.stdout, 'close');
  // Each request logs a line; the pipe breaks at the first.
  for (let i = 0; i < 3; i++) expect((await fetch(`${url}/v1/models`)).status).toBe(200);
  gateway.kill('SIGTERM');
  expect(await exit).toEqual([0, null]);
  rmSync(dataDir, { recursive: true });
}, 60_000);
