// What the router says about times, in the simulator. How far off it is goes by who comes later, which nobody knows: the bars
// of issue 7 (0.10 and 0.25) lie below what an oracle would reach on this machine, whose prompts stop everybody else. So
// predictions are held to the oracle's errors, and what they say of their own error to the truth.

import { beforeAll, describe, expect, it } from 'vitest';
import { quantile } from '../../bench/measure.ts';
import { fixedRank, routed } from '../support/simulator/contestants.ts';
import { foresee } from '../support/simulator/foresight.ts';
import { dearMachine, smallMachine } from '../support/simulator/machine.ts';
import type { Ended, Scenario } from '../support/simulator/scenario.ts';
import { simulate } from '../support/simulator/simulation.ts';
import { createTraffic, smallTiers, type Traffic } from '../support/simulator/traffic.ts';

const guarded = routed({ kind: 'guarded' });
const small: Omit<Traffic, 'seed' | 'seconds' | 'perSecond'> = {
  ...{ shape: 'steady', adapters: 16, zipf: 1.1, tenants: 4, tiers: smallTiers, endsEarly: 0 },
  ...{ promptTokens: [8, 128], tokensMax: [16, 32, 64] },
};
/** Requests before anything was learned. */
const warmup = 50;

type Predicted = Ended & { readonly plan: { readonly prediction: object } };
function predictedOf(ended: readonly Ended[]): Predicted[] {
  return ended
    .slice(warmup)
    .filter((one): one is Predicted => one.outcome === 'answered' && one.plan?.prediction != null);
}

/** Of errors in their own σ: their root mean square, and the share not beyond two. */
function spreadOf(errors: readonly number[]): { readonly rms: number; readonly within: number } {
  const square = errors.reduce((sum, one) => sum + one * one, 0) / errors.length;
  const within = errors.filter((one) => one <= 2).length / errors.length;
  return { rms: Math.sqrt(square), within };
}

// 6 requests a second are what smallMachine serves of this at full ranks, 2.5 dearMachine.
describe.each([
  ['steady, 20 %', smallMachine, 'steady', 1.2],
  ['steady, 50 %', smallMachine, 'steady', 3],
  ['steady, 80 %', smallMachine, 'steady', 4.8],
  ['bursts, 40 %', smallMachine, 'bursts', 2.4],
  ['dear ranks, 80 %', dearMachine, 'steady', 2],
] as const)('a deviation is what errors are: %s', (_, machine, shape, perSecond) => {
  let all: readonly Predicted[];
  beforeAll(async () => {
    const ended: Ended[] = [];
    for (const seed of [1, 2]) {
      const arrivals = createTraffic({
        ...small,
        shape,
        perSecond,
        seed,
        seconds: 700 / perSecond,
      });
      ended.push(...predictedOf((await simulate({ seed, machine, arrivals }, guarded)).ended));
    }
    all = ended as readonly Predicted[];
  }, 60_000);

  it('of totals, of the short ones and of the long ones', () => {
    const middle = quantile(
      all.map(({ plan }) => plan.prediction!.totalMs),
      0.5,
    );
    const halves = [true, false].map((isShort) =>
      all.filter(({ plan }) => plan.prediction!.totalMs <= middle === isShort),
    );
    for (const [i, part] of [all, ...halves].entries()) {
      const { rms, within } = spreadOf(
        part.map(({ plan, totalMs }) => {
          const { totalMs: mean, sigmaMs } = plan.prediction!;
          return (totalMs - mean) / sigmaMs;
        }),
      );
      expect(within).toBeGreaterThan(i === 0 ? 0.92 : 0.9);
      expect(within).toBeLessThan(0.985);
      expect(rms).toBeGreaterThan(0.75); // not by deviations that are too large
      expect(rms).toBeLessThan(1.35);
    }
  });

  it('of first tokens', () => {
    const { rms, within } = spreadOf(
      all.map(({ plan, ttftMs }) => {
        const { ttftMs: mean, ttftSigmaMs } = plan.prediction!;
        return (ttftMs - mean) / ttftSigmaMs;
      }),
    );
    expect(within).toBeGreaterThan(0.9);
    expect(within).toBeLessThan(0.99);
    // Whoever is overtaken waits many times as long: a tail that no deviation describes.
    expect(rms).toBeGreaterThan(0.6);
    expect(rms).toBeLessThan(2);
  });
});

describe('an oracle that knows all but who comes later', () => {
  const traffic = { ...small, seed: 3, seconds: 24, perSecond: 3 };
  const scenario: Scenario = { seed: 1, machine: smallMachine, arrivals: createTraffic(traffic) };

  it('is right where nobody comes, and never by knowing the future', async () => {
    const few = { ...traffic, perSecond: 0.001 };
    const arrivals = scenario.arrivals.slice(0, 20).map((one, i) => ({ ...one, atMs: 5000 * i }));
    const options = { samples: 5, futures: 2 };
    const alone = await foresee({ ...scenario, arrivals }, fixedRank(16), {
      ...options,
      traffic: few,
    });
    expect(alone).toHaveLength(5);
    for (const one of alone) expect(one.expectedMs).toBeCloseTo(one.actualMs, 6);
    const busy = await foresee({ ...scenario, arrivals }, fixedRank(16), {
      ...options,
      traffic: { ...traffic, perSecond: 12 },
    });
    expect(busy.filter((one) => one.expectedMs > 1.1 * one.actualMs).length).toBeGreaterThan(3);
  });

  it('is little better than the router at half load, and about as far off as the bars itself', async () => {
    const foreseen = await foresee(scenario, guarded, { traffic, samples: 24, futures: 6 });
    const error = (guess: 'expectedMs' | 'predictedMs', q: number): number =>
      quantile(
        foreseen.map((one) => Math.abs(one[guess] / one.actualMs - 1)),
        q,
      );
    expect(error('expectedMs', 0.5)).toBeGreaterThan(0.08);
    expect(error('expectedMs', 0.9)).toBeGreaterThan(0.25);
    expect(error('predictedMs', 0.5)).toBeLessThan(error('expectedMs', 0.5) + 0.1);
    expect(error('predictedMs', 0.9)).toBeLessThan(error('expectedMs', 0.9) + 0.17);
  }, 60_000);
});
