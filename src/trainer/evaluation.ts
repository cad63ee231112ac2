// Mean loss of held-out answers at each rank as it will be served: from the packed file's own numbers, at the ranks that the
// level has in each module; where tokens choose their ranks, at so many of their choice.

import { type Aurac, aurac } from '../adapters/aurac.ts';
import type { PackedAdapter } from '../adapters/pack.ts';
import type { RankLoss } from '../jobs/messages.ts';
import type { Recipe } from '../jobs/recipe.ts';
import { f16BitsToF32, f32ToF16Bits } from '../kernels/half.ts';
import { LossDecoder, type LossOptions } from '../model/loss-graph.ts';
import {
  deltaOf,
  lowRank,
  noDelta,
  type TrainedDelta,
  tensorName,
} from '../model/trained-delta.ts';
import type { FamilyTraining } from './family-training.ts';
import type { Layout } from './packing.ts';
import { pairRank, servedFactors } from './publish.ts';
import type { Breathe } from './session.ts';

/** Batches' weights add up to 1. */
export class ServedLoss implements Disposable {
  readonly #decoder: LossDecoder;
  readonly #ranks: readonly number[];
  readonly #training: FamilyTraining;
  /** Of the published pair of each module; none where tokens choose. */
  readonly #pairs: readonly { readonly site: ModuleSite; readonly rank: number }[];
  /** By active ranks, where those are fewer than were trained with. */
  readonly #active: Map<number, TrainedDelta> = new Map();

  constructor(over: Omit<LossOptions, 'delta'>, recipe: Recipe, training: FamilyTraining) {
    this.#ranks = recipe.ranks;
    this.#training = training;
    const isRouted = training.family.route !== null;
    this.#pairs = isRouted
      ? []
      : training.modules().map(({ site, tensors }) => ({ site, rank: pairRank(recipe, tensors) }));
    const pairs = deltaOf(
      this.#pairs.map(({ site, rank }) => [site, lowRank({ in: site.in, out: site.out, rank })]),
    );
    this.#decoder = new LossDecoder({ ...over, delta: isRouted ? training.delta : pairs });
    if (training.family.slicing !== 'active') return;
    const { topK } = recipe; // no more of them are served
    for (const k of recipe.ranks) {
      if (k < topK) this.#active.set(k, training.withActive(k)!);
    }
  }

  /** Of the base alone. */
  async ofBase(batches: readonly Layout[], breathe: Breathe): Promise<number> {
    return this.#lossOf(batches, breathe, noDelta);
  }

  /** `packed`: null for what is not published as one file. */
  async byRank(
    packed: PackedAdapter | null,
    batches: readonly Layout[],
    breathe: Breathe,
  ): Promise<RankLoss[]> {
    if (this.#pairs.length === 0) this.#writeActive();
    const losses: RankLoss[] = [];
    for (const rank of this.#levels(packed)) {
      for (const { site, rank: ranks } of this.#pairs) {
        const { a, b } = servedFactors(packed!, site, { level: rank, ranks });
        this.#decoder.write(tensorName(site, 'a'), a);
        this.#decoder.write(tensorName(site, 'b'), b);
      }
      const loss = await this.#lossOf(batches, breathe, this.#active.get(rank));
      losses.push({ rank, loss });
    }
    return losses;
  }

  /** The recipe's ranks, and all of an adapter that has more. */
  #levels(packed: PackedAdapter | null): readonly number[] {
    const [most, all] = [this.#ranks.at(-1)!, packed?.manifest.rankMax ?? 0];
    return this.#pairs.length > 0 && all > most ? [...this.#ranks, all] : this.#ranks;
  }

  /** A and B as the packed file rounds them. */
  #writeActive(): void {
    const { parameters, constants } = this.#training;
    const all = new Map([
      ...constants,
      ...parameters.map(({ name, values }) => [name, values] as const),
    ]);
    for (const [name, values] of all) {
      this.#decoder.write(name, /\.[ab]$/.test(name) ? asHalves(values) : values);
    }
  }

  async #lossOf(
    batches: readonly Layout[],
    breathe: Breathe,
    delta: TrainedDelta | undefined,
  ): Promise<number> {
    const width = Math.max(1, ...this.#pairs.map(({ rank }) => rank));
    let sum = 0;
    for (const batch of batches) {
      await breathe();
      const gate = new Float32Array(batch.tokens.length * width).fill(1);
      sum += this.#decoder.evaluate({ ...batch, gate }, delta);
    }
    return sum;
  }

  [Symbol.dispose](): void {
    this.#decoder[Symbol.dispose]();
  }
}

type ModuleSite = Parameters<typeof servedFactors>[1];

function asHalves(values: Float32Array): Float32Array {
  const bits = new Uint16Array(values.length);
  f32ToF16Bits(values, bits);
  const rounded = new Float32Array(values.length);
  f16BitsToF32(bits, rounded);
  return rounded;
}

/** Area under the curve of nats gained over the base, over the ranks (v1) and their logarithms (v2): more is better. */
export function gainAurac(base: number, losses: readonly RankLoss[]): Aurac {
  return aurac(
    losses.map(({ rank }) => rank),
    losses.map(({ loss }) => base - loss),
  );
}
