import { describe, expect, it } from 'vitest';
import type { Generation } from '../../../src/adapters/adapter.ts';
import type { HotAdapter } from '../../../src/engine/messages.ts';
import { AdapterForecast } from '../../../src/router/prefetch.ts';
import { useOf } from '../../support/adapter-use.ts';
import { fakeGeneration, fakePacked } from '../../support/fake-stepper.ts';
import { type HarnessOptions, LoopHarness, makeRequest } from '../../support/loop-harness.ts';
import { createRng, type Rng } from '../../support/random.ts';

// Every adapter here has 8 ranks: one page. `pages` of the harness are one more than there are.

const [a, b, c, d, e] = [1, 2, 3, 4, 5].map(fakeGeneration) as [
  ...[Generation, Generation, Generation, Generation, Generation],
];
const hot = (generation: Generation): HotAdapter => ({ generation, rank: 8, pages: 1 });

function open(pages: number, options: HarnessOptions = {}): LoopHarness {
  return new LoopHarness({
    pages: pages + 1,
    open: (key) => Promise.resolve(fakePacked(key, 8)),
    ...options,
  });
}

const resident = ({ residency }: LoopHarness): string[] =>
  residency.list().map(({ generation }) => generation);

let ids = 0;
async function ask(harness: LoopHarness, generation: Generation, tokensMax = 1): Promise<void> {
  ids += 1;
  const adapter = useOf(generation, 8);
  harness.submit(makeRequest({ id: `r${ids}`, adapter, tokensMax }));
  if (tokensMax === 1) await harness.drain();
}

describe('prewarming', () => {
  it('loads what is hot into free pages, the hottest first, while nothing runs', async () => {
    const harness = open(3);
    harness.loop.prewarm([hot(a), hot(b), hot(c), hot(d)]);
    await harness.ticks(60);
    expect(new Set(resident(harness))).toEqual(new Set([a, b, c]));
    expect(harness.residency.list().every(({ uses }) => uses === 0)).toBe(true);
    expect(harness.stepper.steps).toBe(0);
  });

  it('puts out what is colder, and nothing that is hot', async () => {
    const harness = open(3);
    for (const one of [a, b, c]) await ask(harness, one);
    harness.loop.prewarm([hot(d), hot(a), hot(e)]); // b and c are cold; a was used longest ago
    await harness.ticks(60);
    expect(new Set(resident(harness))).toEqual(new Set([a, d, e]));
  });

  it('leaves the hottest to go last when a request needs room', async () => {
    const harness = open(3);
    await ask(harness, b);
    harness.loop.prewarm([hot(a), hot(b), hot(c)]);
    await harness.ticks(60);
    await ask(harness, d);
    expect(new Set(resident(harness))).toEqual(new Set([a, b, d]));
    await ask(harness, e);
    expect(new Set(resident(harness))).toEqual(new Set([a, d, e]));
  });

  it('puts out nothing that is in use or pinned', async () => {
    const harness = open(2);
    await ask(harness, a);
    harness.loop.pin([a]);
    await ask(harness, b, 200);
    await harness.ticks(20);
    harness.loop.prewarm([hot(c), hot(d)]);
    await harness.ticks(60);
    expect(new Set(resident(harness))).toEqual(new Set([a, b]));
    await harness.drain();
  });

  it('gives way to a request that waits for another adapter', async () => {
    let openC = (): void => {};
    const whenAsked = new Promise<void>((resolve) => {
      openC = resolve;
    });
    const harness = open(1, {
      open: async (key) => {
        if (key === c) await whenAsked; // a slow disk
        return fakePacked(key, 8);
      },
    });
    harness.loop.prewarm([hot(c)]);
    await harness.ticks(10);
    await ask(harness, a); // drains although c is still being read
    openC();
    await harness.ticks(20);
    expect(resident(harness)).toEqual([a]);
  });

  it('is not done twice for a request that waits for the same adapter', async () => {
    const opened: string[] = [];
    let go = (): void => {};
    const whenAsked = new Promise<void>((resolve) => {
      go = resolve;
    });
    const harness = open(1, {
      open: async (key) => {
        opened.push(key);
        await whenAsked;
        return fakePacked(key, 8);
      },
    });
    harness.loop.prewarm([hot(a)]);
    await harness.ticks(10);
    harness.submit(makeRequest({ id: 'same', adapter: useOf(a, 8), tokensMax: 2 }));
    await harness.ticks(10);
    go();
    await harness.drain();
    expect(opened).toEqual([a]);
    expect(harness.heard.get('same')!.failure).toBeNull();
    expect(harness.loop.stats()).toMatchObject({ prewarms: 1, prewarmsUsed: 1 });
  });

  it('goes on after one that cannot be read, and tries it once', async () => {
    let tries = 0;
    const harness = open(3, {
      open: async (key) => {
        if (key !== a) return fakePacked(key, 8);
        tries += 1;
        throw new Error('gone');
      },
    });
    harness.loop.prewarm([hot(a), hot(b)]);
    await harness.ticks(60);
    expect(resident(harness)).toEqual([b]);
    expect(tries).toBe(1);
    expect(harness.messages.filter(({ kind }) => kind === 'failed')).toEqual([]);
  });

  it('counts what it loaded, and what of that was used while it was there', async () => {
    const harness = open(2);
    const counts = (): number[] => {
      const { prewarms, prewarmsUsed } = harness.loop.stats();
      return [prewarms, prewarmsUsed];
    };
    await ask(harness, c); // loaded for itself
    harness.loop.prewarm([hot(a), hot(b)]);
    await harness.ticks(60);
    expect(counts()).toEqual([2, 0]);
    await ask(harness, a);
    await ask(harness, a);
    expect(counts()).toEqual([2, 1]);
    harness.loop.prewarm([]);
    for (const one of [c, d]) await ask(harness, one);
    expect(new Set(resident(harness))).toEqual(new Set([c, d]));
    await ask(harness, b); // loaded again, for itself
    expect(counts()).toEqual([2, 1]);
  });

  it('is forgotten with the next list', async () => {
    const harness = open(2);
    harness.loop.prewarm([hot(a), hot(b)]);
    harness.loop.prewarm([hot(c)]);
    await harness.ticks(60);
    expect(resident(harness)).toEqual([c]);
  });
});

// Traffic for 24 adapters on an engine with room for eight of them. A cold start is a request whose adapter is not there
// when it arrives.

const adapterCount = 24;
const room = 8;

function poisson(rate: number, rng: Rng): number {
  let [count, product] = [0, rng.next()];
  for (const limit = Math.exp(-rate); product > limit; product *= rng.next()) count += 1;
  return count;
}

interface Traffic {
  /** Waves; one for each adapter when there are as many. */
  readonly groups: number;
  /** Requests for an adapter in an interval, where its wave is at rest. */
  readonly rate: number;
  readonly intervals: number;
}

/** Requests in order, an interval an entry. */
function makeTraffic({ groups, rate, intervals }: Traffic, seed: number): readonly number[][] {
  const rng = createRng(seed);
  const waves = Array.from({ length: groups }, () => 0);
  return Array.from({ length: intervals }, () => {
    for (let g = 0; g < groups; g++) waves[g] = 0.9 * waves[g]! + 0.6 * rng.normal();
    const asked = Array.from({ length: adapterCount }, (_, i) => {
      const count = poisson(rate * Math.exp(Math.min(3, waves[i % groups]!)), rng);
      return Array.from({ length: count }, () => i);
    }).flat();
    for (let i = asked.length - 1; i > 0; i--) {
      const j = rng.below(i + 1);
      [asked[i], asked[j]] = [asked[j]!, asked[i]!];
    }
    return asked;
  });
}

async function coldStarts(traffic: readonly number[][], isWarming: boolean): Promise<number> {
  const harness = open(room);
  const forecast = new AdapterForecast();
  const generations = Array.from({ length: adapterCount }, (_, i) => fakeGeneration(i + 1));
  let cold = 0;
  for (const asked of traffic) {
    for (const i of asked) {
      if (!resident(harness).includes(generations[i]!)) cold += 1;
      await ask(harness, generations[i]!);
    }
    const counts = new Map<string, number>();
    for (const i of asked) counts.set(generations[i]!, (counts.get(generations[i]!) ?? 0) + 1);
    forecast.observe(counts);
    if (!isWarming) continue;
    const hottest = forecast.hottest().slice(0, room);
    harness.loop.prewarm(hottest.map(({ name }) => hot(name as Generation)));
    await harness.ticks(60);
  }
  return cold;
}

describe('cold starts', () => {
  const busy = { rate: 0.4, intervals: 160 }; // more adapters asked for in an interval than there is room for
  const calm = { rate: 0.1, intervals: 500 };
  it.each([
    ['adapters that move together', { groups: 4, ...calm }, 0.92],
    ['independent adapters', { groups: adapterCount, ...calm }, 0.98],
    ['adapters that move together, and more of them than fit', { groups: 4, ...busy }, 1],
    ['independent adapters, and more of them than fit', { groups: adapterCount, ...busy }, 1],
  ])(
    'are fewer with it, for %s',
    async (_, kind, share) => {
      const traffic = makeTraffic(kind, 5);
      const requests = traffic.reduce((sum, one) => sum + one.length, 0);
      const without = await coldStarts(traffic, false);
      expect(without).toBeGreaterThan(0.1 * requests);
      expect(await coldStarts(traffic, true)).toBeLessThan(share * without);
    },
    60_000,
  );
});
