import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import type { HotAdapter } from '../../src/engine/messages.ts';
import { intervalMs, startPrewarming } from '../../src/prewarm.ts';
import { type FlyingSequence, InFlight } from '../../src/server/in-flight.ts';
import { FakeRegistry, fakeGeneration, fakeManifest } from '../support/fake-registry.ts';
import { createManualClock, type ManualClock } from '../support/manual-clock.ts';
import { echoScript, ScriptedEngine } from '../support/scripted-engine.ts';

let clock: ManualClock;
let registry: FakeRegistry;
let inFlight: InFlight;
let lists: HotAdapter[][];
let pages: number;
let stop: () => void;

function add(name: string, digits: string, manifest = fakeManifest(16)): void {
  registry.store(fakeGeneration(digits), manifest, 1);
  registry.create(name, fakeGeneration(digits));
}

beforeEach(() => {
  clock = createManualClock();
  registry = new FakeRegistry();
  inFlight = new InFlight();
  lists = [];
  pages = 8;
  const engine = new ScriptedEngine(echoScript);
  add('often', 'a1');
  add('rare', 'b2');
  stop = startPrewarming({
    engine: {
      stats: () => ({ ...engine.stats(), adapterSlotsMax: pages }),
      prewarm: (hot) => void lists.push([...hot]),
    },
    registry,
    inFlight,
    clock,
  });
});
afterEach(() => stop());

function ask(id: string, rank: number, times = 1): void {
  const sequence: FlyingSequence = {
    promptTokens: 1,
    ranks: rank,
    generations: [],
    adapters: [{ id, rank }],
    completionTokens: 0,
    tenant: 't',
    isStarted: false,
  };
  for (let i = 0; i < times; i++) inFlight.add({ ...sequence });
}

const listAfter = (): HotAdapter[] => {
  clock.advance(intervalMs);
  return lists.at(-1)!;
};

describe('startPrewarming', () => {
  it('tells the engine each interval what is hot, the hottest first, at the largest rank that was asked for', () => {
    ask('rare', 16);
    ask('often', 4, 5);
    ask('often', 8);
    expect(listAfter()).toEqual([
      { generation: fakeGeneration('a1'), rank: 8, pages: 1 },
      { generation: fakeGeneration('b2'), rank: 16, pages: 2 },
    ]);
    expect(listAfter()).toHaveLength(2);
    expect(lists).toHaveLength(2);
  });

  it('names no more than fits', () => {
    pages = 2;
    add('small', 'c3', fakeManifest(8));
    ask('often', 8, 9);
    ask('rare', 16, 5);
    ask('small', 8, 2);
    expect(listAfter().map(({ generation }) => generation)).toEqual([
      fakeGeneration('a1'),
      fakeGeneration('c3'),
    ]);
  });

  it('leaves out what has gone, what is the base’s answer and what would change the bank', () => {
    add('routed', 'd4', { ...fakeManifest(8), kind: 'queryable' });
    ask('gone', 8, 3);
    ask('routed', 8, 3);
    ask('rare', 0, 3);
    expect(listAfter()).toEqual([]);
  });

  it('follows a name to its next generation', () => {
    ask('often', 8, 3);
    listAfter();
    registry.store(fakeGeneration('e5'), fakeManifest(8), 1);
    registry.swap('often', fakeGeneration('e5'), null);
    expect(listAfter()[0]!.generation).toBe(fakeGeneration('e5'));
  });

  it('ends', () => {
    stop();
    ask('often', 8);
    clock.advance(10 * intervalMs);
    expect(lists).toEqual([]);
    expect(clock.pending()).toBe(0);
  });
});
