// How far off the predictions of whole answers were, over the last so many of them: of all, and of each adapter of late.

import { LRUCache } from 'lru-cache';

const windowOfAll = 512;
const windowOfOne = 128;
const adaptersMax = 128; // 128 KB of windows

/** The last values, in no order. */
class Window {
  readonly #values: Float64Array;
  #added = 0;

  constructor(size: number) {
    this.#values = new Float64Array(size);
  }

  add(value: number): void {
    this.#values[this.#added % this.#values.length] = value;
    this.#added += 1;
  }

  /** The smallest value that at least a share `q` of them does not exceed; null: there is none. */
  quantile(q: number): number | null {
    const sorted = this.#values.slice(0, Math.min(this.#added, this.#values.length)).sort();
    return sorted[Math.max(0, Math.ceil(q * sorted.length) - 1)] ?? null;
  }
}

export interface ErrorQuantile {
  readonly quantile: 0.5 | 0.9;
  readonly error: number;
}

export class PredictionErrors {
  readonly #all: Window = new Window(windowOfAll);
  readonly #byAdapter: LRUCache<string, Window> = new LRUCache({ max: adaptersMax });

  /** As a share of what was predicted. `adapter` null: the base model. */
  add(adapter: string | null, predictedMs: number, actualMs: number): void {
    const error = Math.abs(actualMs / predictedMs - 1);
    if (!Number.isFinite(error)) return;
    this.#all.add(error);
    if (adapter === null) return;
    const window = this.#byAdapter.get(adapter) ?? new Window(windowOfOne);
    window.add(error);
    this.#byAdapter.set(adapter, window);
  }

  ofAll(): ErrorQuantile[] {
    return quantilesOf(this.#all);
  }

  ofEach(): Array<readonly [adapter: string, quantiles: ErrorQuantile[]]> {
    return [...this.#byAdapter.entries()].map(([name, window]) => [name, quantilesOf(window)]);
  }
}

function quantilesOf(window: Window): ErrorQuantile[] {
  return ([0.5, 0.9] as const).flatMap((quantile) => {
    const error = window.quantile(quantile);
    return error === null ? [] : [{ quantile, error }];
  });
}
