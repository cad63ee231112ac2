import { afterEach, describe, expect, it } from 'vitest';
import { GatewayError } from '../../src/errors.ts';
import { fakeManifest } from '../support/fake-registry.ts';
import {
  createHarness,
  generationA,
  generationB,
  type Harness,
  type Json,
  settleTasks,
} from '../support/http-harness.ts';
import { EventFeed, echoScript } from '../support/scripted-engine.ts';

// /readyz while a system adapter is configured: without it every request would fail (server/blend.ts), so nobody is to be
// sent here until it is proved to work.

let harness: Harness;
afterEach(() => harness.close());

function open(kind: 'eora' | 'lora' | null): void {
  harness = createHarness({ systemAdapter: 'repair' });
  if (kind === null) return;
  const manifest = { ...fakeManifest(8), kind } as const;
  harness.registry.store(generationB, manifest, 999);
  harness.registry.create('repair', generationB);
}

/** Looks, and gives a try that the look started the time to end. */
async function ready(): Promise<[number, string | undefined]> {
  const response = await harness.fetch('GET', '/readyz');
  const { reason } = (await response.json()) as Json;
  await settleTasks();
  return [response.status, reason];
}

const failing = (code: 'ADAPTER_CORRUPT' | 'CONTENDED' | 'UNSUPPORTED'): void => {
  harness.engine.script = () => {
    const feed = new EventFeed();
    feed.push(new GatewayError(code, 'planted'));
    return feed;
  };
};

describe('/readyz with a system adapter', () => {
  it('is ready when a token was made with it, once', async () => {
    open('eora');
    expect(await ready()).toEqual([503, 'system adapter loading']);
    expect(await ready()).toEqual([200, undefined]);
    expect(await ready()).toEqual([200, undefined]);
    expect(harness.engine.requests).toHaveLength(1);
    const system = { generation: generationB, rank: 8, weight: 1 };
    expect(harness.engine.requests[0]).toMatchObject({
      ...{ tokensMax: 1, adapter: { parts: [], system } },
    });
  });

  it.each([null, 'lora'] as const)('is not while the name stands for %s', async (kind) => {
    open(kind);
    expect(await ready()).toEqual([503, 'system adapter missing']);
    expect(harness.engine.requests).toEqual([]);
  });

  it('becomes ready when it comes, and not when it goes', async () => {
    open(null);
    expect(await ready()).toEqual([503, 'system adapter missing']);
    harness.registry.store(generationB, { ...fakeManifest(8), kind: 'eora' }, 999);
    harness.registry.create('repair', generationB);
    await ready();
    expect(await ready()).toEqual([200, undefined]);
    harness.registry.remove('repair', null);
    expect(await ready()).toEqual([503, 'system adapter missing']);
  });

  it.each(['ADAPTER_CORRUPT', 'UNSUPPORTED'] as const)(
    'says why it cannot be loaded (%s), and tries again at every look',
    async (code) => {
      open('eora');
      failing(code);
      expect(await ready()).toEqual([503, 'system adapter loading']);
      const reason = `system adapter cannot be used: ${code}`;
      expect(await ready()).toEqual([503, reason]);
      harness.engine.script = echoScript;
      expect(await ready()).toEqual([503, reason]);
      expect(await ready()).toEqual([200, undefined]);
    },
  );

  it('is not told from what a full queue refuses', async () => {
    open('eora');
    failing('CONTENDED');
    for (let i = 0; i < 3; i++) expect(await ready()).toEqual([503, 'system adapter loading']);
    expect(harness.engine.requests).toHaveLength(3);
  });

  it('stays ready while another generation is tried, until that fails', async () => {
    open('eora');
    await ready();
    harness.registry.store(generationA, { ...fakeManifest(16), kind: 'eora' }, 999);
    harness.registry.swap('repair', generationA, null);
    failing('ADAPTER_CORRUPT');
    expect(await ready()).toEqual([200, undefined]);
    expect(await ready()).toEqual([503, 'system adapter cannot be used: ADAPTER_CORRUPT']);
    harness.registry.rollback('repair');
    harness.engine.script = echoScript;
    await ready();
    expect(await ready()).toEqual([200, undefined]);
  });
});
