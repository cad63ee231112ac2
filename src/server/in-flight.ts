// Every sequence that this process has given to the engine and that has not ended: what the router is told about load.
// Counted here, where plans are made, so that a decision sees the requests that were admitted a microsecond before it.

import type { Generation } from '../adapters/adapter.ts';
import type { RouteInput } from '../router/policy.ts';

export interface FlyingSequence {
  readonly tenant: string;
  readonly promptTokens: number;
  /** Active ranks of all its adapters. */
  readonly ranks: number;
  readonly generations: readonly Generation[];
  /** Those that the engine loads as they are: none of what is merged first. */
  readonly adapters: ReadonlyArray<{ readonly id: string; readonly rank: number }>;
  /** So far. */
  completionTokens: number;
  isStarted: boolean;
}

interface Siblings {
  readonly count: number;
  readonly promptTokens: number;
}

export class InFlight {
  readonly #sequences = new Set<FlyingSequence>();
  readonly #listeners = new Set<(sequence: FlyingSequence) => void>();

  add(sequence: FlyingSequence): void {
    this.#sequences.add(sequence);
    for (const listener of this.#listeners) listener(sequence);
  }

  /** Returns the function that stops it. */
  onAdd(listener: (sequence: FlyingSequence) => void): () => void {
    this.#listeners.add(listener);
    return () => void this.#listeners.delete(listener);
  }

  remove(sequence: FlyingSequence): void {
    this.#sequences.delete(sequence);
  }

  get count(): number {
    return this.#sequences.size;
  }

  /** Those that have no room in the engine yet: all, those of `tenant`, and those of whoever has most. */
  queued(tenant: string): { readonly count: number; readonly own: number; readonly most: number } {
    const counts = new Map<string, number>();
    let count = 0;
    for (const one of this.#sequences) {
      if (one.isStarted) continue;
      count += 1;
      counts.set(one.tenant, (counts.get(one.tenant) ?? 0) + 1);
    }
    return { count, own: counts.get(tenant) ?? 0, most: Math.max(0, ...counts.values()) };
  }

  /** A sequence waits until its first token: one with room may have its prompt before it. `siblings` are sequences of the
   *  same request: they will wait and prefill beside the one that is planned. */
  load({ count, promptTokens }: Siblings = { count: 0, promptTokens: 0 }): RouteInput['load'] {
    const load = {
      decodeRows: 0,
      decodeRanks: 0,
      waiting: count,
      waitingPromptTokens: promptTokens,
      kvCells: 0,
    };
    for (const sequence of this.#sequences) {
      if (sequence.completionTokens > 0) {
        load.decodeRows += 1;
        load.decodeRanks += sequence.ranks;
        load.kvCells += sequence.promptTokens + sequence.completionTokens;
      } else {
        load.waiting += 1;
        load.waitingPromptTokens += sequence.promptTokens;
      }
    }
    return load;
  }

  /** Generations that sequences wait for. */
  waitingGenerations(): ReadonlySet<Generation> {
    const generations = new Set<Generation>();
    for (const sequence of this.#sequences) {
      if (sequence.isStarted) continue;
      for (const generation of sequence.generations) generations.add(generation);
    }
    return generations;
  }
}
