import { describe, expect, it } from 'vitest';
import { createRandom } from '../../../src/adapters/families/seeded-random.ts';
import { chooseRate, firstRoundSteps, sweepRates } from '../../../src/trainer/sweep.ts';

/** Gradient descent from 1 in 20 directions of curvature 0.1 … 1 times the largest, with noise: the loss after so many steps. */
function descend(rate: number, steps: number, largest: number, seed: bigint): number {
  const random = createRandom(seed);
  let loss = 0;
  for (let direction = 0; direction < 20; direction++) {
    const curvature = largest * 10 ** -random.uniform();
    let x = 1;
    for (let i = 0; i < steps; i++) x -= rate * (curvature * x + random.normal());
    loss += (curvature * x * x) / 2;
  }
  return loss;
}

describe('the choice of a learning rate', () => {
  it('is the best rate or its neighbour on a quadratic, in 20 of 20 seeds', async () => {
    for (let seed = 0n; seed < 20n; seed++) {
      const largest = [3, 30, 300][Number(seed % 3n)]!;
      const steps = 20;
      const losses = sweepRates.map((rate) => descend(rate, 4 * steps, largest, seed));
      const best = losses.indexOf(Math.min(...losses.filter(Number.isFinite)));
      const { rate } = await chooseRate(sweepRates, steps, async (tried, taken) =>
        descend(tried, taken, largest, seed),
      );
      const away = Math.abs(sweepRates.indexOf(rate) - best);
      expect(away, `seed ${seed}`).toBeLessThanOrEqual(1);
    }
  });

  it('halves the rates and doubles the steps, each trial from the start', async () => {
    const { rate, trials } = await chooseRate(sweepRates, 10, async (tried) =>
      Math.abs(tried - 2e-3),
    );
    expect(rate).toBe(1e-3);
    const rounds = trials.map(({ rate: tried, steps }) => [steps, tried]);
    expect(rounds).toEqual([
      ...sweepRates.map((tried) => [10, tried]),
      ...[1e-3, 3e-3, 3e-4].map((tried) => [20, tried]),
      ...[1e-3, 3e-3].map((tried) => [40, tried]),
    ]);
    const spent = trials.reduce((sum, { steps }) => sum + steps, 0);
    expect(spent / 10).toBe(20);
    expect(firstRoundSteps(400)).toBe(20); // 20 × 20: as long as the run
    expect(firstRoundSteps(10)).toBe(4);
  });

  it('passes over rates that diverge, and says so when all do', async () => {
    const { rate } = await chooseRate(sweepRates, 4, async (tried) =>
      tried > 2e-4 ? Number.NaN : 1,
    );
    expect(rate).toBe(1e-4);
    await expect(chooseRate(sweepRates, 4, async () => Infinity)).rejects.toMatchObject({
      code: 'INVALID_REQUEST',
      param: 'learningRate',
    });
  });
});
