// A real gateway for end-to-end tests: the built CLI in a process of its own, on a free port, over its own data directory.

import { type ChildProcess, spawn } from 'node:child_process';
import { once } from 'node:events';
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { createInterface } from 'node:readline';
import { pathToFileURL } from 'node:url';

const root = join(import.meta.dirname, '../..');

interface Prepare {
  build(): void;
}

export interface GatewayOptions {
  readonly modelPath: string;
  readonly flags?: readonly string[];
  readonly environment?: Readonly<Record<string, string>>;
  /** Kept between starts by the caller; a fresh temporary one otherwise. */
  readonly dataDir?: string;
}

export interface LogLine {
  readonly [key: string]: unknown;
}

export interface GatewayProcess extends AsyncDisposable {
  readonly url: string;
  readonly pid: number;
  readonly dataDir: string;
  /** Directory that adapters may be added from. */
  readonly adaptersRoot: string;
  readonly modelName: string;
  readonly log: readonly LogLine[];
  fetch(path: string, init?: RequestInit): Promise<Response>;
  post(path: string, body: unknown, headers?: Record<string, string>): Promise<Response>;
  /** Process ids of the engine: the gateway's only child processes that load a model. */
  enginePid(): Promise<number>;
  stop(signal: NodeJS.Signals): Promise<number | null>;
}

/** Resolves when the gateway says it is ready. Fails with its last words when it ends instead. */
export async function startGatewayProcess(options: GatewayOptions): Promise<GatewayProcess> {
  const prepare = (await import(pathToFileURL(join(root, 'scripts/prepare.mjs')).href)) as Prepare;
  prepare.build();
  const dataDir = options.dataDir ?? mkdtempSync(join(tmpdir(), 'rankgate-'));
  const flags = ['--model', options.modelPath, '--data-dir', dataDir, '--port', '0', '--json'];
  const child = spawn(
    process.execPath,
    [join(root, 'dist/cli.js'), 'serve', ...flags, ...(options.flags ?? [])],
    {
      // The tests' own tier is no setting of the gateway.
      env: { ...process.env, RANKGATE_TIER: undefined, ...options.environment },
      stdio: ['ignore', 'pipe', 'pipe'],
    },
  );
  const errors: string[] = [];
  child.stderr.setEncoding('utf8').on('data', (text: string) => errors.push(text));
  const log: LogLine[] = [];
  const ready = await waitForReady(child, log, errors);
  const { url, model } = ready;
  return {
    url,
    pid: child.pid!,
    dataDir,
    adaptersRoot: join(dataDir, 'incoming'),
    modelName: model,
    log,
    fetch: (path, init) => fetch(`${url}${path}`, init),
    post: (path, body, headers = {}) =>
      fetch(`${url}${path}`, {
        method: 'POST',
        headers: { 'content-type': 'application/json', ...headers },
        body: JSON.stringify(body),
      }),
    enginePid: () => childOf(child.pid!),
    stop: (signal) => stopProcess(child, signal),
    async [Symbol.asyncDispose]() {
      await stopProcess(child, 'SIGTERM');
      if (options.dataDir === undefined) rmSync(dataDir, { recursive: true, force: true });
    },
  };
}

async function waitForReady(
  child: ChildProcess,
  log: LogLine[],
  errors: readonly string[],
): Promise<{ url: string; model: string }> {
  const lines = createInterface({ input: child.stdout! });
  return new Promise((resolve, reject) => {
    child.once('exit', (code) =>
      reject(new Error(`the gateway ended with ${code}: ${errors.join('').slice(-2000)}`)),
    );
    lines.on('line', (line) => {
      const entry = JSON.parse(line) as LogLine;
      if (entry.event === 'ready') resolve(entry as unknown as { url: string; model: string });
      else log.push(entry);
    });
  });
}

async function stopProcess(child: ChildProcess, signal: NodeJS.Signals): Promise<number | null> {
  if (child.exitCode !== null || child.signalCode !== null) return child.exitCode;
  child.kill(signal);
  const [code] = (await once(child, 'exit')) as [number | null];
  return code;
}

async function childOf(pid: number): Promise<number> {
  const { readFile } = await import('node:fs/promises');
  const text = await readFile(`/proc/${pid}/task/${pid}/children`, 'utf8');
  const children = text.trim().split(/\s+/).filter(Boolean).map(Number);
  if (children.length !== 1) throw new Error(`the gateway has ${children.length} children`);
  return children[0]!;
}

/** The data of every event of a stream, `[DONE]` included as the string. */
export async function* readEvents(response: Response): AsyncGenerator<string> {
  const decoder = new TextDecoder();
  let rest = '';
  for await (const bytes of response.body!) {
    rest += decoder.decode(bytes as Uint8Array, { stream: true });
    const blocks = rest.split('\n\n');
    rest = blocks.pop()!;
    for (const block of blocks) {
      if (block.startsWith('data: ')) yield block.slice('data: '.length);
    }
  }
}
