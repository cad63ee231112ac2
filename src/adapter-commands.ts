// The adapters commands: calls to a running server, and what they print. An adapter's files are sent with a progress bar,
// and what arrived is compared with what was sent.

import { openAsBlob } from 'node:fs';
import { stat, writeFile } from 'node:fs/promises';
import { basename, join } from 'node:path';
import { clientDefaults } from './config.ts';
import { type Call, CommandError, callGateway } from './gateway-client.ts';
import { sha256OfFile } from './model/file-hash.ts';
import { createProgress, type Terminal } from './terminal.ts';

export type Flags = Readonly<Record<string, string | boolean>>;
export type FlagTypes = Readonly<Record<string, { readonly type: 'string' | 'boolean' }>>;

export interface Invocation {
  readonly flags: Flags;
  readonly positionals: readonly string[];
  readonly terminal: Terminal;
}

export interface Command {
  readonly flags: FlagTypes;
  /** Names of the positional arguments; all are needed. */
  readonly positionals: readonly string[];
  run(invocation: Invocation): Promise<void>;
}

export const json = { json: { type: 'boolean' } } as const;
const expecting = { expect: { type: 'string' } } as const;
const timeoutMs = 10 * 60 * 1000; // an import of a large adapter is minutes of work

export const usageError = (message: string): CommandError => new CommandError(2, 'USAGE', message);
export const text = (value: string | boolean | undefined): string | undefined =>
  typeof value === 'string' ? value : undefined;

/** Throws what explains the usage for a flag that is no number. */
export function numberOf(flag: string | boolean | undefined, name: string): number | undefined {
  const given = text(flag);
  if (given === undefined) return undefined;
  const value = given.trim() === '' ? Number.NaN : Number(given);
  if (Number.isFinite(value)) return value;
  throw usageError(`${name}: not a number: ${given}`);
}

/** Throws what explains the usage, as the others do. */
export function wanted({ flags }: Invocation, flag: string): string {
  const value = text(flags[flag]);
  if (value === undefined) throw usageError(`--${flag} is wanted`);
  return value;
}

export function integerOf(
  { flags }: Invocation,
  flag: string,
  [min, max]: readonly [number, number],
): number | undefined {
  const value = numberOf(flags[flag], `--${flag}`);
  if (value === undefined || (Number.isInteger(value) && value >= min && value <= max))
    return value;
  throw usageError(`--${flag}: want an integer from ${min} up to ${max}, got ${value}`);
}

/** How a command calls the server that its flags or the environment name. */
export function clientOf({ flags, terminal }: Invocation): (call: Call) => Promise<Response> {
  const defaults = clientDefaults(terminal.environment);
  const url = text(flags.url) ?? defaults.url;
  if (!URL.canParse(url)) throw usageError(`--url: not a URL: ${url}`);
  return (call) => callGateway({ url, apiKey: defaults.apiKey, timeoutMs }, call);
}

/** Of a call that sends files of `total` bytes: a bar, unless the output is for a program. */
export function uploadProgress(
  { flags, terminal }: Invocation,
  label: string,
  total: number,
): Pick<Call, 'onProgress'> {
  if (flags.json) return {};
  const report = createProgress(terminal.err, terminal.isTerminal);
  return { onProgress: (bytes) => report({ label, done: Math.min(bytes, total), total }) };
}

/** A command that is one call to a running server. */
export function clientCommand(
  positionals: readonly string[],
  flagTypes: FlagTypes,
  callOf: (invocation: Invocation) => Call | Promise<Call>,
  print: (answer: Response, invocation: Invocation) => Promise<void> = show,
): Command {
  return {
    flags: { ...json, url: { type: 'string' }, ...flagTypes },
    positionals,
    async run(invocation) {
      const send = clientOf(invocation);
      await print(await send(await callOf(invocation)), invocation);
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
  readonly kind: string;
  readonly aliases: readonly string[];
  readonly pinned: boolean;
  readonly warnings?: readonly string[];
  readonly generations?: readonly Omit<Described, 'generations'>[];
}

function lineOf(adapter: Described): string {
  const { name, generation, kind, rank_max: rankMax, bytes, residency, leases } = adapter;
  const size = `${(bytes / 1e6).toFixed(1)} MB`;
  const also = adapter.aliases.length === 0 ? '' : `  also ${adapter.aliases.join(', ')}`;
  const line = `${name}  ${generation.slice(0, 19)}…  ${kind}  rank ${rankMax}  ${size}  ${residency.tier}`;
  return `${line}  in use ${leases}${adapter.pinned ? '  pinned' : ''}${also}\n`;
}

/** Prints the server's answer as it came, or as one line an adapter and one for each generation before its present one. */
async function show(response: Response, { flags, terminal }: Invocation): Promise<void> {
  const answer = (await response.json()) as Described | { readonly data: readonly Described[] };
  if (flags.json) {
    terminal.out(`${JSON.stringify(answer)}\n`);
    return;
  }
  for (const one of 'data' in answer ? answer.data : [answer]) {
    terminal.out(lineOf(one));
    for (const past of one.generations?.slice(1) ?? []) {
      terminal.out(`  before: ${past.generation}  ${past.kind}  rank ${past.rank_max}\n`);
    }
    for (const warning of one.warnings ?? []) terminal.err(`warning: ${warning}\n`);
  }
}

const weightsFile = 'adapter_model.safetensors';
/** What an import reads of a directory. */
const adapterFiles = ['adapter_config.json', 'rankgate.json', weightsFile];

/** Fields first: the server judges them before it takes a file. */
async function formOf(
  directory: string,
  fields: Readonly<Record<string, unknown>>,
): Promise<FormData> {
  const form = new FormData();
  for (const [name, value] of Object.entries(fields)) {
    if (value !== undefined) form.set(name, String(value));
  }
  for (const name of adapterFiles) {
    const path = join(directory, name);
    const isThere = (await stat(path).catch(() => null))?.isFile() ?? false;
    if (isThere) form.set(name, await openAsBlob(path), name);
  }
  if (form.has(weightsFile)) return form;
  throw new CommandError(1, 'INVALID_ADAPTER', `there is no ${weightsFile} in ${directory}`);
}

async function callToAdd(invocation: Invocation): Promise<Call> {
  const { flags, positionals } = invocation;
  const [name = '', source = ''] = positionals;
  const fields = {
    name,
    replace: flags.replace,
    if_generation: flags.expect,
    accept_base_name: flags['accept-base-name'],
    levels: flags.levels,
  };
  const call = { method: 'POST', path: '/v1/adapters' } as const;
  // What is undefined is left out of the JSON.
  if (flags['on-server'] || source.startsWith('hf:'))
    return { ...call, body: { ...fields, source } };
  const body = await formOf(source, fields);
  const total = [...body.values()].reduce(
    (sum, value) => sum + (typeof value === 'string' ? value.length : value.size),
    0,
  );
  return { ...call, body, ...uploadProgress(invocation, basename(source), total) };
}

/** What arrived must be what was sent. */
async function showAdded(response: Response, invocation: Invocation): Promise<void> {
  const { upload } = (await response.clone().json()) as { upload?: { sha256: string } };
  if (upload !== undefined) {
    const sent = await sha256OfFile(join(invocation.positionals[1]!, weightsFile));
    if (upload.sha256 !== sent) {
      const message = `the server got other weights (${upload.sha256}) than were sent (${sent})`;
      throw new CommandError(1, 'UPLOAD_CORRUPT', message);
    }
  }
  await show(response, invocation);
}

const pathOf = ({ positionals }: Invocation): string =>
  `/v1/adapters/${encodeURIComponent(positionals[0]!)}`;

const postCommand = (action: string): Command =>
  clientCommand(['NAME'], {}, (invocation) => ({
    method: 'POST',
    path: `${pathOf(invocation)}/${action}`,
  }));

async function saveExport(answer: Response, invocation: Invocation): Promise<void> {
  const { flags, positionals, terminal } = invocation;
  const bytes = new Uint8Array(await answer.arrayBuffer());
  const suffix = flags.rank === undefined ? '' : `-r${flags.rank}`;
  const file = text(flags.output) ?? `${basename(positionals[0]!)}${suffix}.tar`;
  await writeFile(file, bytes, { flag: 'wx' });
  const result = { file, bytes: bytes.length };
  terminal.out(flags.json ? `${JSON.stringify(result)}\n` : `${file}: ${bytes.length} bytes\n`);
}

export const adapterCommands: Readonly<Record<string, Command>> = {
  'adapters add': clientCommand(
    ['NAME', 'SOURCE'],
    {
      ...expecting,
      replace: { type: 'boolean' },
      'accept-base-name': { type: 'string' },
      levels: { type: 'string' },
      'on-server': { type: 'boolean' },
    },
    callToAdd,
    showAdded,
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
  'adapters rollback': postCommand('rollback'),
  'adapters pin': postCommand('pin'),
  'adapters unpin': postCommand('unpin'),
  'adapters alias': clientCommand(['ALIAS', 'NAME'], {}, (invocation) => ({
    method: 'PUT',
    path: `${pathOf(invocation)}/alias`,
    body: { target: invocation.positionals[1] },
  })),
  'adapters squeeze': clientCommand(
    ['NAME'],
    { ...expecting, rank: { type: 'string' }, variance: { type: 'string' } },
    (invocation) => {
      const { rank, variance, expect } = invocation.flags;
      return {
        method: 'POST',
        path: `${pathOf(invocation)}/squeeze`,
        body: { rank: numberOf(rank, '--rank'), variance: numberOf(variance, '--variance') },
        ifMatch: text(expect),
      };
    },
  ),
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
