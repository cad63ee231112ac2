import { describe, expect, it } from 'vitest';
import {
  type GenerateRequest,
  noUrgency,
  type StepCosts,
  type Urgency,
} from '../../../src/engine/messages.ts';
import { useOf } from '../../support/adapter-use.ts';
import { fakeGeneration, fakePacked } from '../../support/fake-stepper.ts';
import { idleAnswer } from '../../support/idle-answer.ts';
import {
  changesOf,
  fakeRankOf,
  greedy,
  type HarnessOptions,
  type Heard,
  idsOf,
  LoopHarness,
  makeRequest,
  textOf,
} from '../../support/loop-harness.ts';

// What requests state about time, in a loop whose clock moves by what its steps cost.

const range = (length: number, from = 0): Int32Array =>
  Int32Array.from({ length }, (_, i) => (from + i * 7) % 64);
const never = Number.POSITIVE_INFINITY;
const urgent = (over: Partial<Urgency>): Urgency => ({ ...noUrgency, ...over });
const costs: StepCosts = {
  ...{ step: 8, decodeRow: 2, prefillToken: 1, decodeRank: 0.5, prefillRank: 0, kvCell: 0 },
};
/** The fakes' generation with most ranks, 40: 5 pages. */
const widest = fakeGeneration(17);

function timed(options: HarnessOptions = {}, isTold = true): LoopHarness {
  const harness = new LoopHarness({ speculation: 'off', ...options });
  if (isTold) harness.loop.setCosts(costs);
  harness.advanceBy(costs);
  return harness;
}

/** As the model alone would, at the ranks that were told. */
function expectIdle(heard: Heard, request: GenerateRequest): void {
  const changes = changesOf(heard);
  const want = idleAnswer(request, fakeRankOf, [], changes);
  expect(idsOf(heard), request.id).toEqual(want.tokens);
  expect(textOf(heard), request.id).toBe(want.text);
  expect(heard.events.filter(({ kind }) => kind === 'start')).toHaveLength(1);
  const planned = Math.max(0, ...(request.adapter?.parts ?? []).map(({ rank }) => rank));
  const ranks = want.tokens.map(
    (_, i) => changes.findLast(({ afterTokens }) => afterTokens <= i)?.rank ?? planned,
  );
  const mean = ranks.reduce((sum, rank) => sum + rank, 0) / ranks.length;
  const end = heard.events.at(-1);
  expect(end?.kind === 'end' ? end.rankMean : null, request.id).toBeCloseTo(mean, 9);
}

/** When each ended: the place of its end among all. */
function order(harness: LoopHarness): string[] {
  return harness.messages.flatMap((message) =>
    message.kind === 'events'
      ? message.batch.filter(({ event }) => event.kind === 'end').map(({ id }) => id)
      : [],
  );
}

describe('a request that waits', () => {
  const oneAtATime = { cells: 17 * 16 };
  const long = makeRequest({ id: 'long', tokens: range(130), tokensMax: 120 });

  it('is dropped when it is strict and its time has passed, before anything is spent on it', async () => {
    const harness = timed(oneAtATime);
    harness.submit(long);
    await harness.ticks(3);
    const total = { id: 'total', tokens: range(100), tokensMax: 99 };
    const strict = [
      makeRequest({ ...total, urgency: urgent({ deadlineMs: 300, strict: true }) }),
      makeRequest({ ...total, id: 'first', urgency: urgent({ ttftMs: 200, strict: true }) }),
    ].map((request) => harness.submit(request));
    const patient = makeRequest({ ...total, id: 'patient', urgency: urgent({ deadlineMs: 300 }) });
    const heard = harness.submit(patient);
    await harness.drain();
    for (const one of strict) {
      expect(one.failure?.code).toBe('DEADLINE_TOO_SHORT');
      expect(one.events).toEqual([]);
    }
    expectIdle(heard, patient); // late, and not strict
    expect(harness.loop.stats().prefixTokensQueried).toBe(130 + 100); // nobody looked at the others' prompts
  });

  it('is refused when it is too old, unless its reader has had something of it', async () => {
    const harness = timed({ ...oneAtATime, limits: { waitingMsMax: 400 } });
    harness.submit(long);
    await harness.ticks(3);
    const request = { tokens: range(100), tokensMax: 99 };
    const old = harness.submit(makeRequest({ ...request, id: 'old' }));
    const full = idleAnswer(makeRequest({ ...request, id: 'full' }), fakeRankOf, []).tokens;
    const begun = Int32Array.from(full.slice(0, 7));
    const resumed = harness.submit(makeRequest({ ...request, id: 'resumed' }), begun);
    await harness.drain();
    expect(old.failure?.code).toBe('CONTENDED');
    expect(old.failure?.message).toMatch(/no room for \d+ ms/);
    expect(idsOf(resumed)).toEqual(full.slice(7));
  });

  it('goes on at its smallest rank when its time has passed, and says so', async () => {
    const harness = timed(oneAtATime);
    harness.submit(long);
    await harness.ticks(3);
    const base = { tokens: range(100), tokensMax: 90, adapter: useOf(widest, 40) };
    const heard = [0, 3].map((rankMin) => {
      const urgency = urgent({ deadlineMs: 200, rankMin });
      const request = makeRequest({ ...base, id: `late${rankMin}`, urgency });
      return { request, heard: harness.submit(request), rankMin };
    });
    const fixed = makeRequest({
      ...{ ...base, id: 'fixed' },
      urgency: urgent({ deadlineMs: 200, rankIsFixed: true }),
    });
    const kept = harness.submit(fixed);
    await harness.drain();
    for (const one of heard) {
      expect(one.heard.events[1]).toEqual({ kind: 'rank', rank: one.rankMin, reason: 'late' });
      expectIdle(one.heard, one.request);
    }
    expect(changesOf(kept)).toEqual([]);
    expectIdle(kept, fixed);
  });

  it('has room by priority, then by deadline, then by arrival', async () => {
    const harness = timed(oneAtATime);
    harness.submit(long);
    await harness.ticks(2);
    const add = (id: string, urgency: Partial<Urgency>): void => {
      const request = makeRequest({ id, tokens: range(100), tokensMax: 90 });
      harness.submit({ ...request, urgency: urgent({ priority: 4, ...urgency }) });
    };
    add('whenever', {});
    add('later', { ttftMs: 1e6 });
    add('soon', { ttftMs: 1e5 });
    add('important', { priority: 5 });
    await harness.drain();
    expect(order(harness)).toEqual(['long', 'important', 'soon', 'later', 'whenever']);
  });

  it('has room before all of a tenant that holds more', async () => {
    const harness = timed({ cells: 29 * 16 }); // `long`, and one of 12 blocks beside it
    const add = (id: string, tenant: string, priority: number): void => {
      const request = makeRequest({ id, tenant, tokens: range(100), tokensMax: 90 });
      harness.submit({ ...request, urgency: urgent({ priority, ttftMs: 10_000 - id.length }) });
    };
    harness.submit(long);
    add('first', 'tenant', 5);
    await harness.ticks(12);
    add('second', 'tenant', 5);
    add('third', 'tenant', 5);
    add('other', 'other', 0);
    await harness.drain();
    expect(order(harness)).toEqual(['first', 'long', 'other', 'second', 'third']);
  });

  it('takes the last place of a flood when the queue is full', async () => {
    const harness = timed({ ...oneAtATime, limits: { waitingMax: 4 } });
    harness.submit(long);
    await harness.ticks(2);
    const flood = ['f1', 'f2', 'f3', 'f4'].map((id) =>
      harness.submit(makeRequest({ id, tenant: 'flood' })),
    );
    expect(harness.submit(makeRequest({ id: 'f5', tenant: 'flood' })).failure?.code).toBe(
      'CONTENDED',
    );
    const calm = harness.submit(makeRequest({ id: 'calm', tenant: 'calm' }));
    expect(flood.map(({ failure }) => failure?.code)).toEqual([
      ...[undefined, undefined, undefined],
      'CONTENDED',
    ]);
    await harness.drain();
    expect(calm.events.at(-1)?.kind).toBe('end');
  });
});

describe('a request that waits for its adapter', () => {
  const short = { tokens: Int32Array.of(1, 2), tokensMax: 2 };
  const asked = (id: string, n: number, priority: number) =>
    makeRequest({
      ...short,
      id,
      adapter: useOf(fakeGeneration(n), 1),
      urgency: urgent({ priority }),
    });
  /** Files that are read when the test says so. */
  function slowFiles() {
    const reads: (() => void)[] = [];
    const open: HarnessOptions['open'] = (key) =>
      new Promise((resolve) => reads.push(() => resolve(fakePacked(key, fakeRankOf(key)))));
    const readAll = (): void => {
      for (const read of reads.splice(0)) read();
    };
    return { open, readAll };
  }

  it('has what was loaded for it although thousands of more urgent ones came meanwhile', async () => {
    const { open, readAll } = slowFiles();
    const harness = timed({ open, limits: { waitingMax: 5000 } });
    harness.submit(asked('patient', 1, 0));
    await harness.ticks(2); // its file is asked for
    for (let i = 0; i < 2500; i++) harness.submit(asked(`urgent ${i}`, 2 + (i % 3), 9));
    const reading = setInterval(readAll, 0);
    try {
      await harness.drain();
    } finally {
      clearInterval(reading);
    }
    expect([...harness.heard.values()].filter(({ failure }) => failure !== null)).toEqual([]);
  });
});

describe('preemption', () => {
  const low = (id: string, over: Partial<GenerateRequest> = {}): GenerateRequest =>
    makeRequest({
      ...{ id, tokens: range(100, id.length), tokensMax: 80, urgency: urgent({ priority: 2 }) },
      ...over,
    });
  const warm = { ...greedy, temperature: 0.9, seed: 11, presencePenalty: 0.4 };

  it('gives cells to a higher priority, and the answer goes on as it would have', async () => {
    const harness = timed({ cells: 26 * 16 }); // two of 12 blocks
    const old = low('old', { sampling: warm, stop: ['zzzz'] });
    const young = low('young', { sampling: warm, adapter: useOf(fakeGeneration(3), 9) });
    const heard = [harness.submit(old), harness.submit(young)];
    await harness.ticks(30);
    expect(idsOf(heard[1]!).length).toBeGreaterThan(5);
    const high = low('high', { urgency: urgent({ priority: 8, ttftMs: 400 }) });
    const first = harness.submit(high);
    await harness.ticks(2);
    expect(harness.loop.stats()).toMatchObject({ running: 2, waiting: 1, preemptions: 1 });
    await harness.drain();
    expectIdle(first, high);
    expectIdle(heard[0]!, old);
    expectIdle(heard[1]!, young);
    expect(order(harness)).toEqual(['old', 'high', 'young']);
    expect(harness.loop.stats()).toMatchObject({ preemptions: 1, kvCellsUsed: 0 });
  });

  it('takes a row where rows are what is short', async () => {
    const harness = timed({ cells: 200 * 16 });
    const rows = Array.from({ length: 8 }, (_, i) => low(`low${'x'.repeat(i)}`));
    const heard = rows.map((request) => harness.submit(request));
    await harness.ticks(60);
    const high = low('high', { urgency: urgent({ priority: 8 }) });
    const first = harness.submit(high);
    await harness.ticks(2);
    expect(first.events[0]).toMatchObject({ kind: 'start' });
    await harness.drain();
    for (const [i, request] of rows.entries()) expectIdle(heard[i]!, request);
    expectIdle(first, high);
    expect(harness.loop.stats().preemptions).toBe(1);
  });

  it('displaces nobody more than twice, so everybody ends whoever comes', async () => {
    const harness = timed({ cells: 14 * 16 }); // one of 12 blocks
    const victim = low('victim');
    const heard = harness.submit(victim);
    const others: Array<[GenerateRequest, Heard]> = [];
    for (let i = 0; i < 150; i++) {
      if (harness.loop.stats().waiting < 4) {
        const request = makeRequest({
          ...{ id: `h${i}`, tokens: range(60, i), tokensMax: 8 },
          urgency: urgent({ priority: 9, ttftMs: 1 }),
        });
        others.push([request, harness.submit(request)]);
      }
      await harness.ticks(8);
    }
    // They still came when it ended: nothing waited for a pause.
    expect(heard.events.at(-1)?.kind).toBe('end');
    expect(others.at(-1)![1].events.at(-1)?.kind).not.toBe('end');
    await harness.drain();
    expect(harness.loop.stats().preemptions).toBe(2);
    expectIdle(heard, victim);
    for (const [request, one] of others) expectIdle(one, request);
  });
});

describe('ranks on the way', () => {
  const hasty = (id: string, over: Partial<Urgency>, rank = 40): GenerateRequest =>
    makeRequest({
      ...{ id, tokens: range(40), tokensMax: 60, adapter: useOf(widest, rank) },
      urgency: urgent(over),
    });

  it('fall when the batch is too slow, rise when it has time, and are told', async () => {
    const harness = timed({ pages: 20 });
    // Alone 8 + 2 + 20 ms a token at rank 40. Four of them take 96.
    const requests = ['a', 'b', 'c', 'd'].map((id) => hasty(id, { deadlineMs: 4000 }));
    const heard = requests.map((request) => harness.submit(request));
    const short = hasty('short', { perTokenMs: 60 });
    const tight = harness.submit({ ...short, tokensMax: 20 });
    await harness.drain();
    for (const [i, request] of requests.entries()) expectIdle(heard[i]!, request);
    expectIdle(tight, { ...short, tokensMax: 20 });
    const events = [...heard, tight].flatMap((one) => one.events);
    const reasons = events.flatMap((event) => (event.kind === 'rank' ? [event.reason] : []));
    expect(new Set(reasons)).toEqual(new Set(['late', 'slack']));
    for (const one of heard) {
      const end = one.events.at(-1);
      expect(end?.kind === 'end' ? end.totalMs : never).toBeLessThanOrEqual(4000);
    }
    const means = heard
      .map((one) => one.events.at(-1)!)
      .map((end) => (end.kind === 'end' ? end.rankMean : 0));
    expect(means.reduce((a, b) => a + b, 0) / means.length).toBeGreaterThan(8); // rank 1 would do
  });

  it('stay when the caller fixed them, stated no time, or nothing is known of costs', async () => {
    for (const [urgency, isTold] of [
      [{ deadlineMs: 900, rankIsFixed: true }, true],
      [{}, true],
      [{ deadlineMs: 900 }, false],
    ] as const) {
      const harness = timed({ pages: 20 }, isTold);
      const requests = ['a', 'b', 'c'].map((id) => hasty(id, urgency));
      const heard = requests.map((request) => harness.submit(request));
      await harness.drain();
      for (const [i, request] of requests.entries()) expectIdle(heard[i]!, request);
      expect(heard.flatMap(changesOf)).toEqual([]);
    }
  });

  it('do not fall below what the request allows', async () => {
    const harness = timed({ pages: 20 });
    const requests = ['a', 'b', 'c'].map((id) => hasty(id, { deadlineMs: 300, rankMin: 5 }));
    const heard = requests.map((request) => harness.submit(request));
    await harness.drain();
    const ranks = heard.flatMap(changesOf).map(({ rank }) => rank);
    expect(Math.min(...ranks)).toBe(5);
    for (const [i, request] of requests.entries()) expectIdle(heard[i]!, request);
  });

  it('may rise above the plan as far as the adapter is loaded', async () => {
    const harness = timed({ pages: 20 });
    const loaded = hasty('loaded', {});
    harness.submit({ ...loaded, tokensMax: 2 });
    await harness.drain();
    const request = hasty('r', { deadlineMs: 60_000 }, 3);
    const heard = harness.submit(request);
    await harness.drain();
    expect(changesOf(heard).at(-1)?.rank).toBe(40);
    expectIdle(heard, request);
    const fresh = timed({ pages: 20 });
    const other = fresh.submit(request);
    await fresh.drain();
    expect(Math.max(0, ...changesOf(other).map(({ rank }) => rank))).toBeLessThanOrEqual(8); // a page is loaded
    expectIdle(other, request);
  });

  it('leave prefix sharing from the first changed token on', async () => {
    const harness = timed({ pages: 20 });
    const request = { ...hasty('r', { deadlineMs: 900 }), tokens: range(40), tokensMax: 90 };
    const heard = harness.submit(request);
    await harness.drain();
    const [change] = changesOf(heard);
    expect(change).toBeDefined();
    const told = Int32Array.of(...request.tokens, ...idsOf(heard));
    const next = makeRequest({ id: 'n', tokens: told, tokensMax: 5, adapter: useOf(widest, 40) });
    const again = harness.submit(next);
    await harness.drain();
    const shared = Math.floor((40 + change!.afterTokens - 1) / 16) * 16;
    expect(again.events[0]).toMatchObject({ kind: 'start', cachedTokens: shared });
    expectIdle(again, next);
  });

  it('are computed again as they were, after a preemption and after a death of the engine', async () => {
    const request = { ...hasty('r', {}), tokensMax: 50 };
    const changes = [
      { afterTokens: 5, rank: 3 },
      { afterTokens: 12, rank: 0 },
      { afterTokens: 13, rank: 16 },
      { afterTokens: 30, rank: 1 },
    ];
    const full = idleAnswer(request, fakeRankOf, [], changes).tokens;
    for (const sent of [5, 6, 13, 14, 31, 40]) {
      const harness = new LoopHarness();
      const known = changes.filter(({ afterTokens }) => afterTokens <= sent);
      const heard = harness.submit(request, Int32Array.from(full.slice(0, sent)), known);
      await harness.drain();
      const want = idleAnswer(request, fakeRankOf, [], known).tokens;
      expect(want.slice(0, sent)).toEqual(full.slice(0, sent));
      expect(idsOf(heard)).toEqual(want.slice(sent));
    }
    const harness = timed({ cells: 10 * 16, pages: 20 });
    const governed = hasty('governed', { deadlineMs: 1200, priority: 2 });
    const heard = harness.submit(governed);
    await harness.ticks(30);
    expect(changesOf(heard).length).toBeGreaterThan(0);
    const high = makeRequest({ id: 'high', tokens: range(99), urgency: urgent({ priority: 8 }) });
    harness.submit(high);
    await harness.drain();
    expect(harness.loop.stats().preemptions).toBe(1);
    expectIdle(heard, governed);
  });
});
