// Which learning rate to train with, by successive halving: all of them for a few steps, the better half for twice as many, and
// so on. The rate decides more than the variant of LoRA does (arXiv 2601.22708, algorithms.md section 24).

import { GatewayError } from '../errors.ts';

/** Half decades around what optimisers of Adam's kind take for low-rank factors. */
export const sweepRates: readonly number[] = [1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2];

export interface Trial {
  readonly rate: number;
  readonly steps: number;
  /** Not finite: training diverged. */
  readonly loss: number;
}

/** Steps of the first round, so that all rounds together (6 × 1, 3 × 2 and 2 × 4 of them) take about as long as the run. */
export function firstRoundSteps(runSteps: number): number {
  return Math.max(4, Math.round(runSteps / 20));
}

/** Every trial begins anew. Of equal losses the lower rate goes on. Throws INVALID_REQUEST when all diverge. */
export async function chooseRate(
  rates: readonly number[],
  firstSteps: number,
  lossOf: (rate: number, steps: number) => Promise<number>,
): Promise<{ readonly rate: number; readonly trials: readonly Trial[] }> {
  const trials: Trial[] = [];
  let left = rates;
  for (let steps = firstSteps; left.length > 1; steps *= 2) {
    const round: Trial[] = [];
    for (const rate of left) round.push({ rate, steps, loss: await lossOf(rate, steps) });
    trials.push(...round);
    const finite = round.filter(({ loss }) => Number.isFinite(loss));
    if (finite.length === 0) {
      const message = `training diverged at every learning rate from ${rates[0]} to ${rates.at(-1)}`;
      throw new GatewayError('INVALID_REQUEST', message, { param: 'learningRate' });
    }
    finite.sort((a, b) => a.loss - b.loss || a.rate - b.rate);
    left = finite.slice(0, Math.ceil(left.length / 2)).map(({ rate }) => rate);
  }
  return { rate: left[0]!, trials };
}
