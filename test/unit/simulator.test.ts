import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import type { StepReport } from '../../src/engine/messages.ts';
import { createPolicy } from '../../src/router/create-policy.ts';
import { Router } from '../../src/router/router.ts';
import { createRng } from '../support/random.ts';
import { fixedRank, givenRanks, routed } from '../support/simulator/contestants.ts';
import {
  dearMachine,
  type Machine,
  noiseAt,
  stepMs,
  timesAlone,
} from '../support/simulator/machine.ts';
import type { Contestant, Scenario } from '../support/simulator/scenario.ts';
import { createAdapters } from '../support/simulator/simulated-adapter.ts';
import { SimulatedClock } from '../support/simulator/simulated-clock.ts';
import { simulate } from '../support/simulator/simulation.ts';
import { isMet, qualityAlone, summarise } from '../support/simulator/summary.ts';
import { formatTrace, parseTrace } from '../support/simulator/trace-file.ts';
import {
  type Arrival,
  createTraffic,
  createZipf,
  smallTiers,
  type Traffic,
} from '../support/simulator/traffic.ts';

const traffic: Traffic = {
  ...{ seed: 1, seconds: 30, perSecond: 3, shape: 'steady', adapters: 8, zipf: 1.1, tenants: 3 },
  ...{ tiers: smallTiers, promptTokens: [4, 60], tokensMax: [4, 16], endsEarly: 0.5 },
};
const guarded = routed({ kind: 'guarded' });
const exact: Machine = { ...dearMachine, noise: 0 };

function arrivalOf(over: Partial<Arrival>): Arrival {
  return {
    ...{ atMs: 0, adapter: null, tenant: 't0', tier: 'none' },
    ...{ promptTokens: 10, tokensMax: 8, answerTokens: 8 },
    budget: {
      ...{ totalMs: null, ttftMs: null, perTokenMs: null },
      ...{ strict: false, rank: null, rankMin: 0, priority: 5 },
    },
    ...over,
  };
}

describe('a simulation', () => {
  it('ends every request once, gives everything back and is never faster than the machine', async () => {
    const small = fc.record({
      seed: fc.nat(1000),
      perSecond: fc.constantFrom(1, 4, 12),
      shape: fc.constantFrom('steady', 'bursts', 'diurnal'),
      strict: fc.boolean(),
      cells: fc.constantFrom(256, 1024),
      pages: fc.constantFrom(9, 12, 40),
      segmentsMax: fc.constantFrom(1, 3, 8),
      waitingMax: fc.constantFrom(4, 100),
      rank: fc.constantFrom(null, 1, 64),
    });
    const seen = new Set<string>();
    await fc.assert(
      fc.asyncProperty(small, async ({ seed, perSecond, shape, strict, rank, ...limits }) => {
        const tiers = smallTiers.map((tier) => ({ ...tier, strict }));
        const arrivals = createTraffic({ ...traffic, seed, perSecond, shape, tiers, seconds: 12 });
        const machine = { ...exact, ...limits };
        const contestant = rank === null ? guarded : fixedRank(rank);
        const { ended } = await simulate({ seed, machine, arrivals }, contestant);
        expect(ended.length).toBe(arrivals.length);
        for (const [i, one] of ended.entries()) {
          seen.add(one.outcome);
          if (one.outcome !== 'answered') continue;
          expect(one.tokens).toBe(arrivals[i]!.answerTokens);
          const alone = timesAlone(machine, arrivals[i]!, one.plan!.rank);
          expect(one.ttftMs).toBeGreaterThan(alone.ttftMs - 1e-6);
          expect(one.totalMs).toBeGreaterThan(alone.totalMs - 1e-6);
        }
      }),
      { numRuns: 40, seed: 7 },
    );
    expect(seen).toEqual(new Set(['answered', 'CONTENDED', 'DEADLINE_TOO_SHORT']));
  });

  it('is the same, byte for byte, for the same seed, and another for another', async () => {
    const run = async (seed: number): Promise<string> => {
      const scenario = { seed, machine: dearMachine, arrivals: createTraffic(traffic) };
      const result = await simulate(scenario, guarded);
      return JSON.stringify([result, summarise(scenario, result)]);
    };
    const first = await run(1);
    expect(await run(1)).toBe(first);
    expect(await run(2)).not.toBe(first);
  });

  it.each([
    [0.5, 30_000],
    [0.7, 60_000],
  ])('waits as an M/D/1 queue does at load %d', async (load, count) => {
    const serviceMs = 10;
    const rng = createRng(3);
    let atMs = 0;
    const arrivals = Array.from({ length: count }, () => {
      atMs -= (Math.log(1 - rng.next()) * serviceMs) / load;
      return arrivalOf({ atMs, promptTokens: 4, tokensMax: 1, answerTokens: 1 });
    });
    const free = { decodeRow: 0, prefillToken: 0, decodeRank: 0, prefillRank: 0, kvCell: 0 };
    const cost = { ...free, step: serviceMs };
    const machine = { ...exact, cost, segmentsMax: 1, waitingMax: count };
    const { ended, steps } = await simulate({ seed: 1, machine, arrivals }, guarded);
    expect(steps).toBe(count);
    const waits = ended.map(({ totalMs }) => totalMs - serviceMs);
    // Lindley's recursion on the same arrivals is exact, Pollaczek and Khinchine's mean holds in the long run.
    let [wanted, worst] = [0, 0];
    for (const [i, wait] of waits.entries()) {
      if (i > 0) wanted -= arrivals[i]!.atMs - arrivals[i - 1]!.atMs - serviceMs;
      wanted = Math.max(0, wanted);
      worst = Math.max(worst, Math.abs(wait - wanted));
    }
    expect(worst).toBeLessThan(1e-3);
    const mean = waits.reduce((sum, wait) => sum + wait, 0) / count;
    expect(Math.abs(mean / ((load * serviceMs) / (2 * (1 - load))) - 1)).toBeLessThan(0.03);
  });

  it('takes as long as the machine says: alone, and in every step of many', async () => {
    const name = 'a1';
    // A prompt that the scheduler holds to be short enough for one step (scheduler.ts, prefillMsMax), as timesAlone does.
    const size = { promptTokens: 30, tokensMax: 9, answerTokens: 5 };
    const adapter = createAdapters()(name);
    // The first brings the adapter in.
    const arrivals = [0, 10_000, 20_000].map((atMs, i) =>
      arrivalOf({ atMs, adapter: name, ...size, tokensMax: i === 2 ? 5 : 9 }),
    );
    const ranks = [adapter.rankMax, 4, 4];
    const reports: StepReport[] = [];
    class Watching extends Router {
      override observe(report: StepReport): void {
        reports.push(report);
        super.observe(report);
      }
    }
    const watched = (contestant: Contestant): Contestant => ({
      ...contestant,
      createRouter: ({ machine: { prefillTokensMax, segmentsMax: rowsMax } }) =>
        new Watching({
          identity: { baseHash: '', backend: '', threads: 1 },
          rowsMax,
          prefillTokensMax,
          policy: createPolicy({ kind: 'largest' }),
          draw: () => 0.5,
        }),
    });
    const { ended } = await simulate(
      { seed: 1, machine: exact, arrivals },
      watched(givenRanks('given', ranks)),
    );
    for (const i of [1, 2]) {
      const alone = timesAlone(exact, arrivals[i]!, 4);
      expect(ended[i]!.ttftMs).toBeCloseTo(alone.ttftMs, 6);
      expect(ended[i]!.totalMs).toBeCloseTo(alone.totalMs, 6);
    }
    expect(ended[0]!.totalMs).toBeGreaterThan(
      timesAlone(exact, arrivals[0]!, adapter.rankMax).totalMs + exact.adapterReadMs,
    );
    await simulate(
      { seed: 1, machine: exact, arrivals: createTraffic({ ...traffic, perSecond: 6 }) },
      watched(fixedRank(8)),
    );
    expect(reports.length).toBeGreaterThan(400);
    expect(
      reports.some(({ decodeRows, prefillTokens }) => decodeRows > 2 && prefillTokens > 0),
    ).toBe(true);
    for (const report of reports) expect(report.ms).toBeCloseTo(stepMs(exact.cost, report), 6);
  });

  it('answers faster at smaller ranks, and a full rank has full fidelity', async () => {
    const arrivals = createTraffic({ ...traffic, perSecond: 4 });
    const scenario: Scenario = { seed: 1, machine: dearMachine, arrivals };
    const [low, high] = await Promise.all(
      [1, 64].map(async (rank) => summarise(scenario, await simulate(scenario, fixedRank(rank)))),
    );
    expect(low!.totalMsP50).toBeLessThan(high!.totalMsP50);
    expect(low!.rankMean).toBe(1);
    expect(high!.fidelityMean).toBeCloseTo(1, 9);
    expect(low!.fidelityMean).toBeLessThan(0.5);
  });
});

describe('a summary', () => {
  it('counts what was in time among what could have been', () => {
    const budget = { ...arrivalOf({}).budget, totalMs: 150 };
    // Alone without adapter: 8 + 10 · 2.5 = 33 ms for the first token, 10.5 for each of seven more, and attention.
    const arrivals = [
      arrivalOf({ budget }),
      arrivalOf({ budget }),
      arrivalOf({ budget: { ...budget, totalMs: 100 } }),
      arrivalOf({ budget, atMs: 2000 }),
      arrivalOf({ atMs: 2000 }),
    ];
    const plan = null;
    const times = { tokens: 8, ttftMs: 40, rankMean: 4, fidelity: 0.5 };
    const ended = [
      { plan, outcome: 'answered', totalMs: 149, ...times },
      { plan, outcome: 'answered', totalMs: 151, ...times, rankMean: 8 },
      { plan, outcome: 'answered', totalMs: 99, ...times },
      { plan, outcome: 'CONTENDED', totalMs: 0, ...times },
      { plan, outcome: 'answered', totalMs: 9000, ...times, fidelity: 1 },
    ];
    const summary = summarise(
      { seed: 1, machine: exact, arrivals },
      { contestant: 'x', ended, endMs: 11_000, steps: 1 },
    );
    expect(summary).toMatchObject({
      ...{ requests: 5, feasible: 4, answered: 4, refused: { CONTENDED: 1 }, metShare: 2 / 4 },
      ...{ quality: (0.5 + 1) / 4, rankMean: 5, fidelityMean: 2.5 / 4, goodput: 3 / 2 },
      ...{ totalMsP50: 149, totalMsP99: 9000, errorMedian: null },
    });
    expect(isMet(arrivals[0]!, { ...ended[0]!, outcome: 'CONTENDED' })).toBe(false);
  });

  it('bounds quality by what each request could have alone', () => {
    const name = 'a1';
    const adapter = createAdapters()(name);
    const at = (rank: number): number => timesAlone(exact, arrivalOf({}), rank).totalMs;
    const budgets = [at(adapter.rankMax) + 1, at(4) + 0.01, at(1) - 0.01, at(0) - 0.01];
    const arrivals = budgets.map((totalMs) =>
      arrivalOf({ adapter: name, budget: { ...arrivalOf({}).budget, totalMs } }),
    );
    const wanted = (1 + adapter.routed.rankCurve[3]! + 0) / 3;
    expect(qualityAlone({ seed: 1, machine: exact, arrivals })).toBeCloseTo(wanted, 9);
  });
});

describe('traffic', () => {
  const many = { ...traffic, perSecond: 100, seconds: 400 };
  const perSecond = (arrivals: readonly Arrival[]): number[] => {
    const counts = new Array<number>(many.seconds).fill(0);
    for (const { atMs } of arrivals) counts[Math.floor(atMs / 1000)]! += 1;
    return counts;
  };
  const mean = (values: readonly number[]): number =>
    values.reduce((a, b) => a + b, 0) / values.length;
  /** Variance of the counts over their mean: 1 for a Poisson process. */
  const dispersion = (values: readonly number[]): number =>
    mean(values.map((one) => one ** 2)) / mean(values) - mean(values);

  it('comes at its rate: steady, in bursts, over a day', () => {
    const steady = perSecond(createTraffic(many));
    expect(mean(steady)).toBeGreaterThan(97);
    expect(mean(steady)).toBeLessThan(103);
    expect(dispersion(steady)).toBeGreaterThan(0.8);
    expect(dispersion(steady)).toBeLessThan(1.2);

    const bursts = perSecond(createTraffic({ ...many, shape: 'bursts' }));
    expect(mean(bursts)).toBeGreaterThan(65);
    expect(mean(bursts)).toBeLessThan(135);
    expect(dispersion(bursts)).toBeGreaterThan(20);

    const day = perSecond(createTraffic({ ...many, shape: 'diurnal' }));
    const [noon, night] = [mean(day.slice(90, 110)), mean(day.slice(290, 310))];
    expect(noon).toBeGreaterThan(170); // 100 · 1.8
    expect(night).toBeLessThan(25); // 100 · 0.2
  });

  it('asks for adapters by Zipf, and keeps to its spans and shares', () => {
    const pick = createZipf(1000, 1.1);
    const rng = createRng(1);
    const counts = new Array<number>(1000).fill(0);
    for (let i = 0; i < 100_000; i++) counts[pick(rng)]! += 1;
    expect(counts[0]! / counts[9]!).toBeGreaterThan(0.9 * 10 ** 1.1);
    expect(counts[0]! / counts[9]!).toBeLessThan(1.1 * 10 ** 1.1);
    expect(counts.slice(500).reduce((a, b) => a + b, 0)).toBeGreaterThan(0);

    const arrivals = createTraffic({ ...many, endsEarly: 0.3 });
    const share = (is: (one: Arrival) => boolean): number =>
      arrivals.filter(is).length / arrivals.length;
    expect(share(({ tier }) => tier === 'instant')).toBeCloseTo(0.3, 1);
    // An early end may fall on the limit itself.
    expect(share((one) => one.answerTokens < one.tokensMax)).toBeCloseTo(0.3 * (1 - 5 / 32), 1);
    const isIn = ({ answerTokens, tokensMax, promptTokens }: Arrival): boolean =>
      answerTokens >= 1 && answerTokens <= tokensMax && promptTokens >= 4 && promptTokens <= 60;
    expect(share(isIn)).toBe(1);
    const isWithin = ({ tier, tokensMax, budget: { totalMs } }: Arrival): boolean =>
      tier !== 'instant' || (totalMs! >= 300 + 40 * tokensMax && totalMs! <= 600 + 70 * tokensMax);
    expect(share(isWithin)).toBe(1);
  });

  it('survives its way through a trace file, and a bad line is named', () => {
    const arrivals = createTraffic(traffic);
    expect(arrivals.length).toBeGreaterThan(50);
    expect(parseTrace(formatTrace(arrivals))).toEqual(arrivals);
    const short = '{"at_ms":5,"prompt_tokens":4,"tokens_max":2,"answer_tokens":2}';
    expect(parseTrace(`${short}\n\n${short}\n`)).toMatchObject([
      { atMs: 5, adapter: null, tenant: 't0', budget: { totalMs: null, rankMin: 0 } },
      {},
    ]);
    const bad = [
      ['{', 'not JSON'],
      [short.replace('"at_ms":5', '"at_ms":4'), 'before the line above'],
      [short.replace('"answer_tokens":2', '"answer_tokens":3'), 'beyond its limit'],
      [short.replace('"at_ms":5', '"at_ms":5,"rank":3'), 'rank'],
      [short.replace('"prompt_tokens":4', '"prompt_tokens":3'), 'prompt_tokens'],
    ] as const;
    for (const [text, reason] of bad) {
      expect(() => parseTrace(`${short}\n${text}`)).toThrow(
        new RegExp(`^line 2: .*${reason}`, 's'),
      );
    }
  });
});

describe('the machine and its clock', () => {
  it('scatters around the mean, the same at the same time', () => {
    const machine = { ...dearMachine, noise: 0.2 };
    const draws = Array.from({ length: 20_000 }, (_, i) => noiseAt(machine, 1, 5 * i + 1));
    const mean = draws.reduce((a, b) => a + b, 0) / draws.length;
    expect(mean).toBeCloseTo(1, 2);
    const deviation = Math.sqrt(draws.reduce((sum, x) => sum + (x - mean) ** 2, 0) / draws.length);
    expect(deviation).toBeCloseTo(0.2, 2);
    expect(noiseAt(machine, 1, 7)).toBe(noiseAt(machine, 1, 9)); // one slot
    expect(noiseAt(machine, 2, 7)).not.toBe(noiseAt(machine, 1, 7));
  });

  it('calls back in order of time, then of asking, and not what was cancelled', () => {
    const clock = new SimulatedClock();
    const heard: string[] = [];
    const note = (name: string) => () => heard.push(`${name} ${clock.nowMs()}`);
    clock.after(20, note('late'));
    clock.after(10, note('first'));
    clock.after(10, note('second'));
    const cancel = clock.after(15, note('never'));
    cancel();
    cancel();
    clock.at(5, () => {
      note('early')();
      clock.after(1, note('nested'));
    });
    clock.advance(12);
    expect(heard).toEqual(['early 5', 'nested 6', 'first 10', 'second 10']);
    expect(clock.nowMs()).toBe(12);
    expect(clock.advanceToNext()).toBe(true);
    expect(clock.nowMs()).toBe(20);
    expect(clock.advanceToNext()).toBe(false);
  });
});
