// Process start → first token on a warm page cache: a Node process that opens the model and generates one token after a
// prompt of 30, rankgate's engine against node-llama-cpp on the same file; and the whole gateway, asked over HTTP. What runs
// is the built JavaScript, as users run it. Starts of all sides alternate.

import { type ChildProcess, spawn } from 'node:child_process';
import { mkdirSync } from 'node:fs';
import { join } from 'node:path';
import { createInterface } from 'node:readline';
import { pathToFileURL } from 'node:url';
import { sha256OfFile } from '../src/model/file-hash.ts';
import { type Report, round, seriesOf } from './measure.ts';
import { takePrompts } from './prompts.ts';

export interface ColdstartSettings {
  readonly modelPath: string;
  readonly threads: number;
  readonly rounds: number;
  readonly folder: string;
}

interface Start {
  readonly ms: number;
  readonly cpuMs: number;
  readonly token: number;
}

const promptTokens = 30;
const cells = 512;
const startMsMax = 120_000;

export async function benchColdstart(settings: ColdstartSettings): Promise<Report> {
  const { modelPath, threads, rounds, folder } = settings;
  const cacheDirectory = join(folder, 'cache');
  mkdirSync(cacheDirectory);
  const [prompt] = takePrompts(1, promptTokens);
  await buildDist();
  const shared = { modelPath, threads, prompt, cells };
  const ours = { ...shared, side: 'rankgate', modelHash: await sha256OfFile(modelPath) };
  const sides: Readonly<Record<string, () => Promise<Start>>> = {
    faithful: () => start({ ...ours, mode: 'faithful', cacheDirectory }),
    parity: () => start({ ...ours, mode: 'parity', cacheDirectory: null }),
    node_llama_cpp: () => start({ ...shared, side: 'node-llama-cpp' }),
    gateway: () => startGateway(settings),
  };
  const names = Object.keys(sides);
  const starts = new Map<string, Start[]>(names.map((name) => [name, []]));
  // The first round is thrown away: it reads the files from disk and writes the weight cache.
  for (let index = -1; index < rounds; index++) {
    for (let i = 0; i < names.length; i++) {
      const name = names[(i + Math.max(0, index)) % names.length]!;
      const one = await sides[name]!();
      if (index >= 0) starts.get(name)!.push(one);
    }
  }
  return reportOf(starts);
}

function reportOf(starts: ReadonlyMap<string, readonly Start[]>): Report {
  const of = (name: string, key: keyof Start): number[] => starts.get(name)!.map((one) => one[key]);
  const series = Object.fromEntries(
    [...starts.keys()].flatMap((name) => [
      [`${name}_ms`, seriesOf('ms', of(name, 'ms'))],
      ...(name === 'gateway' ? [] : [[`${name}_cpu_ms`, seriesOf('ms', of(name, 'cpuMs'))]]),
    ]),
  ) as Report['series'];
  const ratio = (name: string, kind: 'ms' | 'cpu_ms'): number =>
    round(series[`${name}_${kind}`]!.median / series[`node_llama_cpp_${kind}`]!.median);
  const isSame = of('parity', 'token')[0] === of('node_llama_cpp', 'token')[0];
  return {
    bench: 'coldstart',
    figures: {
      ratio_to_llamacpp: ratio('faithful', 'ms'),
      parity_ratio_to_llamacpp: ratio('parity', 'ms'),
      gateway_ratio_to_llamacpp: ratio('gateway', 'ms'),
      cpu_ratio_to_llamacpp: ratio('faithful', 'cpu_ms'),
      same_token_parity: isSame ? 1 : 0,
    },
    series,
    sides: {
      faithful: 'engine in one Node process, default weights, converted weights cached if any are',
      parity: 'the same with the file’s own types',
      gateway: 'rankgate serve: gateway, engine process, text thread; a chat answer of one token',
      node_llama_cpp: 'node-llama-cpp 3.21.1, its prebuilt library, nothing built',
    },
    notes: [`prompt of ${promptTokens} tokens, ${cells} cells; page cache warm`],
  };
}

const root = join(import.meta.dirname, '..');

/** By `npm start`'s own rule. */
async function buildDist(): Promise<void> {
  const url = pathToFileURL(join(root, 'scripts/prepare.mjs')).href;
  const { build } = (await import(url)) as { build(): void };
  build();
}

interface Running {
  readonly child: ChildProcess;
  /** Resolves with the first line of standard output that is JSON; rejects when there is none. */
  readonly line: Promise<Readonly<Record<string, unknown>>>;
}

function run(args: readonly string[]): Running {
  const child = spawn(process.execPath, args, {
    stdio: ['ignore', 'pipe', 'pipe'],
    timeout: startMsMax,
    killSignal: 'SIGKILL',
  });
  let errors = '';
  child.stderr.setEncoding('utf8').on('data', (text: string) => {
    errors = (errors + text).slice(-4000);
  });
  const line = new Promise<Readonly<Record<string, unknown>>>((resolve, reject) => {
    child.once('close', (code) => reject(new Error(`a start ended with ${code}: ${errors}`)));
    createInterface({ input: child.stdout }).on('line', (text) => {
      if (text.startsWith('{')) resolve(JSON.parse(text) as Readonly<Record<string, unknown>>);
    });
  });
  return { child, line };
}

async function start(options: object): Promise<Start> {
  const beginMs = performance.now();
  const { child, line } = run([
    join(import.meta.dirname, 'coldstart-child.mjs'),
    JSON.stringify(options),
  ]);
  const { token, cpuMs } = await line;
  const ms = performance.now() - beginMs;
  await ended(child);
  return { ms, token: Number(token), cpuMs: Number(cpuMs) };
}

async function ended(child: ChildProcess): Promise<void> {
  if (child.exitCode === null && child.signalCode === null) {
    await new Promise((resolve) => child.once('exit', resolve));
  }
}

async function startGateway({ modelPath, threads, folder }: ColdstartSettings): Promise<Start> {
  const beginMs = performance.now();
  const flags = ['--model', modelPath, '--data-dir', join(folder, 'gateway'), '--port', '0'];
  const rest = ['--threads', String(threads), '--log', 'none', '--json'];
  const { child, line } = run([join(root, 'dist/cli.js'), 'serve', ...flags, ...rest]);
  try {
    const { url, model } = await line;
    await askForOneToken(String(url), String(model));
    return { ms: performance.now() - beginMs, cpuMs: Number.NaN, token: Number.NaN };
  } finally {
    child.kill('SIGTERM');
    await ended(child);
  }
}

async function askForOneToken(url: string, model: string): Promise<void> {
  const messages = [{ role: 'user', content: 'What is the capital of France?' }];
  const response = await fetch(`${url}/v1/chat/completions`, {
    method: 'POST',
    headers: { 'content-type': 'application/json' },
    body: JSON.stringify({ model, messages, temperature: 0, max_tokens: 1 }),
  });
  const text = await response.text();
  const isAnswered = response.ok && /"completion_tokens":1\b/.test(text);
  if (!isAnswered) throw new Error(`the gateway answered ${response.status} ${text}`);
}
