import { expect, it } from 'vitest';
import { type FlyingSequence, InFlight } from '../../../src/server/in-flight.ts';

const none = { decodeRows: 0, decodeRanks: 0, waiting: 0, waitingPromptTokens: 0, kvCells: 0 };

it('load is what decodes, what still has its prompt to compute, and the siblings', () => {
  const inFlight = new InFlight();
  expect(inFlight.load()).toEqual(none);
  const sequence = (promptTokens: number, ranks: number): FlyingSequence => ({
    ...{ promptTokens, ranks, generations: [], adapters: [] },
    ...{ tenant: 't', completionTokens: 0, isStarted: false },
  });
  const [one, other] = [sequence(10, 4), sequence(200, 16)];
  inFlight.add(one);
  inFlight.add(other);
  expect(inFlight.load()).toEqual({ ...none, waiting: 2, waitingPromptTokens: 210 });
  expect(inFlight.queued('t')).toEqual({ count: 2, own: 2, most: 2 });
  expect(inFlight.queued('other')).toEqual({ count: 2, own: 0, most: 2 });
  one.isStarted = true;
  other.isStarted = true;
  one.completionTokens = 3;
  const siblings = { count: 1, promptTokens: 7 };
  expect(inFlight.load(siblings)).toEqual({
    ...{ decodeRows: 1, decodeRanks: 4, kvCells: 13, waiting: 2, waitingPromptTokens: 207 },
  });
  expect(inFlight.queued('t')).toEqual({ count: 0, own: 0, most: 0 });
  inFlight.remove(one);
  inFlight.remove(other);
  expect(inFlight.load()).toEqual(none);
});
