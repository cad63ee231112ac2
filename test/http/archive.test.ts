import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { GatewayError } from '../../src/errors.ts';
import { scoresPerCandidate } from '../../src/router/archive-scores.ts';
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
import { echoScript } from '../support/scripted-engine.ts';

// Shared: `support` (rank 16) and the base. One adapter of each of two tenants.

const path = '/v1/adapters/archive';

let harness: Harness;
beforeEach(() => {
  harness = createHarness({ apiKeys: tenantKeys });
  harness.registry.store(fakeGeneration('c3'), fakeManifest(8), 500);
  harness.registry.create('acme/mine', generationB);
  harness.registry.create('rival/secret', fakeGeneration('c3'));
});
afterEach(() => harness.close());

const call: Harness['call'] = (...given) => harness.call(...given);

const evaluated = (over: object = {}) => ({
  domain: 'law',
  adapter: 'support',
  rank: 8,
  latency_ms: 100,
  objective: 0.5,
  ...over,
});
const offer = (who: string, ...candidates: object[]): Promise<Answer> =>
  call(who, 'POST', path, { body: { candidates: candidates.map(evaluated) } });
const statuses = ({ body }: Answer): string[] => body.data.map((one: Json) => one.status);

const ask = (who: string, over: object = {}, headers: Record<string, string> = {}) =>
  call(who, 'POST', '/v1/chat/completions', {
    body: {
      model: 'tiny-base',
      messages: [{ role: 'user', content: 'Hi' }],
      domain: 'law',
      latency: { per_token_ms: 0.1, min_rank: 0 },
      max_tokens: 1000, // × 0.1 ms: the cell of 64 to 128 ms
      ...over,
    },
    headers,
  });
const textOf = ({ body }: Answer): string => body.choices[0].message.content;

describe('evaluations', () => {
  it('fill cells, are on disk when acknowledged, and show', async () => {
    const answer = await offer(
      'operator',
      {},
      { objective: 0.7, rank: 4 },
      { objective: 0.6 },
      { adapter: null, rank: 0, latency_ms: 20, objective: 0.1 },
    );
    expect(answer.status).toBe(200);
    expect(statuses(answer)).toEqual(['new', 'improved', 'not-better', 'new']);
    expect(answer.body.data[0]).toEqual({ tenant: null, domain: 'law', cell: 2, status: 'new' });
    expect(harness.archive.saves).toBe(1);
    const { body } = await call('operator', 'GET', path);
    expect(body).toMatchObject({ domains: 1, elites: 2, coverage: 0.2, qd_score: 0.7 + 0.1 });
    expect(body.latency_cells_ms[2]).toEqual([64, 128]);
    expect(body.data).toEqual([
      {
        ...{ tenant: null, domain: 'law', cell: 0, adapter: null, generation: null },
        ...{ kind: 'base', rank: 0, objective: 0.1, latency_ms: 20, current: true },
      },
      {
        ...{ tenant: null, domain: 'law', cell: 2, adapter: 'support', generation: generationA },
        ...{ kind: 'lora', rank: 4, objective: 0.7, latency_ms: 100, current: true },
      },
    ]);
  });

  it.each([
    ['an unknown adapter', { adapter: 'nobody' }, 404, 'candidates[1].adapter'],
    ['a rank that it has not', { rank: 17 }, 400, 'candidates[1].rank'],
    ['rank 0 of an adapter', { rank: 0 }, 400, 'candidates[1].rank'],
    ['a rank of the base', { adapter: null, rank: 1 }, 400, 'candidates[1].rank'],
    ['an objective above 1', { objective: 1.5 }, 400, 'candidates[1].objective'],
    ['no latency', { latency_ms: 0 }, 400, 'candidates[1].latency_ms'],
    ['a domain with capitals', { domain: 'Law' }, 400, 'candidates[1].domain'],
    ['a domain that is a path', { domain: '../x' }, 400, 'candidates[1].domain'],
    ['a domain of 65', { domain: 'd'.repeat(65) }, 400, 'candidates[1].domain'],
    ['something unknown', { reward: 1 }, 400, 'candidates[1].reward'],
  ])('%s is refused, and nothing of the call is kept', async (_, over, status, param) => {
    const answer = await offer('operator', {}, over);
    expect([answer.status, answer.body.error.param]).toEqual([status, param]);
    expect(harness.archive.map.rows()).toEqual([]);
    expect(harness.archive.saves).toBe(0);
  });

  it('are bounded in number', async () => {
    expect((await offer('operator', ...Array.from({ length: 257 }, () => ({})))).status).toBe(400);
    expect((await offer('operator')).status).toBe(400);
  });

  it('are not acknowledged when the disk is full', async () => {
    harness.archive.failure = new GatewayError('DISK_FULL', 'full');
    expect((await offer('operator', {})).status).toBe(507);
  });

  it('of one tenant are not the others’', async () => {
    await offer('operator', { domain: 'shared' }, { adapter: 'acme/mine', objective: 0.9 });
    expect((await offer('acme-admin', { adapter: 'rival/secret' })).status).toBe(404);
    await offer('acme-admin', { domain: 'own', adapter: null, rank: 0 });
    await offer('rival-admin', { adapter: 'rival/secret' });
    const rows = async (who: string): Promise<string[]> =>
      (await call(who, 'GET', path)).body.data.map((one: Json) => `${one.tenant}/${one.domain}`);
    expect(await rows('acme-admin')).toEqual(['null/shared', 'acme/law', 'acme/own']);
    expect(await rows('rival-admin')).toEqual(['null/shared', 'rival/law']);
    expect(await rows('operator')).toHaveLength(4);
  });

  it('are taken back by removing the row', async () => {
    await offer('operator', {}, { adapter: 'acme/mine' });
    await offer('rival-admin', {});
    const remove = async (who: string, rest: string): Promise<number> =>
      (await call(who, 'DELETE', `${path}/${rest}`)).status;
    expect(await remove('rival-admin', 'nothing')).toBe(404);
    expect(await remove('rival-admin', 'law?tenant=acme')).toBe(200); // its own: it has no other
    expect(await remove('rival-admin', 'law')).toBe(404);
    expect(harness.archive.map.rows().map(([row]) => row)).toEqual(['/law', 'acme/law']);
    expect(await remove('operator', 'law?tenant=acme')).toBe(200);
    expect(await remove('operator', 'law')).toBe(200);
    expect(harness.archive.map.rows()).toEqual([]);
    expect(harness.archive.saves).toBe(5);
  });

  it('leave no name to an adapter that their path would hide', async () => {
    const alias = await call('operator', 'PUT', '/v1/adapters/archive/alias', {
      body: { target: 'support' },
    });
    expect([alias.status, alias.body.error.code]).toEqual([409, 'adapter_exists']);
  });
});

describe('the picture', () => {
  const html = { accept: 'text/html,application/xhtml+xml' };
  it('shows every cell that is filled, and runs nothing', async () => {
    await offer('operator', {}, { domain: 'code', latency_ms: 1500, objective: 0.875, rank: 16 });
    const { status, headers, body } = await call('operator', 'GET', path, { headers: html });
    expect(status).toBe(200);
    expect(headers.get('content-type')).toMatch(/^text\/html/);
    expect(headers.get('content-security-policy')).toContain("default-src 'none'");
    expect(headers.get('vary')).toBe('accept');
    for (const word of ['law', 'code', 'rank 8 · 0.500', 'rank 16 · 0.875']) {
      expect(body).toContain(word);
    }
    expect(body.match(/<rect /g)).toHaveLength(20);
    expect(body).not.toMatch(/<script|src=|href=/);
  });

  it('says so when there is nothing', async () => {
    const { body } = await call('operator', 'GET', path, { headers: html });
    expect(body).toContain('Nothing was evaluated yet');
  });

  it('marks what was replaced since', async () => {
    await offer('operator', {});
    harness.registry.swap('support', generationB, null);
    const { body } = await call('operator', 'GET', path, { headers: html });
    expect(body).toContain('replaced since');
  });
});

describe('a request with a domain', () => {
  it('for the base is answered by its cell, at most at the rank that was measured', async () => {
    await offer('operator', {});
    const answer = await ask('plain');
    expect(textOf(answer)).toMatch(/^a1a1 at 8 /);
    expect(answer.headers.get('x-archive-cell')).toBe('law/2');
    expect(answer.headers.get('x-archive-match')).toBe('exact');
    expect(answer.headers.get('x-adapter-rank')).toBe('8/16');
    expect(answer.headers.get('x-rank-reason')).toBe('cell');
    expect(answer.body.model).toBe('tiny-base');
    expect(answer.body.rankgate).toMatchObject({ rank: 8, rank_max: 16, reason: 'cell' });
    const { adapter } = harness.routed[0]!;
    expect([adapter?.rankMax, adapter?.rankCurve.length]).toEqual([8, 8]);
  });

  it('is answered at a smaller rank where the cell’s own does not fit', async () => {
    await offer('operator', {});
    const answer = await ask('plain', { latency: { total_ms: 100 } }); // the table's: rank 4
    expect(textOf(answer)).toMatch(/^a1a1 at 4 /);
    expect(answer.headers.get('x-rank-reason')).toBe('reduced');
  });

  it('and a fixed rank gets the cell’s adapter at that rank', async () => {
    await offer('operator', {});
    const answer = await ask('plain', { latency: { per_token_ms: 0.1, rank: 12 } });
    expect(textOf(answer)).toMatch(/^a1a1 at 12 /);
    expect(answer.headers.get('x-rank-reason')).toBe('fixed');
  });

  it('reads the nearest filled cell, and the base from its own', async () => {
    await offer(
      'operator',
      { latency_ms: 3000 },
      { adapter: null, rank: 0, latency_ms: 20, objective: 0.1 },
    );
    const slow = await ask('plain', { latency: { per_token_ms: 1 } });
    expect(slow.headers.get('x-archive-match')).toBe('nearest');
    expect(slow.headers.get('x-archive-cell')).toBe('law/7');
    const fast = await ask('plain', { latency: { per_token_ms: 0.02 } });
    expect(textOf(fast)).toMatch(/^base /);
    expect(fast.headers.get('x-archive-cell')).toBe('law/0');
    const free = await ask('plain', { latency: {} });
    expect(textOf(free)).toMatch(/^a1a1 at 8 /);
  });

  it('that nobody filled is answered by the base, and says so', async () => {
    const answer = await ask('plain');
    expect(textOf(answer)).toMatch(/^base /);
    expect(answer.headers.get('x-archive-match')).toBe('none');
    expect(answer.headers.get('x-archive-cell')).toBeNull();
  });

  it('streams with the same headers', async () => {
    await offer('operator', {});
    const { headers, body } = await ask('plain', { stream: true });
    expect(headers.get('x-archive-cell')).toBe('law/2');
    expect(body).toContain('a1a1 ');
  });

  it('passes over a generation that the name has left', async () => {
    await offer('operator', {});
    harness.registry.swap('support', generationB, null);
    expect(textOf(await ask('plain'))).toMatch(/^base /);
  });

  it('reads the tenant’s own row before everybody’s', async () => {
    await offer('operator', {});
    expect(textOf(await ask('acme-use'))).toMatch(/^a1a1 /);
    await offer('acme-admin', { adapter: 'acme/mine', objective: 0.1 });
    expect(textOf(await ask('acme-use'))).toMatch(/^b2b2 /);
    expect(textOf(await ask('plain'))).toMatch(/^a1a1 /);
  });

  it('that names its adapter gets that adapter', async () => {
    await offer('operator', { adapter: null, rank: 0 });
    const answer = await ask('acme-use', { model: 'acme/mine' });
    expect(textOf(answer)).toMatch(/^b2b2 at 8 /);
    expect(answer.headers.get('x-archive-match')).toBeNull();
  });

  it.each([
    ['a blend', { adapters: [{ id: 'support', weight: 1 }] }],
    ['capitals', { domain: 'Law' }],
    ['nothing', { domain: '' }],
    ['a slash', { domain: 'acme/law' }],
  ])('is refused with %s', async (_, over) => {
    const { status, body } = await ask('plain', over);
    expect([status, body.error.param]).toEqual([400, 'domain']);
  });
});

describe('feedback', () => {
  const score = (who: string, id: string, value = 1): Promise<Answer> =>
    call(who, 'POST', '/v1/feedback', { body: { request_id: id, score: value } });

  /** The last score's answer. */
  async function scored(
    who: string,
    values: readonly number[],
    over: object = {},
  ): Promise<Answer> {
    let last: Answer | null = null;
    for (const value of values) {
      const { body } = await ask(who, { model: 'support', latency: { rank: 6 }, ...over });
      last = await score(who, body.id, value);
      expect(last.status).toBe(200);
    }
    return last!;
  }
  const many = Array.from({ length: scoresPerCandidate }, (_, i) => (i % 4 === 0 ? 0 : 1));

  it('fills a cell of a domain that was evaluated, once there is enough of it', async () => {
    await offer('operator', { objective: 0.5, latency_ms: 16 });
    const before = await scored('plain', many.slice(1));
    expect(before.body).toMatchObject({ object: 'feedback', archive: 'counted' });
    const { body } = await scored('plain', [0]);
    expect(body.archive).toBe('improved');
    const [elite] = harness.archive.map.rows()[0]![1];
    // The scripted engine says 9 ms of every answer.
    expect(elite).toMatchObject({ adapter: 'support', rank: 6, objective: 0.75, latencyMs: 9 });
  });

  it('makes no rows', async () => {
    const { body } = await scored('plain', many);
    expect(body.archive).toBe('counted');
    expect(harness.archive.map.rows()).toEqual([]);
  });

  it('of a tenant fills the tenant’s row alone', async () => {
    await offer('operator', { objective: 0.1, latency_ms: 16 });
    await offer('acme-admin', { objective: 0.1, latency_ms: 16 });
    expect((await scored('acme-use', many)).body.archive).toBe('improved');
    const objectives = harness.archive.map.rows().map(([row, [elite]]) => [row, elite?.objective]);
    expect(objectives).toEqual([
      ['/law', 0.1],
      ['acme/law', 0.75],
    ]);
  });

  it('of an answer at rank 0 is the base’s', async () => {
    await offer('operator', { objective: 0.1, latency_ms: 16 });
    await scored('plain', many, { latency: { rank: 0 } });
    expect(harness.archive.map.rows()[0]![1][0]).toMatchObject({ adapter: null, kind: 'base' });
  });

  it('counts once, for whoever got the answer, and for one answer', async () => {
    const { body } = await ask('plain');
    expect((await score('acme-use', body.id)).status).toBe(404);
    expect((await score('plain', body.id)).status).toBe(200);
    expect((await score('plain', body.id)).status).toBe(404);
    expect((await score('plain', 'chatcmpl-nobody')).status).toBe(404);
    const several = await ask('plain', { n: 2 });
    expect((await score('plain', several.body.id)).status).toBe(404);
  });

  it('of an answer whose rank was changed on the way fills no cell', async () => {
    await offer('operator', { objective: 0.1, latency_ms: 16 });
    harness.engine.script = async function* changing(request) {
      for await (const event of echoScript(request, new AbortController().signal)) {
        yield event.kind === 'end' ? { ...event, rankMean: 5.5 } : event;
      }
    };
    expect((await scored('plain', many)).body.archive).toBe('counted');
    expect(harness.judged).toHaveLength(many.length);
  });

  it('tells the rank policy, whether there is a domain or not', async () => {
    for (const domain of ['law', undefined]) {
      const { body } = await ask('plain', { domain, model: 'support', latency: { rank: 6 } });
      expect((await score('plain', body.id, 0.25)).body.archive).toBe('counted');
      expect(harness.judged.at(-1)).toMatchObject({ met: null, score: 0.25, plan: { rank: 6 } });
    }
  });

  it.each([
    [{ request_id: 'x' }, 'score'],
    [{ request_id: 'x', score: 1.1 }, 'score'],
    [{ request_id: 'x', score: -0.1 }, 'score'],
    [{ request_id: '', score: 1 }, 'request_id'],
    [{ request_id: 'x', score: 1, comment: 'x'.repeat(2001) }, 'comment'],
    [{ request_id: 'x', score: 1, correction: '' }, 'correction'],
  ])('%j is refused', async (body, param) => {
    const answer = await call('plain', 'POST', '/v1/feedback', { body });
    expect([answer.status, answer.body.error.param]).toEqual([400, param]);
  });
});
