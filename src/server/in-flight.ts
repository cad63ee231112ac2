// Every sequence that this process has given to the engine and that has not ended: what the router is told about load.
// Counted here, where plans are made, so that a decision sees the requests that were admitted a microsecond before it.

import type { Generation } from '../adapters/adapter.ts';
import type { RouteInput } from '../router/policy.ts';

export interface FlyingSequence {
  readonly promptTokens: number;
  /** Active ranks of all its adapters. */
  readonly ranks: number;
  readonly generations: readonly Generation[];
  isStarted: boolean;
}

export class InFlight {
  readonly #sequences = new Set<FlyingSequence>();

  add(sequence: FlyingSequence): void {
    this.#sequences.add(sequence);
  }

  remove(sequence: FlyingSequence): void {
    this.#sequences.delete(sequence);
  }

  get count(): number {
    return this.#sequences.size;
  }

  /** `siblings` are sequences of the same request: they will wait and prefill beside the one that is planned. */
  load(
    kvCells: number,
    siblings: { readonly count: number; readonly promptTokens: number },
  ): RouteInput['load'] {
    let [decodeRows, decodeRanks, waiting, waitingPromptTokens] = [0, 0, 0, 0];
    for (const sequence of this.#sequences) {
      if (sequence.isStarted) {
        decodeRows += 1;
        decodeRanks += sequence.ranks;
      } else {
        waiting += 1;
        waitingPromptTokens += sequence.promptTokens;
      }
    }
    return {
      decodeRows,
      decodeRanks,
      waiting: waiting + siblings.count,
      waitingPromptTokens: waitingPromptTokens + siblings.promptTokens,
      kvCells,
    };
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
