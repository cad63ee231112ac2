import { describe, expect, it } from 'vitest';
import { KvPool } from '../../../src/engine/kv-pool.ts';
import type { GenerateRequest } from '../../../src/engine/messages.ts';
import { GatewayError } from '../../../src/errors.ts';
import { useOf } from '../../support/adapter-use.ts';
import { FakeStepper, fakeGeneration, fakePacked } from '../../support/fake-stepper.ts';
import { idleAnswer } from '../../support/idle-answer.ts';
import {
  fakeRankOf,
  greedy,
  idsOf,
  LoopHarness,
  makeRequest,
  nextTick,
  textOf,
  tokensOf,
} from '../../support/loop-harness.ts';

const range = (length: number, from = 0): Int32Array =>
  Int32Array.from({ length }, (_, i) => (from + i * 7) % 64);

const idle = (request: GenerateRequest, ends: readonly number[] = []) =>
  idleAnswer(request, fakeRankOf, ends);

function expectClean(harness: LoopHarness): void {
  const stats = harness.loop.stats();
  expect(stats).toMatchObject({ running: 0, waiting: 0, kvCellsUsed: 0 });
  expect(stats.residents.filter((one) => one.uses !== 0)).toEqual([]);
}

describe('EngineLoop', () => {
  it('answers as the model alone does, adapters and base mixed in one batch', async () => {
    const harness = new LoopHarness();
    const requests = [
      makeRequest({ id: 'base', tokens: range(40), tokensMax: 12 }),
      ...[1, 2, 3].map((n) =>
        makeRequest({
          id: `a${n}`,
          tokens: range(40),
          tokensMax: 20,
          adapter: useOf(fakeGeneration(n), Math.ceil(fakeRankOf(fakeGeneration(n)) / n)),
        }),
      ),
      makeRequest({
        id: 'zero',
        tokens: range(40),
        tokensMax: 12,
        adapter: useOf(fakeGeneration(1), 0),
      }),
      makeRequest({
        id: 'warm',
        tokens: range(9, 5),
        tokensMax: 15,
        sampling: { ...greedy, temperature: 0.8, topP: 0.9, seed: 5, frequencyPenalty: 0.5 },
      }),
    ];
    const heard = requests.map((request) => harness.submit(request));
    await harness.drain();
    for (const [i, request] of requests.entries()) {
      const want = idle(request);
      expect(idsOf(heard[i]!), request.id).toEqual(want.tokens);
      expect(textOf(heard[i]!), request.id).toBe(want.text);
      expect(heard[i]!.events.map((event) => event.kind).at(0)).toBe('start');
      expect(heard[i]!.events.at(-1)).toMatchObject({
        kind: 'end',
        reason: 'length',
        completionTokens: request.tokensMax,
      });
    }
    expect(idsOf(heard[4]!)).toEqual(idsOf(heard[0]!)); // rank 0 is the base
    expect(Math.max(...harness.reports.map((report) => report.decodeRows))).toBeGreaterThan(3);
    expectClean(harness);
  });

  it('reports each step: rows, ranks and the cells attended', async () => {
    const harness = new LoopHarness();
    const adapter = useOf(fakeGeneration(3), 5);
    harness.submit(makeRequest({ id: 'r', tokens: range(40), tokensMax: 3, adapter }));
    await harness.drain();
    const sum = (from: number, to: number): number => ((to - from) * (from + 1 + to)) / 2;
    expect(harness.reports.map(({ ms, ...rest }) => rest)).toEqual([
      { decodeRows: 0, prefillTokens: 32, decodeRanks: 0, prefillRanks: 160, kvCells: sum(0, 32) },
      { decodeRows: 0, prefillTokens: 8, decodeRanks: 0, prefillRanks: 40, kvCells: sum(32, 40) },
      { decodeRows: 1, prefillTokens: 0, decodeRanks: 5, prefillRanks: 0, kvCells: 41 },
      { decodeRows: 1, prefillTokens: 0, decodeRanks: 5, prefillRanks: 0, kvCells: 42 },
    ]);
  });

  it('ends at an end token without showing it, and flushes what was held back', async () => {
    const probe = makeRequest({ id: 'p', tokensMax: 30 });
    const end = idle(probe).tokens[6]!;
    const harness = new LoopHarness({ base: { endTokens: [end] } });
    const heard = harness.submit(probe);
    await harness.drain();
    const want = idle(probe, [end]);
    expect(want.reason).toBe('stop');
    expect(idsOf(heard)).toEqual(want.tokens);
    expect(textOf(heard)).toBe(want.text);
    expect(heard.events.at(-1)).toMatchObject({
      reason: 'stop',
      stopString: null,
      completionTokens: want.tokens.length,
    });
    expectClean(harness);
  });

  it('ends at a stop string that spans tokens and leaks no prefix of it', async () => {
    const plain = makeRequest({ id: 'p', tokensMax: 40 });
    const whole = idle(plain).text;
    const stop = whole.slice(9, 13);
    const harness = new LoopHarness();
    const heard = harness.submit(makeRequest({ id: 'p', tokensMax: 40, stop: ['zzzz', stop] }));
    await harness.drain();
    expect(textOf(heard)).toBe(whole.slice(0, whole.indexOf(stop)));
    expect(heard.events.at(-1)).toMatchObject({ reason: 'stop', stopString: stop });
  });

  it('reports log-probabilities when asked: the greedy token leads its own list', async () => {
    const harness = new LoopHarness();
    const heard = harness.submit(makeRequest({ id: 'p', tokensMax: 4, topLogprobs: 3 }));
    const none = harness.submit(makeRequest({ id: 'q', tokensMax: 4 }));
    await harness.drain();
    for (const one of tokensOf(heard)) {
      expect(one.top).toHaveLength(3);
      expect(one.top[0]).toMatchObject({ token: one.token, logprob: one.logprob });
      expect(one.logprob).toBeLessThan(0);
    }
    expect(tokensOf(none).map((one) => one.logprob)).toEqual([NaN, NaN, NaN, NaN]);
  });

  it('refuses for ever what does not fit, and for now what finds the queue full', async () => {
    const harness = new LoopHarness({
      cells: 160,
      base: { contextMax: 200 },
      limits: { waitingMax: 2, waitingTokensMax: 50 },
    });
    const codeOf = (over: Partial<GenerateRequest>): string | undefined =>
      harness.submit(makeRequest({ id: `${Math.random()}`, ...over })).failure?.code;
    expect(codeOf({ tokens: range(100), tokensMax: 101 })).toBe('CONTEXT_LENGTH_EXCEEDED');
    expect(codeOf({ tokens: range(100), tokensMax: 46 })).toBe('CONTEXT_LENGTH_EXCEEDED');
    expect(codeOf({ tokens: Int32Array.of(64) })).toBe('INVALID_REQUEST');
    expect(codeOf({ tokens: Int32Array.of(-1) })).toBe('INVALID_REQUEST');
    expect(codeOf({ tokens: new Int32Array(0) })).toBe('INVALID_REQUEST');
    expect(codeOf({ adapter: useOf(fakeGeneration(1), 1.5) })).toBe('INVALID_REQUEST');
    expect(codeOf({ tokens: range(99), tokensMax: 46 })).toBeUndefined(); // fills the pool exactly
    expect(codeOf({ tokens: range(10) })).toBe('CONTENDED'); // 99 + 10 prompt tokens
    await harness.drain();
    expect(codeOf({})).toBeUndefined();
    expect(codeOf({})).toBeUndefined();
    expect(codeOf({})).toBe('CONTENDED');
    await harness.drain();
    expectClean(harness);
  });

  it('fails only the sequence whose logits are NaN', async () => {
    const stepper = new FakeStepper({
      cells: 1024,
      pages: 4,
      onLogits: (segment, logits) => {
        if (segment.position === 5) logits[9] = Number.NaN;
      },
    });
    const harness = new LoopHarness({ stepper });
    const bad = harness.submit(makeRequest({ id: 'bad', tokens: range(3) }));
    const good = makeRequest({ id: 'good', tokens: range(20), tokensMax: 10 });
    const heard = harness.submit(good);
    await harness.drain();
    expect(bad.failure?.code).toBe('ENGINE_FAILED');
    expect(idsOf(bad)).toHaveLength(3);
    expect(idsOf(heard)).toEqual(idle(good).tokens);
    expectClean(harness);
  });

  it('fails only the sequence that the stepper refuses, whoever shares its batch', async () => {
    const stepper = new FakeStepper({
      cells: 1024,
      pages: 4,
      onStep: (segments) => {
        if (segments.some((segment) => segment.tokens.includes(63))) {
          throw new GatewayError('SHAPE_MISMATCH', 'planted');
        }
      },
    });
    const harness = new LoopHarness({ stepper });
    const good = makeRequest({ id: 'good', tokens: Int32Array.of(1, 2), tokensMax: 1 });
    const goodHeard = harness.submit(good);
    const bad = harness.submit(makeRequest({ id: 'bad', tokens: Int32Array.of(1, 63) }));
    await harness.drain();
    expect(bad.failure?.code).toBe('ENGINE_FAILED');
    expect(bad.failure?.message).not.toContain('planted');
    expect(idsOf(goodHeard)).toEqual(idle(good).tokens);
    expectClean(harness);
  });

  it('cancels while waiting, loading, prefilling and decoding; everything is given back', async () => {
    const harness = new LoopHarness({ cells: 20 * 16, pages: 6 });
    const adapter = useOf(fakeGeneration(3), 8);
    for (const ticks of [0, 1, 2, 3, 4, 6, 9]) {
      const request = makeRequest({
        id: `r${ticks}`,
        tokens: range(130, ticks),
        tokensMax: 100,
        adapter,
      });
      const heard = harness.submit(request);
      const waiting = harness.submit(
        makeRequest({ id: `w${ticks}`, tokens: range(130), tokensMax: 100 }),
      );
      await harness.ticks(ticks);
      const steps = harness.stepper.steps;
      const events = heard.events.length;
      harness.loop.cancel(request.id);
      harness.loop.cancel(`w${ticks}`);
      expectClean(harness); // at once: not after another step
      await harness.ticks(5);
      expect(harness.stepper.steps).toBe(steps);
      expect(heard.events).toHaveLength(events);
      expect(waiting.events.some((event) => event.kind === 'end')).toBe(false);
      harness.loop.unload(fakeGeneration(3));
      await harness.ticks(2);
      expect(harness.residency.list()).toEqual([]);
    }
    const after = makeRequest({ id: 'after', tokens: range(200), tokensMax: 90, adapter });
    const heard = harness.submit(after);
    await harness.drain();
    expect(idsOf(heard)).toEqual(idle(after).tokens);
  });

  it('reuses a prefix only of the same generation, rank and tenant', async () => {
    const harness = new LoopHarness();
    const ask = async (id: string, over: Partial<GenerateRequest>): Promise<number> => {
      const request = makeRequest({ id, tokens: range(50), tokensMax: 6, ...over });
      const heard = harness.submit(request);
      await harness.drain();
      expect(idsOf(heard), id).toEqual(idle(request).tokens);
      const start = heard.events[0];
      return start?.kind === 'start' ? start.cachedTokens : -1;
    };
    const generation = fakeGeneration(3);
    expect(await ask('cold', {})).toBe(0);
    expect(await ask('again', {})).toBe(48);
    expect(await ask('rank 0 is the base', { adapter: useOf(generation, 0) })).toBe(48);
    expect(await ask('other tenant', { tenant: 'other' })).toBe(0);
    expect(await ask('adapter', { adapter: useOf(generation, 4) })).toBe(0);
    expect(await ask('adapter again', { adapter: useOf(generation, 4) })).toBe(48);
    expect(await ask('other rank', { adapter: useOf(generation, 5) })).toBe(0);
    expect(await ask('other generation', { adapter: useOf(fakeGeneration(4), 4) })).toBe(0);
    expect(await ask('longer', { tokens: range(80) })).toBe(48);
    expect(await ask('whole blocks: the last token is computed', { tokens: range(48) })).toBe(32);
    expect(harness.loop.stats().prefixTokensHit).toBe(48 * 4 + 32);
  });

  it('continues a conversation in place, without a copy', async () => {
    const harness = new LoopHarness();
    const first = makeRequest({ id: 'a', tokens: range(40), tokensMax: 40 });
    const heard = harness.submit(first);
    await harness.drain();
    const tokens = Int32Array.of(...first.tokens, ...idsOf(heard), 5, 6, 7);
    const second = makeRequest({ id: 'b', tokens, tokensMax: 9 });
    const again = harness.submit(second);
    await harness.drain();
    expect(again.events[0]).toMatchObject({ kind: 'start', cachedTokens: 64 });
    expect(harness.stepper.copies).toBe(0);
    expect(idsOf(again)).toEqual(idle(second).tokens);
  });

  it('a corrupt adapter fails its own sequences, nobody else', async () => {
    const bad = fakeGeneration(66);
    const harness = new LoopHarness({
      open: (generation) =>
        generation === bad
          ? Promise.reject(new GatewayError('ADAPTER_CORRUPT', 'hash mismatch'))
          : Promise.resolve(fakePacked(generation, fakeRankOf(generation))),
    });
    const failing = [0, 1, 2].map((i) =>
      harness.submit(makeRequest({ id: `bad${i}`, adapter: useOf(bad, 1) })),
    );
    const good = makeRequest({ id: 'good', adapter: useOf(fakeGeneration(5), 2) });
    const heard = harness.submit(good);
    await harness.drain();
    await harness.ticks(20);
    expect(failing.map((one) => one.failure?.code)).toEqual(new Array(3).fill('ADAPTER_CORRUPT'));
    expect(idsOf(heard)).toEqual(idle(good).tokens);
    expectClean(harness);
  });

  it('reads the next adapter during the step after the one before was written', async () => {
    const openedAtStep: number[] = [];
    const harness = new LoopHarness({
      pages: 40,
      open: (generation) => {
        openedAtStep.push(harness.reports.length);
        return Promise.resolve(fakePacked(generation, fakeRankOf(generation)));
      },
    });
    harness.submit(makeRequest({ id: 'stream', tokensMax: 50 }));
    await harness.ticks(3);
    for (const n of [1, 2, 3, 4]) {
      const adapter = useOf(fakeGeneration(n), 1);
      harness.submit(makeRequest({ id: `load${n}`, tokensMax: 9, adapter }));
    }
    await harness.drain();
    const [first] = openedAtStep as [number];
    expect(openedAtStep).toEqual([first, first + 1, first + 2, first + 3]);
  });

  it('refuses a rank that the adapter does not have, and an adapter larger than the memory', async () => {
    const harness = new LoopHarness({ pages: 4 });
    const generation = fakeGeneration(5); // rank 36: five pages, three there are
    const large = harness.submit(makeRequest({ id: 'large', adapter: useOf(generation, 36) }));
    const first = makeRequest({ id: 'first', adapter: useOf(generation, 1) });
    const firstHeard = harness.submit(first);
    const small = fakeGeneration(3);
    const rank = fakeRankOf(small);
    const much = harness.submit(makeRequest({ id: 'much', adapter: useOf(small, rank + 1) }));
    await harness.drain();
    expect(large.failure?.code).toBe('UNSUPPORTED');
    expect(idsOf(firstHeard)).toEqual(idle(first).tokens); // its first page has room
    expect(much.failure?.code).toBe('INVALID_REQUEST');
    expectClean(harness);
  });

  it('more adapters than pages: sequences wait their turn for pages and none starves', async () => {
    const harness = new LoopHarness({ pages: 6 });
    const requests = Array.from({ length: 24 }, (_, i) => {
      const generation = fakeGeneration(i % 12);
      return makeRequest({
        id: `r${i}`,
        tokens: range(20, i),
        tokensMax: 10,
        tenant: `t${i % 3}`,
        adapter: useOf(generation, fakeRankOf(generation)),
      });
    });
    const heard = requests.map((request) => harness.submit(request));
    await harness.drain();
    for (const [i, request] of requests.entries()) {
      expect(idsOf(heard[i]!), request.id).toEqual(idle(request).tokens);
    }
    expectClean(harness);
  });

  it('a sequence too large for the room left is not overtaken for ever', async () => {
    const harness = new LoopHarness({ cells: 17 * 16, limits: { prefillTokensMax: 200 } });
    let submitted = 0;
    let bigStart = -1;
    const small = (): void => {
      submitted += 1;
      harness.submit(
        makeRequest({ id: `s${submitted}`, tokens: range(20, submitted), tokensMax: 13 }),
      );
    };
    harness.onMessage = (message) => {
      if (message.kind !== 'events') return;
      for (const { id, event } of message.batch) {
        if (id === 'big' && event.kind === 'start') bigStart = submitted;
        if (event.kind === 'end' && submitted < 400) small(); // one ends, another comes
      }
    };
    for (let i = 0; i < 8; i++) small();
    await harness.ticks(3);
    // Another tenant, so that the fair order does not decide it.
    harness.submit(makeRequest({ id: 'big', tenant: 'big', tokens: range(240), tokensMax: 10 }));
    await harness.drain();
    expect(bigStart).toBeGreaterThan(8);
    expect(bigStart).toBeLessThan(60);
    expectClean(harness);
  });

  it('one tenant cannot fill the cache of idle cells', async () => {
    const harness = new LoopHarness({ cells: 41 * 16, tenantShareMax: 0.25 });
    harness.submit(makeRequest({ id: 'mine', tokens: range(40), tokensMax: 1, tenant: 'mine' }));
    await harness.drain();
    for (let i = 0; i < 30; i++) {
      harness.submit(
        makeRequest({ id: `f${i}`, tokens: range(60, i), tokensMax: 1, tenant: 'flood' }),
      );
      await harness.drain();
      expect(harness.cache.cellsIdle('flood')).toBeLessThanOrEqual(10 * 16);
    }
    const again = harness.submit(
      makeRequest({ id: 'again', tokens: range(40), tokensMax: 1, tenant: 'mine' }),
    );
    await harness.drain();
    expect(again.events[0]).toMatchObject({ cachedTokens: 32 });
  });

  it('resumes from tokens already sent: the rest of ids and text is what it would have been', async () => {
    const request = makeRequest({
      id: 'r',
      tokens: range(30),
      tokensMax: 40,
      adapter: useOf(fakeGeneration(2), 3),
      sampling: {
        ...greedy,
        temperature: 0.9,
        seed: 77,
        presencePenalty: 0.4,
        repetitionPenalty: 1.1,
      },
    });
    const whole = new LoopHarness();
    const full = whole.submit(request);
    await whole.drain();
    const pieces = full.events.flatMap((event) => (event.kind === 'piece' ? [event] : []));
    for (const sent of [1, 2, 7, 20, 39]) {
      const harness = new LoopHarness();
      const rest = harness.submit(request, Int32Array.from(idsOf(full).slice(0, sent)));
      await harness.drain();
      expect(idsOf(rest)).toEqual(idsOf(full).slice(sent));
      const shown = pieces
        .slice(0, sent)
        .map((one) => one.text)
        .join('');
      expect(shown + textOf(rest)).toBe(textOf(full));
      expect(rest.events.at(-1)).toMatchObject({ kind: 'end', completionTokens: 40 });
    }
  });

  it('measures with its clock: the wait, the first token, the whole', async () => {
    const harness = new LoopHarness();
    const heard = harness.submit(makeRequest({ id: 'r', tokensMax: 3 }));
    harness.clock.advance(70); // before its first tick
    harness.onMessage = (message) => {
      if (message.kind === 'step') harness.clock.advance(10);
    };
    await harness.drain();
    expect(heard.events[0]).toMatchObject({ queueMs: 70 });
    expect(heard.events.at(-1)).toMatchObject({ ttftMs: 70, totalMs: 90 });
  });

  it('idles without polling and stops for good', async () => {
    const harness = new LoopHarness();
    harness.submit(makeRequest({ id: 'r', tokensMax: 2 }));
    await harness.drain();
    await harness.ticks(2); // the last one finds nothing to do
    const { messages } = harness;
    const count = messages.length;
    await harness.ticks(50);
    expect(messages).toHaveLength(count);
    harness.submit(makeRequest({ id: 's', tokensMax: 2000 }));
    await nextTick();
    harness.loop.stop();
    const { steps } = harness.stepper;
    await harness.ticks(20);
    expect(harness.stepper.steps).toBe(steps);
  });

  it('needs a pool', () => {
    expect(() => new KvPool(0)).toThrow(GatewayError);
  });
});
