import { describe, expect, it } from 'vitest';
import { type EngineEvent, type GenerateRequest, noUrgency } from '../../../src/engine/messages.ts';
import { GatewayError } from '../../../src/errors.ts';
import { useOf } from '../../support/adapter-use.ts';
import { FakeEngine, fakeAnswerText } from '../../support/fake-engine.ts';

const generation = `sha256:${'a'.repeat(64)}` as const;

function request(over: Partial<GenerateRequest> = {}): GenerateRequest {
  return {
    id: 'r',
    tokens: Int32Array.of(5, 6, 7),
    tokensMax: 12,
    sampling: {
      temperature: 0,
      topP: 1,
      topK: 0,
      minP: 0,
      seed: 1,
      presencePenalty: 0,
      frequencyPenalty: 0,
      repetitionPenalty: 1,
      logitBias: [],
    },
    stop: [],
    topLogprobs: null,
    adapter: null,
    tenant: 't',
    urgency: noUrgency,
    ...over,
  };
}

async function answer(engine: FakeEngine, ask: GenerateRequest): Promise<EngineEvent[]> {
  const events: EngineEvent[] = [];
  for await (const event of engine.submit(ask, new AbortController().signal)) events.push(event);
  return events;
}

function textOf(events: readonly EngineEvent[]): string {
  return events.map((event) => (event.kind === 'piece' ? event.text : '')).join('');
}

describe('FakeEngine (the double that HTTP tests stand on)', () => {
  it('answers by tokens, adapter generation and rank only', async () => {
    const engine = new FakeEngine();
    const asks = [
      request(),
      request({ tokens: Int32Array.of(5, 6, 8) }),
      request({ adapter: useOf(generation, 4) }),
      request({ adapter: useOf(generation, 8) }),
    ];
    const texts: string[] = [];
    for (const ask of asks) texts.push(textOf(await answer(engine, ask)));
    expect(new Set(texts).size).toBe(4);
    expect(texts).toEqual(asks.map((ask) => fakeAnswerText(ask, 12)));
    const zero = await answer(engine, request({ adapter: useOf(generation, 0) }));
    expect(textOf(zero)).toBe(texts[0]);
  });

  it('never leaks a prefix of the stop string that ends it', async () => {
    const engine = new FakeEngine();
    const whole = fakeAnswerText(request(), 12);
    const stop = whole.slice(11, 19);
    const events = await answer(engine, request({ stop: [stop] }));
    expect(textOf(events)).toBe(whole.slice(0, whole.indexOf(stop)));
    expect(events.at(-1)).toMatchObject({ kind: 'end', reason: 'stop', stopString: stop });
  });

  it('takes time by the clock, fails and aborts on demand', async () => {
    const engine = new FakeEngine({ stepMs: 10, queueMs: 30 });
    const events = answer(engine, request({ tokensMax: 2 }));
    engine.clock.advance(29);
    expect(engine.stats().running).toBe(0);
    engine.clock.advance(11);
    expect((await events).at(-1)).toMatchObject({ reason: 'length', ttftMs: 30, totalMs: 40 });
    engine.failNext(new GatewayError('ENGINE_FAILED', 'planted'), 1);
    const failing = answer(engine, request());
    engine.clock.advance(100);
    await expect(failing).rejects.toMatchObject({ code: 'ENGINE_FAILED' });
    const controller = new AbortController();
    const stream = engine.submit(request(), controller.signal);
    controller.abort();
    await expect(stream[Symbol.asyncIterator]().next()).rejects.toMatchObject({
      code: 'CANCELLED',
    });
    expect(engine.active()).toBe(0);
    expect(engine.cancelled).toEqual(['r']);
  });
});
