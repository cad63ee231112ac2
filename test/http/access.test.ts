import { afterEach, describe, expect, it } from 'vitest';
import type { ServerConfig } from '../../src/server/deps.ts';
import type { Route } from '../../src/server/env.ts';
import {
  apiKeys,
  createHarness,
  type Harness,
  type Json,
  keyPlain,
} from '../support/http-harness.ts';

let harness: Harness | null = null;
afterEach(() => harness?.close());

function open(config: Partial<ServerConfig> = {}): Harness {
  harness = createHarness(config);
  return harness;
}

const concrete = (route: Route): string =>
  route.path.replace(':domain', 'law').replace(':name', 'support').replace(':id', 'support');

async function codeOf(response: Response): Promise<string | null> {
  const text = await response.text();
  try {
    return (JSON.parse(text) as Json).error?.code ?? null;
  } catch {
    return null;
  }
}

const unauthenticated = [
  ['no key', null],
  ['a bad key', 'Bearer sk-wrong'],
  ['an empty key', 'Bearer '],
  ['basic', `Basic ${keyPlain.admin}`],
  ['a lower-case scheme', `bearer ${keyPlain.admin}`],
  ['two spaces', `Bearer  ${keyPlain.admin}`],
  ['no scheme', keyPlain.admin],
  ['two keys', `Bearer ${keyPlain.inference}, Bearer ${keyPlain.admin}`],
  ['a key with more behind it', `Bearer ${keyPlain.admin}x`],
  ['a part of a key', `Bearer ${keyPlain.admin.slice(0, -1)}`],
  ['SQL', "Bearer ' OR '1'='1"],
  ['10 KB', `Bearer ${'x'.repeat(10_240)}`],
  ['not ASCII', 'Bearer kéy'],
] as const;

describe('with keys configured, on every route of the table', () => {
  const routes = createRoutes();

  it('there are routes of every class', () => {
    expect(routes.length).toBeGreaterThan(14);
    expect(new Set(routes.map((route) => route.access))).toEqual(
      new Set(['public', 'inference', 'admin']),
    );
  });

  it('everything but the probes needs a key', () => {
    const open = routes.filter((route) => route.access === 'public').map((route) => route.path);
    expect(open).toEqual(['/livez', '/readyz']);
  });

  for (const route of routes) {
    const name = `${route.method} ${route.path} (${route.access})`;
    it.each(unauthenticated)(`${name} with %s`, async (_, authorization) => {
      const { fetch } = open({ apiKeys });
      const headers: Record<string, string> = authorization === null ? {} : { authorization };
      const response = await fetch(route.method, concrete(route), { headers });
      if (route.access === 'public') {
        expect(response.status).toBe(200);
      } else {
        expect(response.status).toBe(401);
        expect(response.headers.get('www-authenticate')).toBe('Bearer');
        expect(await codeOf(response)).toBe('invalid_api_key');
      }
    });

    it(`${name} with the inference key`, async () => {
      const { fetch } = open({ apiKeys });
      const headers = { authorization: `Bearer ${keyPlain.inference}` };
      const response = await fetch(route.method, concrete(route), { headers });
      // A call that gets through is refused for its missing body at the earliest.
      expect([401, 403].includes(response.status)).toBe(route.access === 'admin');
      if (route.access === 'admin') expect(response.status).toBe(403);
    });

    it(`${name} with the admin key, from anywhere`, async () => {
      const { fetch } = open({ apiKeys });
      const headers = { authorization: `Bearer ${keyPlain.admin}` };
      const response = await fetch(route.method, concrete(route), { headers, peer: '203.0.113.9' });
      expect([401, 403]).not.toContain(response.status);
    });
  }

  it('never logs or echoes a key', async () => {
    const { fetch, logs } = open({ apiKeys });
    for (const authorization of [`Bearer ${keyPlain.admin}`, 'Bearer sk-wrong']) {
      const response = await fetch('GET', '/v1/models', { headers: { authorization } });
      expect(await response.text()).not.toMatch(/sk-/);
    }
    expect(logs).toHaveLength(2);
    expect(logs.join('')).not.toContain('sk-');
  });

  it('an inference key alone leaves the admin calls closed, also to this machine', async () => {
    const { fetch } = open({ apiKeys: apiKeys.slice(0, 1) });
    expect((await fetch('GET', '/v1/adapters')).status).toBe(401);
    const headers = { authorization: `Bearer ${keyPlain.inference}` };
    expect((await fetch('GET', '/v1/adapters', { headers })).status).toBe(403);
  });

  it('callers with different keys are different tenants', async () => {
    const { post, engine } = open({ apiKeys });
    const body = { model: 'tiny-base', messages: [{ role: 'user', content: 'Hi' }] };
    for (const key of [keyPlain.inference, keyPlain.admin, keyPlain.inference]) {
      await post('/v1/chat/completions', body, { authorization: `Bearer ${key}` });
    }
    const tenants = engine.requests.map((request) => request.tenant);
    expect(tenants[0]).toBe(tenants[2]);
    expect(tenants[0]).not.toBe(tenants[1]);
  });

  it('the metrics page is public only when the configuration says so', async () => {
    expect((await open({ apiKeys }).fetch('GET', '/metrics')).status).toBe(401);
    harness?.close();
    expect((await open({ apiKeys, metricsPublic: true }).fetch('GET', '/metrics')).status).toBe(
      200,
    );
  });
});

describe('spellings of a path (B43)', () => {
  const spellings = [
    '//v1/adapters',
    '/v1//adapters',
    '/v1%2Fadapters',
    '/v1/%61dapters',
    '/v1/models/../adapters',
    '/v1/models/%2e%2e/adapters',
    '/V1/ADAPTERS',
    '/v1/adapters/',
    '/v1/adapters;x',
    '/v1/adapters%00',
    '/v1/adapters/support%2F..%2F',
    '/v1/chat%2Fcompletions',
  ];
  it.each(spellings)('%s never answers without a key', async (path) => {
    const { fetch } = open({ apiKeys });
    for (const method of ['GET', 'POST', 'HEAD', 'PUT', 'DELETE']) {
      const response = await fetch(method, path);
      expect([401, 404, 405]).toContain(response.status);
    }
  });
});

describe('without keys', () => {
  const adminCall = '/v1/adapters';
  it('inference answers anyone, admin calls this machine', async () => {
    const { fetch } = open();
    for (const peer of ['127.0.0.1', '127.8.8.8', '::1', '::ffff:127.0.0.1']) {
      expect((await fetch('GET', adminCall, { peer })).status).toBe(200);
    }
    for (const peer of ['10.0.0.5', '::ffff:10.0.0.1', '2001:db8::1', '1.127.0.0.1', null]) {
      expect((await fetch('GET', '/v1/models', { peer })).status).toBe(200);
      const response = await fetch('GET', adminCall, { peer });
      expect(response.status).toBe(403);
      expect(await codeOf(response)).toBe('forbidden');
    }
  });

  it.each(['x-forwarded-for', 'forwarded', 'x-real-ip', 'x-forwarded-host'])(
    'a call that came through a proxy is not from this machine: %s',
    async (name) => {
      const { fetch } = open();
      expect((await fetch('GET', adminCall, { headers: { [name]: '127.0.0.1' } })).status).toBe(
        403,
      );
    },
  );

  it('a page in a browser makes no admin call', async () => {
    const { fetch } = open();
    const headers = { origin: 'http://localhost' };
    expect((await fetch('GET', adminCall, { headers })).status).toBe(403);
  });

  it('a name that someone else resolves to this machine gets nothing (DNS rebinding)', async () => {
    const { fetch } = open({ hostsAllowed: ['gateway.internal'] });
    for (const host of ['attacker.example', 'localhost.attacker.example', '127.0.0.1.nip.io']) {
      for (const path of ['/v1/models', adminCall]) {
        expect((await fetch('GET', `http://${host}${path}`)).status).toBe(403);
      }
    }
    for (const host of [
      '127.0.0.1:8080',
      '[::1]',
      'localhost:99',
      'gateway.internal',
      '10.1.2.3',
    ]) {
      expect((await fetch('GET', `http://${host}/v1/models`)).status).toBe(200);
    }
  });
});

function createRoutes(): readonly Route[] {
  const probe = createHarness({ apiKeys });
  probe.close();
  return probe.app.routes;
}
