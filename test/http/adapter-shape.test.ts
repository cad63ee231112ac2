import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { GatewayError } from '../../src/errors.ts';
import {
  createHarness,
  generationA,
  generationB,
  type Harness,
  type Json,
} from '../support/http-harness.ts';

let harness: Harness;
beforeEach(() => {
  harness = createHarness();
});
afterEach(() => harness.close());

async function call(
  method: string,
  path: string,
  body?: unknown,
  headers: Record<string, string> = {},
): Promise<{ status: number; body: Json }> {
  const response = await harness.fetch(method, path, {
    headers: { 'content-type': 'application/json', ...headers },
    ...(body === undefined ? {} : { body: JSON.stringify(body) }),
  });
  return { status: response.status, body: (await response.json()) as Json };
}

describe('GET /v1/adapters/{name}/aurac', () => {
  it('shows the curve and the area under it over ranks and over their logarithms', async () => {
    const { status, body } = await call('GET', '/v1/adapters/support/aurac');
    expect(status).toBe(200);
    expect(body).toMatchObject({ name: 'support', generation: generationA, quality: 'energy' });
    expect(body.curve).toEqual(
      Array.from({ length: 16 }, (_, i) => ({ rank: i + 1, quality: (i + 1) / 16 })),
    );
    // The fake's curve is a straight line from 1/16 to 1.
    expect(body.v1).toBeCloseTo((1 / 16 + 1) / 2, 12);
    expect(body.v2).toBeLessThan(body.v1 as unknown as number);
  });

  it('of an unknown name is a 404', async () => {
    expect((await call('GET', '/v1/adapters/nobody/aurac')).status).toBe(404);
  });
});

describe('POST /v1/adapters/{name}/squeeze', () => {
  it.each([{ rank: 8 }, { variance: 0.95 }, { rank: 8, mode: 'post' }])(
    'with %j points the name at the result, and a rollback takes it back',
    async (body) => {
      const answer = await call('POST', '/v1/adapters/support/squeeze', body);
      expect(answer.status).toBe(200);
      expect(answer.body).toMatchObject({ generation: generationB, previous: [generationA] });
      const { mode: _, ...target } = body as Record<string, unknown>;
      expect(harness.importer.squeezed).toEqual([{ generation: generationA, target }]);
      await call('POST', '/v1/adapters/support/rollback');
      expect(harness.registry.find('support')!.generation).toBe(generationA);
    },
  );

  it.each<[string, unknown, string]>([
    ['nothing', {}, 'rank'],
    ['both', { rank: 4, variance: 0.5 }, 'rank'],
    ['no rank', { rank: 0 }, 'rank'],
    ['half a rank', { rank: 1.5 }, 'rank'],
    ['a rank beyond all', { rank: 257 }, 'rank'],
    ['no variance', { variance: 0 }, 'variance'],
    ['more variance than there is', { variance: 1.01 }, 'variance'],
    ['an unknown field', { rank: 4, order: 'svd' }, 'order'],
    ['an unknown mode', { rank: 4, mode: 'in' }, 'mode'],
    ['training on', { rank: 4, mode: 'cont' }, 'mode'],
  ])('refuses %s', async (_, body, param) => {
    const answer = await call('POST', '/v1/adapters/support/squeeze', body);
    expect(answer.status).toBe(400);
    expect((answer.body.error as unknown as Json).param).toBe(param);
    expect(harness.importer.squeezed).toEqual([]);
    expect(harness.registry.find('support')!.generation).toBe(generationA);
  });

  it('goes by If-Match', async () => {
    const other = await call(
      'POST',
      '/v1/adapters/support/squeeze',
      { rank: 4 },
      { 'if-match': generationB },
    );
    expect(other.status).toBe(409);
    expect(harness.importer.squeezed).toEqual([]);
    const same = await call(
      'POST',
      '/v1/adapters/support/squeeze',
      { rank: 4 },
      { 'if-match': `"${generationA}"` },
    );
    expect(same.status).toBe(200);
  });

  it('leaves a name that was swapped meanwhile where it is', async () => {
    const { importer, registry } = harness;
    const squeeze = importer.squeeze.bind(importer);
    importer.squeeze = async (...call) => {
      registry.swap('support', generationB, null);
      return squeeze(...call);
    };
    const answer = await call('POST', '/v1/adapters/support/squeeze', { rank: 4 });
    expect(answer.status).toBe(409);
    expect(registry.find('support')!.generation).toBe(generationB);
  });

  it('holds a lease while it computes, and none after a failure', async () => {
    const { importer, registry } = harness;
    let during = 0;
    importer.squeeze = async () => {
      during = registry.leases(generationA);
      throw new GatewayError('UNSUPPORTED', 'no pairs');
    };
    const answer = await call('POST', '/v1/adapters/support/squeeze', { rank: 4 });
    expect(answer.status).toBe(400);
    expect(during).toBe(1);
    expect(registry.leases(generationA)).toBe(0);
  });
});
