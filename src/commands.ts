// The commands of `rankgate`, each a few lines. Output goes through `Terminal`, so that tests read it; results go to
// stdout (one JSON value with --json), everything else to stderr. Exit codes: 0 done, 1 failed or refused, 2 wrong usage,
// 3 no server answers.

import { readFileSync } from 'node:fs';
import { writeFile } from 'node:fs/promises';
import { resolve } from 'node:path';
import { parseArgs } from 'node:util';
import { clientDefaults, configFlags, loadConfig } from './config.ts';
import { examine } from './doctor.ts';
import { GatewayError } from './errors.ts';
import { type Call, callGateway, RefusedError, UnreachableError } from './gateway-client.ts';
import { serve } from './serve.ts';
import type { Terminal } from './terminal.ts';

export const usage = `rankgate serve [--config file] [--model …] [--port 8080] [--threads n] [--weights faithful|parity] …
rankgate adapters add NAME DIRECTORY [--accept-base-name NAME] [--replace [--expect GENERATION]]
rankgate adapters list
rankgate adapters show NAME
rankgate adapters swap NAME GENERATION [--expect GENERATION]
rankgate adapters rollback NAME
rankgate adapters export NAME [--rank K] [--output FILE]
rankgate adapters rm NAME [--expect GENERATION]
rankgate doctor [--config file] …
rankgate --version
Every command takes --json. The adapters commands talk to a running server: --url, or RANKGATE_URL; RANKGATE_API_KEY.
`;

type Flags = Record<string, string | boolean | undefined>;
type FlagTypes = Readonly<Record<string, { readonly type: 'string' | 'boolean' }>>;

interface Command {
  readonly flags: FlagTypes;
  /** Names of the positional arguments; all are needed. */
  readonly positionals: readonly string[];
  run(flags: Flags, positionals: readonly string[], terminal: Terminal): Promise<void>;
}

class UsageError extends Error {}

const json = { json: { type: 'boolean' } } as const;
const client = { ...json, url: { type: 'string' } } as const;
const expecting = { ...client, expect: { type: 'string' } } as const;
const timeoutMs = 10 * 60 * 1000; // an import of a large adapter is minutes of work

function call(flags: Flags, terminal: Terminal, request: Call): Promise<Response> {
  const { url, apiKey } = clientDefaults(terminal.environment);
  const target = typeof flags.url === 'string' ? flags.url : url;
  if (!URL.canParse(target)) throw new UsageError(`--url: not a URL: ${target}`);
  return callGateway({ url: target, apiKey, timeoutMs }, request);
}

const text = (value: string | boolean | undefined): string | undefined =>
  typeof value === 'string' ? value : undefined;

function expectation(flags: Flags): { ifMatch?: string } {
  const expected = text(flags.expect);
  return expected === undefined ? {} : { ifMatch: expected };
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
async function show(response: Response, flags: Flags, terminal: Terminal): Promise<void> {
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

const nameOf = (positionals: readonly string[]): string =>
  `/v1/adapters/${encodeURIComponent(positionals[0]!)}`;

const commands: Readonly<Record<string, Command>> = {
  serve: {
    flags: { ...json, ...configFlags },
    positionals: [],
    async run(flags, _, terminal) {
      const config = loadConfig({ flags: given(flags), environment: terminal.environment });
      await serve(config, { json: flags.json === true, terminal });
    },
  },
  doctor: {
    flags: { ...json, ...configFlags },
    positionals: [],
    async run(flags, _, terminal) {
      const config = loadConfig({ flags: given(flags), environment: terminal.environment });
      const findings = await examine(config);
      if (flags.json) terminal.out(`${JSON.stringify(findings)}\n`);
      else
        for (const [what, found] of Object.entries(findings)) terminal.out(`${what}: ${found}\n`);
    },
  },
  'adapters add': {
    flags: { ...expecting, replace: { type: 'boolean' }, 'accept-base-name': { type: 'string' } },
    positionals: ['NAME', 'DIRECTORY'],
    async run(flags, [name, directory], terminal) {
      const expected = text(flags.expect);
      const baseName = text(flags['accept-base-name']);
      const body = {
        name,
        source: resolve(directory!),
        ...(flags.replace ? { replace: true } : {}),
        ...(expected === undefined ? {} : { if_generation: expected }),
        ...(baseName === undefined ? {} : { accept_base_name: baseName }),
      };
      const answer = await call(flags, terminal, { method: 'POST', path: '/v1/adapters', body });
      await show(answer, flags, terminal);
    },
  },
  'adapters list': {
    flags: client,
    positionals: [],
    async run(flags, _, terminal) {
      await show(
        await call(flags, terminal, { method: 'GET', path: '/v1/adapters' }),
        flags,
        terminal,
      );
    },
  },
  'adapters show': {
    flags: client,
    positionals: ['NAME'],
    async run(flags, positionals, terminal) {
      const answer = await call(flags, terminal, { method: 'GET', path: nameOf(positionals) });
      await show(answer, flags, terminal);
    },
  },
  'adapters swap': {
    flags: expecting,
    positionals: ['NAME', 'GENERATION'],
    async run(flags, positionals, terminal) {
      const answer = await call(flags, terminal, {
        method: 'PUT',
        path: nameOf(positionals),
        body: { generation: positionals[1] },
        ...expectation(flags),
      });
      await show(answer, flags, terminal);
    },
  },
  'adapters rollback': {
    flags: client,
    positionals: ['NAME'],
    async run(flags, positionals, terminal) {
      const path = `${nameOf(positionals)}/rollback`;
      await show(await call(flags, terminal, { method: 'POST', path }), flags, terminal);
    },
  },
  'adapters export': {
    flags: { ...client, rank: { type: 'string' }, output: { type: 'string' } },
    positionals: ['NAME'],
    async run(flags, positionals, terminal) {
      const rank = text(flags.rank);
      const query = rank === undefined ? '' : `?rank=${encodeURIComponent(rank)}`;
      const path = `${nameOf(positionals)}/export${query}`;
      const answer = await call(flags, terminal, { method: 'GET', path });
      const bytes = new Uint8Array(await answer.arrayBuffer());
      const suffix = rank === undefined ? '' : `-r${rank}`;
      const file = text(flags.output) ?? `${positionals[0]}${suffix}.tar`;
      await writeFile(file, bytes, { flag: 'wx' });
      const result = { file, bytes: bytes.length };
      terminal.out(flags.json ? `${JSON.stringify(result)}\n` : `${file}: ${bytes.length} bytes\n`);
    },
  },
  'adapters rm': {
    flags: expecting,
    positionals: ['NAME'],
    async run(flags, positionals, terminal) {
      const request = {
        method: 'DELETE',
        path: nameOf(positionals),
        ...expectation(flags),
      } as const;
      const answer: unknown = await (await call(flags, terminal, request)).json();
      terminal.out(flags.json ? `${JSON.stringify(answer)}\n` : `${positionals[0]}: removed\n`);
    },
  },
};

/** package.json lies one folder above this file, in the source tree and in the built one. */
function version(): string {
  const file = readFileSync(new URL('../package.json', import.meta.url), 'utf8');
  return (JSON.parse(file) as { version: string }).version;
}

function given(flags: Flags): Record<string, string | boolean> {
  const pairs = Object.entries(flags).filter(([name]) => name !== 'json');
  return Object.fromEntries(
    pairs.filter((pair): pair is [string, string] => pair[1] !== undefined),
  );
}

function parse(command: Command, args: string[]): { flags: Flags; positionals: string[] } {
  try {
    const { values, positionals } = parseArgs({
      args,
      options: command.flags,
      allowPositionals: true,
      strict: true,
    });
    return { flags: values as Flags, positionals };
  } catch (error) {
    throw new UsageError(error instanceof Error ? error.message : 'wrong arguments');
  }
}

async function dispatch(args: readonly string[], terminal: Terminal): Promise<void> {
  const words = args[0] === 'adapters' ? 2 : 1;
  const name = args.slice(0, words).join(' ');
  const command = Object.hasOwn(commands, name) ? commands[name] : undefined;
  if (command === undefined)
    throw new UsageError(name === '' ? 'no command' : `no command ${name}`);
  const { flags, positionals } = parse(command, args.slice(words));
  if (positionals.length !== command.positionals.length) {
    const wanted = command.positionals.join(' ') || 'no arguments';
    throw new UsageError(`${name}: want ${wanted}, got ${positionals.length} arguments`);
  }
  await command.run(flags, positionals, terminal);
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
    if (error instanceof UsageError) return fail(2, 'USAGE', `${error.message}\n\n${usage}`);
    if (error instanceof RefusedError) return fail(1, error.code, error.message);
    if (error instanceof UnreachableError) return fail(3, 'UNREACHABLE', error.message);
    if (error instanceof GatewayError) return fail(1, error.code, error.message);
    return fail(1, 'INTERNAL', error instanceof Error ? error.message : String(error));
  }
}
