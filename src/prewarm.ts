// Loads adapters before they are asked for: counts what is asked, forecasts the next interval, and tells the engine which
// adapters are the hottest. The engine loads those of them that it has not, where that takes no memory from what is in use
// or hotter (engine/adapter-loading.ts).

import { LRUCache } from 'lru-cache';
import { pageRanks } from './adapters/adapter.ts';
import type { Registry } from './adapters/registry.ts';
import type { EngineClock } from './engine/clock.ts';
import type { Engine } from './engine/engine.ts';
import type { HotAdapter } from './engine/messages.ts';
import { AdapterForecast } from './router/prefetch.ts';
import type { InFlight } from './server/in-flight.ts';

export interface PrewarmOptions {
  readonly engine: Pick<Engine, 'stats' | 'prewarm'>;
  readonly registry: Pick<Registry, 'find'>;
  readonly inFlight: Pick<InFlight, 'onAdd'>;
  readonly clock: EngineClock;
}

/** Guess: several times a load (a tenth of a second), and short beside how long a group of adapters stays busy. */
export const intervalMs = 10_000;
/** Requests in an interval below which an adapter is not worth a load. Guess. */
const rateMin = 0.01;
const ranksMax = 4096;

/** Returns the function that stops it. */
export function startPrewarming({ engine, registry, inFlight, clock }: PrewarmOptions): () => void {
  const forecast = new AdapterForecast();
  /** The largest that was asked for lately. */
  const ranks = new LRUCache<string, number>({ max: ranksMax });
  let counts = new Map<string, number>();
  const stopCounting = inFlight.onAdd(({ adapters }) => {
    for (const { id, rank } of adapters) {
      if (rank === 0) continue;
      counts.set(id, (counts.get(id) ?? 0) + 1);
      ranks.set(id, Math.max(rank, ranks.get(id) ?? 0));
    }
  });
  /** The hottest that fit in the engine's memory together. */
  const hottest = (): HotAdapter[] => {
    let room = engine.stats().adapterSlotsMax;
    return forecast.hottest().flatMap(({ name, rate }): HotAdapter[] => {
      const record = rate < rateMin ? null : registry.find(name);
      // A queryable adapter brings a bank, which may put others out.
      if (record === null || record.manifest.kind === 'queryable') return [];
      const { generation, manifest } = record;
      const rank = Math.min(ranks.get(name) ?? manifest.rankMax, manifest.rankMax);
      const pages = Math.ceil(rank / pageRanks);
      if (pages > room) return [];
      room -= pages;
      return [{ generation, rank, pages }];
    });
  };
  const tick = (): void => {
    forecast.observe(counts);
    counts = new Map();
    engine.prewarm(hottest());
    cancel = clock.after(intervalMs, tick);
  };
  let cancel = clock.after(intervalMs, tick);
  return () => {
    cancel();
    stopCounting();
  };
}
