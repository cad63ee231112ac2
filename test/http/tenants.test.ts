import { mkdirSync, mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { fakeGeneration, fakeManifest } from '../support/fake-registry.ts';
import {
  type Answer,
  createHarness,
  generationA,
  generationB,
  type Harness,
  type Json,
  tenantKeys,
} from '../support/http-harness.ts';

// One shared adapter, `support`, and one of each of two tenants. Nobody's answer may tell one tenant of another's.

const theirs = fakeGeneration('c3');

let harness: Harness;
let root: string;
beforeEach(() => {
  root = mkdtempSync(join(tmpdir(), 'rankgate-tenants-'));
  mkdirSync(join(root, 'one'));
  harness = createHarness({ apiKeys: tenantKeys, adaptersRoot: root, runtimeLoraUpdating: true });
  harness.registry.store(theirs, fakeManifest(8), 500);
  harness.registry.create('acme/mine', generationB);
  harness.registry.create('rival/secret', theirs);
});
afterEach(() => {
  harness.close();
  rmSync(root, { recursive: true });
});

const call = (who: string, method: string, path: string, body?: unknown): Promise<Answer> =>
  harness.call(who, method, path, { body });

const chat = (model: string) => ({ model, messages: [{ role: 'user', content: 'Hi' }] });
const idsOf = ({ body }: Answer): string[] => body.data.map((one: Json) => one.id ?? one.name);

describe('a tenant', () => {
  it.each([
    ['acme-admin', ['support', 'acme/mine']],
    ['acme-use', ['support', 'acme/mine']],
    ['rival-admin', ['support', 'rival/secret']],
    ['plain', ['support']],
    ['operator', ['support', 'acme/mine', 'rival/secret']],
  ])('%s sees %j', async (who, names) => {
    expect(idsOf(await call(who, 'GET', '/v1/models'))).toEqual(['tiny-base', ...names]);
    if (who.includes('use') || who === 'plain') return;
    expect(idsOf(await call(who, 'GET', '/v1/adapters'))).toEqual(names);
  });

  it('is told of another’s adapter what it is told of none', async () => {
    const calls: [string, string, unknown?][] = [
      ['GET', '/v1/models/NAME'],
      ['GET', '/v1/adapters/NAME'],
      ['PUT', '/v1/adapters/NAME', { generation: generationA }],
      ['DELETE', '/v1/adapters/NAME'],
      ['POST', '/v1/adapters/NAME/rollback'],
      ['POST', '/v1/adapters/NAME/pin'],
      ['POST', '/v1/adapters/NAME/unpin'],
      ['GET', '/v1/adapters/NAME/export'],
      ['PUT', '/v1/adapters/acme%2Fnew/alias', { target: 'NAME' }],
      ['POST', '/v1/unload_lora_adapter', { lora_name: 'NAME' }],
      ['POST', '/v1/chat/completions', chat('NAME')],
      ['POST', '/v1/chat/completions', chat(`NAME@${theirs}`)],
      ['POST', '/v1/adapters', { name: 'NAME', source: 'one' }],
      ['POST', '/v1/adapters', { name: 'NAME', source: 'one', replace: true }],
    ];
    for (const [method, path, body] of calls) {
      const asked = async (name: string) => {
        const url = path.replace('NAME', encodeURIComponent(name));
        const text = JSON.stringify(body)?.replace('NAME', name);
        const { status, body: answer } = await call(
          'acme-admin',
          method,
          url,
          text === undefined ? undefined : JSON.parse(text),
        );
        return { status, answer: JSON.parse(JSON.stringify(answer).replaceAll(name, 'NAME')) };
      };
      const there = await asked('rival/secret');
      expect(there, `${method} ${path}`).toEqual(await asked('rival/absent'));
      expect([403, 404]).toContain(there.status);
    }
    expect(harness.importer.directories).toEqual([]);
  });

  it('uses its own and the shared adapters', async () => {
    for (const model of ['acme/mine', 'support', `acme/mine@${generationB}`]) {
      const { status } = await call('acme-use', 'POST', '/v1/chat/completions', chat(model));
      expect(status).toBe(200);
    }
    const tenants = harness.engine.requests.map(({ tenant }) => tenant);
    expect(new Set(tenants)).toEqual(new Set(['tenant-acme']));
    expect((await call('plain', 'POST', '/v1/chat/completions', chat('acme/mine'))).status).toBe(
      404,
    );
  });

  it('changes its own and not the shared ones', async () => {
    harness.registry.swap('acme/mine', generationA, null);
    const own = await call('acme-admin', 'PUT', '/v1/adapters/acme%2Fmine', {
      generation: generationB,
    });
    expect(own).toMatchObject({
      status: 200,
      body: { name: 'acme/mine', generation: generationB },
    });
    for (const [method, path, body] of [
      ['PUT', '/v1/adapters/support', { generation: generationA }],
      ['DELETE', '/v1/adapters/support'],
      ['POST', '/v1/adapters/support/rollback'],
      ['POST', '/v1/adapters/support/pin'],
      ['POST', '/v1/adapters/acme%2Fmine/pin'],
      ['PUT', '/v1/adapters/acme%2Fnew/alias', { target: 'support' }],
      ['PUT', '/v1/adapters/new/alias', { target: 'acme/mine' }],
    ] as const) {
      expect((await call('acme-admin', method, path, body)).status, `${method} ${path}`).toBe(403);
    }
    const alias = await call('acme-admin', 'PUT', '/v1/adapters/acme%2Fnew/alias', {
      target: 'acme/mine',
    });
    expect(alias).toMatchObject({
      status: 200,
      body: { name: 'acme/mine', aliases: ['acme/new'] },
    });
    expect((await call('acme-admin', 'DELETE', '/v1/adapters/acme%2Fnew')).status).toBe(200);
    expect((await call('acme-admin', 'DELETE', '/v1/adapters/acme%2Fmine')).status).toBe(200);
  });

  it('swaps to no generation that it only knows the hash of', async () => {
    const path = '/v1/adapters/acme%2Fmine';
    const refused = await call('acme-admin', 'PUT', path, { generation: theirs });
    expect(refused).toMatchObject({ status: 404, body: { error: { code: 'adapter_not_found' } } });
    expect((await call('acme-admin', 'PUT', path, { generation: generationA })).status).toBe(200);
    expect((await call('operator', 'PUT', path, { generation: theirs })).status).toBe(200);
  });

  it('reads no directory of this machine: another tenant’s may lie there', async () => {
    for (const [path, body] of [
      ['/v1/adapters', { name: 'acme/new', source: 'one' }],
      ['/v1/load_lora_adapter', { lora_name: 'acme/new', lora_path: 'one' }],
    ] as const) {
      expect((await call('acme-admin', 'POST', path, body)).status).toBe(403);
    }
    expect(harness.importer.directories).toEqual([]);
    const added = await call('operator', 'POST', '/v1/adapters', {
      name: 'acme/new',
      source: 'one',
    });
    expect(added.status).toBe(201);
  });

  it.each([
    ['acme-use', ['acme/mine', 'support']],
    ['plain', ['support']],
    ['operator', ['acme/mine', 'rival/secret', 'support']],
  ])('%s reads %j on the metrics page', async (who, names) => {
    harness.engine.figures = {
      residents: [generationA, generationB, theirs].map((generation) => ({
        generation,
        rank: 8,
        bytes: 1,
        uses: 0,
      })),
    };
    for (const model of ['acme/mine', 'rival/secret', 'support']) {
      const messages = [{ role: 'user', content: 'Hi' }];
      const { status } = await call('operator', 'POST', '/v1/chat/completions', {
        model,
        messages,
      });
      expect(status).toBe(200);
    }
    const { body } = await call(who, 'GET', '/metrics');
    expect(body).toContain(`running_lora_adapters="${names.join(',')}"`);
    expect(body.includes('rival/secret')).toBe(names.includes('rival/secret'));
    const timed = [...body.matchAll(/prediction_error\{adapter="([^"]+)",quantile="0.5"/g)];
    expect(new Set(timed.map(([, name]) => name))).toEqual(new Set(names));
  });
});
