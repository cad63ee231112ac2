// The product's policy on the simulated machine, against fixed ranks and hindsight. Bars are issue 7's. Requests that seldom
// meet: there a choice is its own only, as in algorithms.md section 11. Bursts: there everybody pays for everybody's rank.
// Both on the machine where ranks are dear: where they are cheap there is no gap to close.
// Not reached, and not asserted: three quarters of the gap under load. At 95 % of capacity on smallMachine the best fixed rank
// has 0.899, guarded 0.893, hindsight 0.914 (seed 21, 80 s, 2026-11-25); at 80 % on dearMachine 0.887, 0.877, 0.925.

import { beforeAll, describe, expect, it } from 'vitest';
import { fixedRank, rankLadder, routed } from '../support/simulator/contestants.ts';
import { searchHindsight } from '../support/simulator/hindsight.ts';
import { dearMachine } from '../support/simulator/machine.ts';
import type { Result, Scenario } from '../support/simulator/scenario.ts';
import { simulate } from '../support/simulator/simulation.ts';
import { qualityAlone, type Summary, summarise } from '../support/simulator/summary.ts';
import { createTraffic, smallTiers, type Traffic } from '../support/simulator/traffic.ts';

const common = { seed: 1, adapters: 16, zipf: 1.1, tenants: 4, promptTokens: [8, 128] } as const;
const answers = { tokensMax: [16, 32, 64], endsEarly: 0 } as const;
/** Budgets from less than rank 1 takes alone to more than rank 64 does. */
const tight = { firstMs: [80, 300], perTokenMs: [11, 20], strict: false, priority: 5 } as const;
const sparse: Traffic = {
  ...common,
  ...answers,
  ...{
    seconds: 6000,
    perSecond: 0.05,
    shape: 'steady',
    tiers: [{ name: 'tight', share: 1, ...tight }],
  },
};
const bursts: Traffic = {
  ...common,
  ...answers,
  ...{ seconds: 200, perSecond: 1.5, shape: 'bursts', tiers: smallTiers, endsEarly: 0.3 },
};

interface Run {
  readonly scenario: Scenario;
  readonly results: readonly Result[];
  readonly fixed: readonly Summary[];
  readonly guarded: Summary;
}

async function runAll(traffic: Traffic): Promise<Run> {
  // All adapters fit: what a load takes is nobody's choice.
  const machine = { ...dearMachine, pages: 256 };
  const scenario = { seed: 1, machine, arrivals: createTraffic(traffic) };
  const results: Result[] = [];
  for (const one of [...rankLadder.map(fixedRank), routed({ kind: 'guarded' })]) {
    results.push(await simulate(scenario, one));
  }
  const summaries = results.map((result) => summarise(scenario, result));
  return { scenario, results, fixed: summaries.slice(0, -1), guarded: summaries.at(-1)! };
}

describe('the guarded policy, simulated', () => {
  let runs: Readonly<Record<'sparse' | 'bursts', Run>>;
  beforeAll(async () => {
    runs = { sparse: await runAll(sparse), bursts: await runAll(bursts) };
  }, 180_000);

  it('closes three quarters of the gap between the best fixed rank and hindsight', async () => {
    const { scenario, results, fixed, guarded } = runs.sparse;
    const best = Math.max(...fixed.map(({ quality }) => quality));
    // Longer searches find more: 40 rounds leave 0.79 closed here, 0.78 and 0.71 with seeds 2 and 3 (2026-11-25).
    const found = await searchHindsight(scenario, results, 24);
    const hindsight = summarise(scenario, found.result).quality;
    for (const one of fixed) expect(hindsight).toBeGreaterThanOrEqual(one.quality);
    expect(hindsight).toBeLessThanOrEqual(qualityAlone(scenario) + 0.005); // lucky noise
    expect(hindsight - best).toBeGreaterThan(0.05); // there is a gap
    expect((guarded.quality - best) / (hindsight - best)).toBeGreaterThanOrEqual(0.75);
  }, 180_000);

  it.each(['sparse', 'bursts'] as const)(
    'has more fidelity than any fixed rank that is as often in time: %s',
    (name) => {
      const { fixed, guarded } = runs[name];
      const others = fixed.filter(({ metShare }) => metShare >= guarded.metShare - 0.005);
      expect(others.length).toBeGreaterThan(0);
      for (const one of others) expect(guarded.fidelityMean).toBeGreaterThan(one.fidelityMean);
    },
  );
});
