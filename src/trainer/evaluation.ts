// Mean loss of held-out answers at each rank as it will be served: from the packed file's own numbers, at the ranks that the
// level has in each module.

import { type Aurac, aurac } from '../adapters/aurac.ts';
import type { PackedAdapter } from '../adapters/pack.ts';
import type { RankLoss } from '../jobs/messages.ts';
import type { TrainingDecoder } from '../model/training-decoder.ts';
import type { Layout } from './packing.ts';
import { type ModuleFactors, servedFactors } from './publish.ts';

export interface Evaluation {
  readonly decoder: TrainingDecoder;
  readonly rank: number; // R
  /** Every module that has factors. */
  readonly modules: readonly ModuleFactors[];
  /** Puts a module's factors where the decoder reads them. */
  readonly upload: (module: ModuleFactors) => void;
  /** Whose weights add up to 1. */
  readonly batches: readonly Layout[];
  /** Between two pieces of computing. */
  readonly breathe: () => Promise<void>;
}

/** Of the base alone. */
export async function baseLoss(evaluation: Evaluation): Promise<number> {
  return lossOf(evaluation, 0);
}

/** Writes over what the decoder reads. */
export async function lossesByRank(
  evaluation: Evaluation,
  packed: PackedAdapter,
  ranks: readonly number[],
): Promise<RankLoss[]> {
  const losses: RankLoss[] = [];
  for (const rank of ranks) {
    for (const { site } of evaluation.modules) {
      evaluation.upload({
        site,
        ...servedFactors(packed, site, { level: rank, ranks: evaluation.rank }),
      });
    }
    losses.push({ rank, loss: await lossOf(evaluation, 1) });
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
  gate: number,
): Promise<number> {
  let sum = 0;
  for (const batch of batches) {
    await breathe();
    sum += decoder.evaluate({
      ...batch,
      gate: new Float32Array(batch.tokens.length * rank).fill(gate),
    });
  }
  return sum;
}
