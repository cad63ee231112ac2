// The configuration: flags > environment (RANKGATE_*) > one YAML file > defaults, through one strict schema, frozen. The
// only reader of process.env. An error names the setting and where its value came from. Secrets have no flag, because
// every user of a machine can read every process's arguments.

import { createHash } from 'node:crypto';
import { readFileSync } from 'node:fs';
import { availableParallelism } from 'node:os';
import { join, resolve } from 'node:path';
import { parse as parseYaml } from 'yaml';
import { isKey, type Settings, settingNames, settingsSchema } from './config-schema.ts';
import { GatewayError } from './errors.ts';
import type { ApiKey } from './server/auth.ts';

type Key = keyof Settings;

export interface Config
  extends Omit<
    Settings,
    'threads' | 'adaptersRoot' | 'apiKeys' | 'apiKeysFile' | 'adminKeys' | 'adminKeysFile'
  > {
  readonly threads: number;
  readonly adaptersRoot: string;
  /** Inference and admin keys together; empty: inference is open, admin is for this machine. */
  readonly apiKeys: readonly ApiKey[];
}

const numbers: readonly Key[] = [
  ...(['port', 'threads', 'kvCells', 'adapterPages', 'stepTokensMax', 'stepRowsMax'] as const),
  ...(['prefillTokensMax', 'queueRequestsMax', 'queuePromptTokensMax', 'bodyBytesMax'] as const),
  ...(['chatTokensDefault', 'completionTokensDefault', 'pingMs', 'stallMsMax'] as const),
  ...(['tokenAgeMsMax', 'connectionsMax', 'keepAliveMs', 'drainGraceMs'] as const),
];
const booleans: readonly Key[] = ['runtimeLoraUpdating', 'metricsPublic'];
const lists: readonly Key[] = ['apiKeys', 'adminKeys', 'hostsAllowed'];
const fileOnly: readonly Key[] = ['tiers', 'latencyDefaults'];
const secrets: readonly Key[] = ['apiKeys', 'adminKeys', 'hubToken'];

const kebab = (text: string): string =>
  text.replace(/[A-Z]/g, (letter) => `-${letter.toLowerCase()}`);
const environmentName = (text: string): string =>
  `RANKGATE_${kebab(text).replaceAll('-', '_').toUpperCase()}`;

/** What node:util's parseArgs takes for the settings that have a flag, and `--config`. */
export const configFlags: Readonly<Record<string, { type: 'string' | 'boolean' }>> = {
  config: { type: 'string' },
  ...Object.fromEntries(
    settingNames
      .filter((one) => !fileOnly.includes(one) && !secrets.includes(one))
      .map((one) => [kebab(one), { type: booleans.includes(one) ? 'boolean' : 'string' } as const]),
  ),
};

function refuse(setting: string, wanted: string, origin: string): never {
  throw new GatewayError('INVALID_REQUEST', `configuration: ${setting}: ${wanted} (${origin})`);
}

/** Flags and environment are text: turned into the type of the setting, which the schema then checks. */
function fromText(setting: Key, text: string, origin: string): unknown {
  if (numbers.includes(setting)) {
    if (!/^\d{1,15}$/.test(text)) refuse(setting, 'want a whole number', origin);
    return Number(text);
  }
  if (booleans.includes(setting)) {
    if (text === 'true' || text === '1') return true;
    if (text === 'false' || text === '0') return false;
    refuse(setting, 'want true or false', origin);
  }
  if (lists.includes(setting)) return text.split(',').map((part) => part.trim());
  return text;
}

interface Layer {
  readonly values: Readonly<Record<string, unknown>>;
  readonly origin: (setting: string) => string;
}

/** Kubernetes puts RANKGATE_PORT=tcp://… and the like into every pod beside a Service named rankgate. */
const isServiceLink = (variable: string, value: string): boolean =>
  /^RANKGATE_(SERVICE_|PORT_\d)/.test(variable) || /^(tcp|udp|sctp):\/\//.test(value);

/** Read by the client commands of cli.ts, not settings of the server. */
const clientVariables = ['RANKGATE_URL', 'RANKGATE_API_KEY', 'RANKGATE_CONFIG'];

function environmentLayer(environment: NodeJS.ProcessEnv): Layer {
  const byVariable = new Map(settingNames.map((one) => [environmentName(one), one]));
  const values: Record<string, unknown> = {};
  for (const [variable, text] of Object.entries(environment)) {
    if (!variable.startsWith('RANKGATE_') || text === undefined) continue;
    if (clientVariables.includes(variable) || isServiceLink(variable, text)) continue;
    const setting = byVariable.get(variable);
    if (setting === undefined) refuse(variable, 'no such setting', 'environment');
    if (fileOnly.includes(setting)) refuse(setting, 'only the file can set it', variable);
    values[setting] = fromText(setting, text, variable);
  }
  return { values, origin: environmentName };
}

function flagLayer(flags: Readonly<Record<string, string | boolean>>): Layer {
  const values: Record<string, unknown> = {};
  for (const setting of settingNames) {
    const flag = flags[kebab(setting)];
    if (flag === undefined) continue;
    values[setting] =
      typeof flag === 'string' ? fromText(setting, flag, `--${kebab(setting)}`) : flag;
  }
  return { values, origin: (setting) => `--${kebab(setting)}` };
}

const fileBytesMax = 1024 * 1024;

function readText(path: string, setting: string, origin: string): string {
  try {
    const text = readFileSync(path, 'utf8');
    if (text.length <= fileBytesMax) return text;
  } catch (cause) {
    throw new GatewayError('INVALID_REQUEST', `configuration: ${setting}: cannot read ${path}`, {
      cause,
    });
  }
  return refuse(setting, `${path} is larger than ${fileBytesMax} bytes`, origin);
}

function fileLayer(path: string | undefined): Layer {
  const origin = (): string => `file ${path}`;
  if (path === undefined) return { values: {}, origin };
  let values: unknown;
  try {
    // maxAliasCount 0: an alias bomb is not parsed.
    values = parseYaml(readText(path, 'config', '--config'), { maxAliasCount: 0 });
  } catch (error) {
    if (error instanceof GatewayError) throw error;
    const why = error instanceof Error ? error.message.split('\n', 1)[0] : 'not YAML';
    throw new GatewayError('INVALID_REQUEST', `configuration: file ${path}: ${why}`, {
      cause: error,
    });
  }
  if (values === null) return { values: {}, origin };
  if (typeof values !== 'object' || Array.isArray(values)) {
    refuse('config', 'want a mapping of settings', origin());
  }
  return { values: values as Record<string, unknown>, origin };
}

function merge(layers: readonly Layer[]): Settings {
  const values: Record<string, unknown> = {};
  const origins: Record<string, string> = {};
  for (const layer of layers) {
    for (const [setting, value] of Object.entries(layer.values)) {
      values[setting] = value;
      origins[setting] = layer.origin(setting);
    }
  }
  const { success, data, error } = settingsSchema.safeParse(values);
  if (success) return data;
  const issue = error.issues[0]!;
  const unknown = issue.code === 'unrecognized_keys' ? issue.keys[0] : undefined;
  const path = [...issue.path, ...(unknown === undefined ? [] : [unknown])].map(String);
  const origin = origins[path[0]!] ?? 'default';
  // The message, never the value: it may be a key.
  return refuse(path.join('.'), unknown === undefined ? issue.message : 'no such setting', origin);
}

function digestOf(text: string): Uint8Array {
  if (text.startsWith('sha256:')) return Buffer.from(text.slice(7), 'hex');
  return createHash('sha256').update(text).digest();
}

function readKeys(settings: Settings, access: ApiKey['access']): ApiKey[] {
  const setting = access === 'admin' ? 'adminKeys' : 'apiKeys';
  const path = settings[`${setting}File`];
  const fromFile =
    path === null
      ? []
      : readText(path, `${setting}File`, setting)
          .split('\n')
          .map((line) => line.trim())
          .filter((line) => line !== '' && !line.startsWith('#'));
  const all = [...settings[setting], ...fromFile];
  if (!all.every(isKey)) {
    refuse(
      `${setting}File`,
      'a line is not a key (16 to 512 letters, digits or ._~+/-)',
      'its file',
    );
  }
  return all.map((one) => ({ digest: digestOf(one), access }));
}

/** CPUs' worth of time that the control group allows, rounded down; Infinity without a limit. */
function cgroupCpus(): number {
  for (const [quotaPath, periodPath] of [
    ['/sys/fs/cgroup/cpu.max', null],
    ['/sys/fs/cgroup/cpu/cpu.cfs_quota_us', '/sys/fs/cgroup/cpu/cpu.cfs_period_us'],
  ] as const) {
    try {
      const text = readFileSync(quotaPath, 'utf8');
      const [quota, period] = (
        periodPath === null ? text : `${text} ${readFileSync(periodPath, 'utf8')}`
      )
        .split(/\s+/)
        .map(Number) as [number, number];
      if (quota > 0 && period > 0) return Math.floor(quota / period);
    } catch {
      // Not Linux, or the other version of control groups.
    }
  }
  return Number.POSITIVE_INFINITY;
}

export interface ConfigSources {
  readonly flags?: Readonly<Record<string, string | boolean>>;
  readonly environment?: NodeJS.ProcessEnv;
}

/** Reads the YAML file that `--config` or RANKGATE_CONFIG names, if any. Throws INVALID_REQUEST. */
export function loadConfig({ flags = {}, environment = process.env }: ConfigSources = {}): Config {
  const file = flags.config ?? environment.RANKGATE_CONFIG;
  const settings = merge([
    fileLayer(typeof file === 'string' && file !== '' ? file : undefined),
    environmentLayer(environment),
    flagLayer(flags),
  ]);
  const { apiKeysFile: _a, adminKeysFile: _b, adminKeys: _c, ...kept } = settings;
  if (kept.prefillTokensMax > kept.stepTokensMax) {
    refuse('prefillTokensMax', `at most stepTokensMax, which is ${kept.stepTokensMax}`, 'together');
  }
  const apiKeys = [...readKeys(settings, 'inference'), ...readKeys(settings, 'admin')];
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
    threads: kept.threads ?? Math.max(1, Math.min(availableParallelism(), cgroupCpus())),
    adaptersRoot: resolve(kept.adaptersRoot ?? join(dataDir, 'incoming')),
    apiKeys: Object.freeze(apiKeys),
  });
}

export const processEnvironment: NodeJS.ProcessEnv = process.env;

/** For child processes that are not ours (pip): this process's environment without rankgate's settings and secrets. */
export function childEnvironment(
  environment: NodeJS.ProcessEnv = process.env,
): Record<string, string> {
  const kept = Object.entries(environment).filter(
    ([variable]) => !variable.startsWith('RANKGATE_'),
  );
  return Object.fromEntries(kept.filter((pair): pair is [string, string] => pair[1] !== undefined));
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
