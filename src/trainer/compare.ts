// Two generations or three on the same examples, one example at a time: what the gate of a refresh judges by. Losses are means
// over an example's learnt tokens, as served, at each rank; and of texts that the adapter is not about, at the largest.

import type { PackedAdapter } from '../adapters/pack.ts';
import type { Comparison, Losses } from '../jobs/refresh-gate.ts';
import { projectionShape, projections } from '../model/decoder-config.ts';
import { LossDecoder } from '../model/loss-graph.ts';
import { lowRankDelta, tensorName } from '../model/trained-delta.ts';
import type { Example } from './examples.ts';
import { answersIn, type Layout, layOut, rowsOf } from './packing.ts';
import { servedFactors } from './publish.ts';
import type { Breathe, TrainingBase } from './session.ts';

export interface Compared {
  readonly before: PackedAdapter;
  readonly after: PackedAdapter;
  readonly earlier: PackedAdapter | null;
}

export interface CompareOptions {
  readonly base: TrainingBase;
  /** Rising. */
  readonly ranks: readonly number[];
  readonly heldOut: readonly Example[];
  readonly guard: readonly Example[];
  readonly breathe: Breathe;
}

/** Of adapters that are pairs. */
export async function compareAdapters(
  { before, after, earlier }: Compared,
  options: CompareOptions,
): Promise<Comparison> {
  const { ranks } = options;
  const most = Math.max(...ranks);
  using alone = new LossesAlone(options, most);
  return {
    ranks,
    before: await alone.of(before, ranks),
    after: await alone.of(after, ranks),
    earlier: earlier === null ? null : await alone.heldOutAt(earlier, most),
  };
}

/** A window is one example's. */
export class LossesAlone implements Disposable {
  readonly #options: Omit<CompareOptions, 'ranks'>;
  readonly #rank: number;
  readonly #decoder: LossDecoder;
  readonly #heldOut: readonly Layout[];
  readonly #guard: readonly Layout[];
  readonly #gate: Float32Array;

  /** `rank`: the most that an adapter is asked at. */
  constructor(options: Omit<CompareOptions, 'ranks'>, rank: number) {
    const { base, heldOut, guard } = options;
    this.#options = options;
    this.#rank = rank;
    const all = [...heldOut, ...guard];
    const windowRows = Math.max(1, ...all.map(rowsOf));
    const layOutAlone = (example: Example): Layout => {
      const weight = 1 / answersIn([example], [[0]]);
      return layOut([example], [[0]], { windows: 1, windowRows, weight });
    };
    this.#heldOut = heldOut.map(layOutAlone);
    this.#guard = guard.map(layOutAlone);
    this.#gate = new Float32Array(windowRows * rank).fill(1);
    const answersMax = Math.max(
      1,
      ...[...this.#heldOut, ...this.#guard].map(({ answers }) => answers.length),
    );
    const { config, weights, kernels } = base;
    const delta = lowRankDelta(config, () => rank);
    const sizes = { windows: 1, windowRows, answersMax };
    this.#decoder = new LossDecoder({ config, weights, kernels, delta, ...sizes });
  }

  async of(packed: PackedAdapter, ranks: readonly number[]): Promise<Losses> {
    const byRank: number[][] = [];
    for (const rank of ranks) byRank.push(await this.heldOutAt(packed, rank));
    return { byRank, guard: await this.#losses(this.#guard) };
  }

  /** Of the base alone. */
  async ofBase(): Promise<number[]> {
    return this.#losses(this.#heldOut, new Float32Array(this.#gate.length));
  }

  async heldOutAt(packed: PackedAdapter, rank: number): Promise<number[]> {
    this.#write(packed, rank);
    return this.#losses(this.#heldOut);
  }

  #write(packed: PackedAdapter, level: number): void {
    const { config } = this.#options.base;
    for (let block = 0; block < config.blocks; block++) {
      for (const projection of projections) {
        const site = { block, projection, ...projectionShape(config, projection) };
        const { a, b } = servedFactors(packed, site, { level, ranks: this.#rank });
        this.#decoder.write(tensorName(site, 'a'), a);
        this.#decoder.write(tensorName(site, 'b'), b);
      }
    }
  }

  async #losses(layouts: readonly Layout[], gate = this.#gate): Promise<number[]> {
    const losses: number[] = [];
    for (const layout of layouts) {
      await this.#options.breathe();
      losses.push(this.#decoder.evaluate({ ...layout, gate }));
    }
    return losses;
  }

  [Symbol.dispose](): void {
    this.#decoder[Symbol.dispose]();
  }
}
