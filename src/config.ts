// The configuration: flags > environment (RANKGATE_*) > one YAML file > defaults, through one strict schema, frozen. The
// only reader of process.env. An error names the setting and where its value came from. Secrets have no flag, because
// every user of a machine can read every process's arguments.

import { createHash } from 'node:crypto';
import { readFileSync } from 'node:fs';
import { join, resolve } from 'node:path';
import { parse as parseYaml } from 'yaml';
import { kindOf, type Settings, settingNames, settingsSchema } from './config-schema.ts';
import { GatewayError } from './errors.ts';
import type { ApiKey } from './server/auth.ts';
import { usableCores } from './usable-cores.ts';

type Key = keyof Settings;

export interface Config
  extends Omit<Settings, 'threads' | 'adaptersRoot' | 'apiKeys' | 'adminKeys'> {
  readonly threads: number;
  readonly adaptersRoot: string;
  /** Inference and admin keys together; empty: inference is open, admin is for this machine. */
  readonly apiKeys: readonly ApiKey[];
}

const secrets: readonly Key[] = ['apiKeys', 'adminKeys', 'hubToken'];

const kebab = (text: string): string =>
  text.replace(/[A-Z]/g, (letter) => `-${letter.toLowerCase()}`);
const environmentName = (text: string): string =>
  `RANKGATE_${kebab(text).replaceAll('-', '_').toUpperCase()}`;

const isFileOnly = (setting: Key): boolean =>
  ['record', 'object', 'union'].includes(kindOf(setting));

/** What node:util's parseArgs takes for the settings that have a flag, and `--config`. */
export const configFlags: Readonly<Record<string, { type: 'string' | 'boolean' }>> = {
  config: { type: 'string' },
  ...Object.fromEntries(
    settingNames
      .filter((one) => !isFileOnly(one) && !secrets.includes(one))
      .map((one) => [kebab(one), { type: kindOf(one) === 'boolean' ? 'boolean' : 'string' }]),
  ),
};

function refuse(setting: string, wanted: string, origin: string): never {
  throw new GatewayError('INVALID_REQUEST', `configuration: ${setting}: ${wanted} (${origin})`);
}

/** Flags and environment are text: turned into the type of the setting, which the schema then checks. */
function fromText(setting: Key, text: string, origin: string): unknown {
  switch (kindOf(setting)) {
    case 'number':
      return /^\d{1,15}$/.test(text)
        ? Number(text)
        : refuse(setting, 'want a whole number', origin);
    case 'boolean':
      if (['true', '1'].includes(text)) return true;
      return ['false', '0'].includes(text) ? false : refuse(setting, 'want true or false', origin);
    case 'array':
      return text.split(',').map((part) => part.trim());
    default:
      return isFileOnly(setting) ? refuse(setting, 'only the file can set it', origin) : text;
  }
}

/** One setting as one source has it. */
type Entry = readonly [setting: string, value: unknown, origin: string];

/** Kubernetes puts RANKGATE_PORT=tcp://… and the like into every pod beside a Service named rankgate. */
const isServiceLink = (variable: string, value: string): boolean =>
  /^RANKGATE_(SERVICE_|PORT_\d)/.test(variable) || /^(tcp|udp|sctp):\/\//.test(value);

/** Read by the client commands of cli.ts, not settings of the server. */
const clientVariables = ['RANKGATE_URL', 'RANKGATE_API_KEY', 'RANKGATE_CONFIG'];

function fromEnvironment(environment: NodeJS.ProcessEnv): Entry[] {
  const byVariable = new Map(settingNames.map((one) => [environmentName(one), one]));
  const entries: Entry[] = [];
  for (const [variable, text] of Object.entries(environment)) {
    if (!variable.startsWith('RANKGATE_') || text === undefined) continue;
    if (clientVariables.includes(variable) || isServiceLink(variable, text)) continue;
    const setting = byVariable.get(variable);
    if (setting === undefined) refuse(variable, 'no such setting', 'environment');
    entries.push([setting, fromText(setting, text, variable), variable]);
  }
  return entries;
}

function fromFlags(flags: ConfigFlags): Entry[] {
  return settingNames.flatMap((setting): Entry[] => {
    const origin = `--${kebab(setting)}`;
    const flag = flags[kebab(setting)];
    if (flag === undefined) return [];
    return [[setting, typeof flag === 'string' ? fromText(setting, flag, origin) : flag, origin]];
  });
}

const fileBytesMax = 1024 * 1024;

function fromFile(path: string): Entry[] {
  const origin = `file ${path}`;
  let text: string;
  try {
    text = readFileSync(path, 'utf8');
  } catch (cause) {
    throw new GatewayError('INVALID_REQUEST', `configuration: config: cannot read ${path}`, {
      cause,
    });
  }
  if (text.length > fileBytesMax) refuse('config', `want at most ${fileBytesMax} bytes`, origin);
  let values: unknown;
  try {
    // maxAliasCount 0: an alias bomb is not parsed.
    values = parseYaml(text, { maxAliasCount: 0 });
  } catch (error) {
    return refuse('config', (error as Error).message.split('\n', 1)[0]!, origin);
  }
  if (values === null) return [];
  if (typeof values !== 'object' || Array.isArray(values)) {
    return refuse('config', 'want a mapping of settings', origin);
  }
  return Object.entries(values!).map(([setting, value]) => [setting, value, origin]);
}

/** Later entries win. */
function merge(entries: readonly Entry[]): Settings {
  const values = Object.fromEntries(entries.map(([setting, value]) => [setting, value]));
  const { success, data, error } = settingsSchema.safeParse(values);
  if (success) return data;
  const issue = error.issues[0]!;
  const unknown = issue.code === 'unrecognized_keys' ? issue.keys[0] : undefined;
  const path = [...issue.path, ...(unknown === undefined ? [] : [unknown])].map(String);
  const origin = entries.findLast(([setting]) => setting === path[0])?.[2] ?? 'default';
  // The message, never the value: it may be a key.
  return refuse(path.join('.'), unknown === undefined ? issue.message : 'no such setting', origin);
}

function toApiKey(text: string, access: ApiKey['access']): ApiKey {
  const at = text.indexOf('@');
  const secret = text.slice(at + 1);
  const digest = secret.startsWith('sha256:')
    ? Buffer.from(secret.slice(7), 'hex')
    : createHash('sha256').update(secret).digest();
  return { digest, access, tenant: at < 0 ? null : text.slice(0, at) };
}

type ConfigFlags = Readonly<Record<string, string | boolean>>;

export interface ConfigSources {
  readonly flags?: ConfigFlags;
  readonly environment?: NodeJS.ProcessEnv;
}

/** Reads the YAML file that `--config` or RANKGATE_CONFIG names, if any. Throws INVALID_REQUEST. */
export function loadConfig({ flags = {}, environment = process.env }: ConfigSources = {}): Config {
  const file = flags.config ?? environment.RANKGATE_CONFIG;
  const { adminKeys, ...kept } = merge([
    ...(typeof file === 'string' && file !== '' ? fromFile(file) : []),
    ...fromEnvironment(environment),
    ...fromFlags(flags),
  ]);
  if (kept.prefillTokensMax > kept.stepTokensMax) {
    refuse('prefillTokensMax', `at most stepTokensMax, which is ${kept.stepTokensMax}`, 'together');
  }
  const apiKeys = [
    ...kept.apiKeys.map((one) => toApiKey(one, 'inference')),
    ...adminKeys.map((one) => toApiKey(one, 'admin')),
  ];
  // One letter away from RANKGATE_API_KEYS: ignored, it would leave a gateway open that was meant to be closed.
  if (environment.RANKGATE_API_KEY !== undefined && apiKeys.length === 0) {
    refuse(
      'apiKeys',
      'none, yet RANKGATE_API_KEY is set: that is what clients send',
      'RANKGATE_API_KEYS',
    );
  }
  const dataDir = resolve(kept.dataDir);
  return Object.freeze({
    ...kept,
    dataDir,
    threads: kept.threads ?? usableCores().count,
    adaptersRoot: resolve(kept.adaptersRoot ?? join(dataDir, 'incoming')),
    apiKeys: Object.freeze(apiKeys),
  });
}

export const processEnvironment: NodeJS.ProcessEnv = process.env;

/** For child processes that are not ours (pip): this process's environment without rankgate's settings and secrets. */
export function childEnvironment(environment: NodeJS.ProcessEnv = process.env): ChildEnvironment {
  const kept = Object.entries(environment).filter(
    ([variable, text]) => text !== undefined && !variable.startsWith('RANKGATE_'),
  );
  return Object.fromEntries(kept) as ChildEnvironment;
}

type ChildEnvironment = Record<string, string>;

/** TensorFlow.js reads its threads, and what it says on stderr, from the environment only. What the operator set wins. */
export function backendEnvironment(
  backend: Settings['backend'],
  threads: number,
): ChildEnvironment {
  if (backend !== 'tfjs') return {};
  const own = { TF_NUM_INTRAOP_THREADS: String(threads), TF_NUM_INTEROP_THREADS: '1' };
  return { ...own, TF_CPP_MIN_LOG_LEVEL: '1' };
}

/** Where the client commands send their calls, unless flags say otherwise. */
export function clientDefaults(environment: NodeJS.ProcessEnv = process.env): {
  readonly url: string;
  readonly apiKey: string | null;
} {
  const port = environment.RANKGATE_PORT;
  return {
    url:
      environment.RANKGATE_URL ??
      `http://127.0.0.1:${port !== undefined && /^\d+$/.test(port) ? port : 8080}`,
    apiKey: environment.RANKGATE_API_KEY ?? null,
  };
}
