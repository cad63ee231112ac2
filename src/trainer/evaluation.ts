// Mean loss of held-out answers at each rank as it will be served: from the packed file's own numbers, at the ranks that the
// level has in each module.

import { type Aurac, aurac } from '../adapters/aurac.ts';
import type { PackedAdapter } from '../adapters/pack.ts';
import type { RankLoss } from '../jobs/messages.ts';
import type { LossDecoder } from '../model/loss-graph.ts';
import { noDelta, type TrainedDelta, tensorName } from '../model/trained-delta.ts';
import type { Layout } from './packing.ts';
import { type ModuleFactors, servedFactors } from './publish.ts';

export interface Evaluation {
  /** Of low-rank pairs with `rank` ranks in every module. */
  readonly decoder: LossDecoder;
  readonly rank: number; // R
  /** Every module that has factors. */
  readonly modules: readonly ModuleFactors[];
  /** Whose weights add up to 1. */
  readonly batches: readonly Layout[];
  /** Between two pieces of computing. */
  readonly breathe: () => Promise<void>;
}

/** Of the base alone. */
export async function baseLoss(evaluation: Evaluation): Promise<number> {
  return lossOf(evaluation, noDelta);
}

export async function lossesByRank(
  evaluation: Evaluation,
  packed: PackedAdapter,
  ranks: readonly number[],
): Promise<RankLoss[]> {
  const losses: RankLoss[] = [];
  for (const rank of ranks) {
    for (const { site } of evaluation.modules) {
      const { a, b } = servedFactors(packed, site, { level: rank, ranks: evaluation.rank });
      evaluation.decoder.write(tensorName(site, 'a'), a);
      evaluation.decoder.write(tensorName(site, 'b'), b);
    }
    losses.push({ rank, loss: await lossOf(evaluation) });
  }
  return losses;
}

/** Area under the curve of nats gained over the base, over the ranks (v1) and their logarithms (v2): more is better. */
export function gainAurac(base: number, losses: readonly RankLoss[]): Aurac {
  return aurac(
    losses.map(({ rank }) => rank),
    losses.map(({ loss }) => base - loss),
  );
}

async function lossOf(
  { decoder, rank, batches, breathe }: Evaluation,
  delta?: TrainedDelta,
): Promise<number> {
  let sum = 0;
  for (const batch of batches) {
    await breathe();
    const gate = new Float32Array(batch.tokens.length * rank).fill(1);
    sum += decoder.evaluate({ ...batch, gate }, delta);
  }
  return sum;
}
