// The commands of `rankgate`, each a few lines. Output goes through `Terminal`, so that tests read it; results go to
// stdout (one JSON value with --json), everything else to stderr. Exit codes: 0 done, 1 failed or refused, 2 wrong usage,
// 3 no server answers.

import { readFileSync } from 'node:fs';
import { writeFile } from 'node:fs/promises';
import { join, resolve } from 'node:path';
import { parseArgs } from 'node:util';
import { type Config, clientDefaults, configFlags, loadConfig } from './config.ts';
import { examine, measureWeights } from './doctor.ts';
import { GatewayError } from './errors.ts';
import { type Call, CommandError, callGateway } from './gateway-client.ts';
import { findBaseModel } from './model/model-source.ts';
import { fetchModel, serve } from './serve.ts';
import type { Terminal } from './terminal.ts';

export const usage = `rankgate serve [--config file] [--model …] [--port 8080] [--threads n] [--weights faithful|fast|parity] …
rankgate adapters add NAME DIRECTORY [--accept-base-name NAME] [--replace [--expect GENERATION]]
rankgate adapters list
rankgate adapters show NAME
rankgate adapters swap NAME GENERATION [--expect GENERATION]
rankgate adapters rollback NAME
rankgate adapters export NAME [--rank K] [--output FILE]
rankgate adapters rm NAME [--expect GENERATION]
rankgate doctor [--measure] [--config file] …
rankgate --version
Every command takes --json. The adapters commands talk to a running server: --url, or RANKGATE_URL; RANKGATE_API_KEY.
`;

type Flags = Readonly<Record<string, string | boolean>>;
type FlagTypes = Readonly<Record<string, { readonly type: 'string' | 'boolean' }>>;

interface Invocation {
  readonly flags: Flags;
  readonly positionals: readonly string[];
  readonly terminal: Terminal;
}

interface Command {
  readonly flags: FlagTypes;
  /** Names of the positional arguments; all are needed. */
  readonly positionals: readonly string[];
  run(invocation: Invocation): Promise<void>;
}

const json = { json: { type: 'boolean' } } as const;
const expecting = { expect: { type: 'string' } } as const;
const timeoutMs = 10 * 60 * 1000; // an import of a large adapter is minutes of work

const usageError = (message: string): CommandError => new CommandError(2, 'USAGE', message);
const text = (value: string | boolean | undefined): string | undefined =>
  typeof value === 'string' ? value : undefined;

/** A command that is one call to a running server. */
function clientCommand(
  positionals: readonly string[],
  flagTypes: FlagTypes,
  callOf: (invocation: Invocation) => Call,
  print: (answer: Response, invocation: Invocation) => Promise<void> = show,
): Command {
  return {
    flags: { ...json, url: { type: 'string' }, ...flagTypes },
    positionals,
    async run(invocation) {
      const { flags, terminal } = invocation;
      const defaults = clientDefaults(terminal.environment);
      const url = text(flags.url) ?? defaults.url;
      if (!URL.canParse(url)) throw usageError(`--url: not a URL: ${url}`);
      const options = { url, apiKey: defaults.apiKey, timeoutMs };
      await print(await callGateway(options, callOf(invocation)), invocation);
    },
  };
}

interface Described {
  readonly name: string;
  readonly generation: string;
  readonly rank_max: number;
  readonly bytes: number;
  readonly leases: number;
  readonly residency: { readonly tier: string };
  readonly warnings?: readonly string[];
}

function lineOf(adapter: Described): string {
  const { name, generation, rank_max: rankMax, bytes, residency, leases } = adapter;
  const size = `${(bytes / 1e6).toFixed(1)} MB`;
  return `${name}  ${generation.slice(0, 19)}…  rank ${rankMax}  ${size}  ${residency.tier}  in use ${leases}\n`;
}

/** Prints the server's answer as it came, or as one line an adapter. */
async function show(response: Response, { flags, terminal }: Invocation): Promise<void> {
  const answer = (await response.json()) as Described | { readonly data: readonly Described[] };
  if (flags.json) {
    terminal.out(`${JSON.stringify(answer)}\n`);
    return;
  }
  for (const one of 'data' in answer ? answer.data : [answer]) {
    terminal.out(lineOf(one));
    for (const warning of one.warnings ?? []) terminal.err(`warning: ${warning}\n`);
  }
}

const pathOf = ({ positionals }: Invocation): string =>
  `/v1/adapters/${encodeURIComponent(positionals[0]!)}`;

async function saveExport(answer: Response, invocation: Invocation): Promise<void> {
  const { flags, positionals, terminal } = invocation;
  const bytes = new Uint8Array(await answer.arrayBuffer());
  const suffix = flags.rank === undefined ? '' : `-r${flags.rank}`;
  const file = text(flags.output) ?? `${positionals[0]}${suffix}.tar`;
  await writeFile(file, bytes, { flag: 'wx' });
  const result = { file, bytes: bytes.length };
  terminal.out(flags.json ? `${JSON.stringify(result)}\n` : `${file}: ${bytes.length} bytes\n`);
}

const loadFrom = ({ flags, terminal }: Invocation): Config =>
  loadConfig({ flags, environment: terminal.environment });

const commands: Readonly<Record<string, Command>> = {
  serve: {
    flags: { ...json, ...configFlags },
    positionals: [],
    async run(invocation) {
      const { flags, terminal } = invocation;
      await serve(loadFrom(invocation), { json: flags.json === true, terminal });
    },
  },
  doctor: {
    flags: { ...json, ...configFlags, measure: { type: 'boolean' } },
    positionals: [],
    async run(invocation) {
      const config = loadFrom(invocation);
      // Without --measure nothing is fetched: doctor also answers where there is no network.
      const isWanted = invocation.flags.measure === true;
      const model = isWanted
        ? await fetchModel(config, invocation.terminal)
        : await findBaseModel(config.model, join(config.dataDir, 'models'));
      if (isWanted) await measureWeights(config, model!);
      const findings = await examine(config, model);
      const lines = Object.entries(findings).map(([what, found]) => `${what}: ${found}\n`);
      const { flags, terminal } = invocation;
      terminal.out(flags.json ? `${JSON.stringify(findings)}\n` : lines.join(''));
    },
  },
  'adapters add': clientCommand(
    ['NAME', 'DIRECTORY'],
    { ...expecting, replace: { type: 'boolean' }, 'accept-base-name': { type: 'string' } },
    ({ flags, positionals: [name, directory] }) => ({
      method: 'POST',
      path: '/v1/adapters',
      // What is undefined is left out of the JSON.
      body: {
        name,
        source: resolve(directory!),
        replace: flags.replace,
        if_generation: flags.expect,
        accept_base_name: flags['accept-base-name'],
      },
    }),
  ),
  'adapters list': clientCommand([], {}, () => ({ method: 'GET', path: '/v1/adapters' })),
  'adapters show': clientCommand(['NAME'], {}, (invocation) => ({
    method: 'GET',
    path: pathOf(invocation),
  })),
  'adapters swap': clientCommand(['NAME', 'GENERATION'], expecting, (invocation) => ({
    method: 'PUT',
    path: pathOf(invocation),
    body: { generation: invocation.positionals[1] },
    ifMatch: text(invocation.flags.expect),
  })),
  'adapters rollback': clientCommand(['NAME'], {}, (invocation) => ({
    method: 'POST',
    path: `${pathOf(invocation)}/rollback`,
  })),
  'adapters export': clientCommand(
    ['NAME'],
    { rank: { type: 'string' }, output: { type: 'string' } },
    (invocation) => {
      const rank = text(invocation.flags.rank);
      const query = rank === undefined ? '' : `?rank=${encodeURIComponent(rank)}`;
      return { method: 'GET', path: `${pathOf(invocation)}/export${query}` };
    },
    saveExport,
  ),
  'adapters rm': clientCommand(
    ['NAME'],
    expecting,
    (invocation) => ({
      method: 'DELETE',
      path: pathOf(invocation),
      ifMatch: text(invocation.flags.expect),
    }),
    async (response, { flags, positionals, terminal }) => {
      const answer = await response.text();
      terminal.out(flags.json ? `${answer}\n` : `${positionals[0]}: removed\n`);
    },
  ),
};

/** package.json lies one folder above this file, in the source tree and in the built one. */
function version(): string {
  const file = readFileSync(new URL('../package.json', import.meta.url), 'utf8');
  return (JSON.parse(file) as { version: string }).version;
}

function parse(command: Command, args: string[]): { flags: Flags; positionals: string[] } {
  try {
    const parsed = parseArgs({ args, options: command.flags, allowPositionals: true });
    return { flags: parsed.values as Flags, positionals: parsed.positionals };
  } catch (error) {
    throw usageError((error as Error).message);
  }
}

async function dispatch(args: readonly string[], terminal: Terminal): Promise<void> {
  const words = args[0] === 'adapters' ? 2 : 1;
  const name = args.slice(0, words).join(' ');
  const command = Object.hasOwn(commands, name) ? commands[name] : undefined;
  if (command === undefined) throw usageError(name === '' ? 'no command' : `no command ${name}`);
  const { flags, positionals } = parse(command, args.slice(words));
  if (positionals.length !== command.positionals.length) {
    const wanted = command.positionals.join(' ') || 'no arguments';
    throw usageError(`${name}: want ${wanted}, got ${positionals.length} arguments`);
  }
  await command.run({ flags, positionals, terminal });
}

/** Runs one command line (without `node` and the script) and answers its exit code; never throws. */
export async function runCommand(args: readonly string[], terminal: Terminal): Promise<number> {
  if (args[0] === 'help' || args.includes('--help')) {
    terminal.out(usage);
    return 0;
  }
  if (args[0] === '--version') {
    terminal.out(`${version()}\n`);
    return 0;
  }
  const fail = (exitCode: number, code: string, message: string): number => {
    const isJson = args.includes('--json');
    terminal.err(isJson ? `${JSON.stringify({ error: { code, message } })}\n` : `${message}\n`);
    return exitCode;
  };
  try {
    await dispatch(args, terminal);
    return 0;
  } catch (error) {
    if (error instanceof CommandError) {
      const { exitCode, code, message } = error;
      return fail(exitCode, code, exitCode === 2 ? `${message}\n\n${usage}` : message);
    }
    if (error instanceof GatewayError) return fail(1, error.code, error.message);
    return fail(1, 'INTERNAL', error instanceof Error ? error.message : String(error));
  }
}
