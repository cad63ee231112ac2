// `bench simulate`: policies against each other on the simulated machine (test/support/simulator), where a minute takes
// seconds and everybody meets the same requests and the same noise. Loads are shares of what the machine serves of this
// traffic at full ranks. With a trace, that trace only. And what it takes to simulate 1,000 and
// 10,000 requests a second of 1,000 adapters.

import { readFileSync } from 'node:fs';
import { fixedRank, rankLadder, routed } from '../test/support/simulator/contestants.ts';
import { searchHindsight } from '../test/support/simulator/hindsight.ts';
import { largeMachine, type Machine, smallMachine } from '../test/support/simulator/machine.ts';
import type { Contestant, Result, Scenario } from '../test/support/simulator/scenario.ts';
import { simulate } from '../test/support/simulator/simulation.ts';
import { qualityAlone, type Summary, summarise } from '../test/support/simulator/summary.ts';
import { parseTrace } from '../test/support/simulator/trace-file.ts';
import {
  type Arrival,
  createTraffic,
  largeTiers,
  smallTiers,
  type Traffic,
} from '../test/support/simulator/traffic.ts';
import { type Report, round, type Series, seriesOf } from './measure.ts';
import { addSummaries } from './summary-series.ts';

export interface SimulateSizes {
  readonly seeds: number;
  readonly seconds: number;
  readonly loads: readonly number[];
  readonly hindsightRounds: number;
  /** Requests that wait at once when capacity is measured. */
  readonly backlog: number;
  /** Of 1,000 requests a second; a twelfth of it of 10,000. */
  readonly manySeconds: number;
}

const fullSimulate: SimulateSizes = {
  seeds: 2,
  seconds: 240,
  loads: [0.5, 0.8, 0.95, 1.2],
  hindsightRounds: 20,
  backlog: 400,
  manySeconds: 60,
};

const smallTraffic: Omit<Traffic, 'seed' | 'seconds' | 'perSecond'> = {
  shape: 'steady',
  adapters: 16,
  zipf: 1.1,
  tenants: 4,
  tiers: smallTiers,
  promptTokens: [8, 128],
  tokensMax: [16, 32, 64],
  endsEarly: 0.3,
};

/** 1,000 adapters, in bursts. */
function manyRequests(seconds: number, perSecond: number): Scenario {
  const arrivals = createTraffic({
    ...{ seed: 1, seconds, perSecond, shape: 'bursts', adapters: 1000, zipf: 1.1, tenants: 100 },
    ...{ tiers: largeTiers, promptTokens: [16, 64], tokensMax: [4, 8, 16, 32], endsEarly: 0.3 },
  });
  return { seed: 1, machine: largeMachine(perSecond), arrivals };
}

export interface SimulateSettings {
  /** A file of test/support/simulator/trace-file.ts; null: made-up traffic. */
  readonly tracePath: string | null;
}

export async function benchSimulate(
  { tracePath }: SimulateSettings,
  sizes: SimulateSizes = fullSimulate,
): Promise<Report> {
  if (tracePath !== null) {
    const arrivals = parseTrace(readFileSync(tracePath, 'utf8'));
    const scenario = { seed: 1, machine: smallMachine, arrivals };
    return reportOf([await compare('trace', scenario, sizes)], {});
  }
  const compared: Compared[] = [];
  for (let seed = 1; seed <= sizes.seeds; seed++) {
    const capacity = await capacityOf(smallMachine, sizes.backlog, seed);
    for (const load of sizes.loads) {
      const perSecond = load * capacity;
      const arrivals = createTraffic({ ...smallTraffic, seed, seconds: sizes.seconds, perSecond });
      const scenario = { seed, machine: smallMachine, arrivals };
      compared.push(await compare(String(Math.round(100 * load)), scenario, sizes));
    }
  }
  return reportOf(compared, await manyFigures(sizes.manySeconds));
}

/** Requests a second that are served at full ranks when there is always one that waits. */
async function capacityOf(machine: Machine, count: number, seed: number): Promise<number> {
  const traffic = { ...smallTraffic, seed, seconds: count, perSecond: 2 };
  const arrivals: Arrival[] = createTraffic(traffic)
    .slice(0, count)
    .map((one) => ({ ...one, atMs: 0 }));
  const roomy = { ...machine, waitingMax: count, waitingTokensMax: 2 ** 24 };
  const { endMs } = await simulate({ seed, machine: roomy, arrivals }, fixedRank(64));
  return (1000 * arrivals.length) / endMs;
}

interface Compared {
  readonly label: string;
  readonly summaries: readonly Summary[];
  readonly bestFixed: Summary;
  readonly hindsight: Summary;
  readonly alone: number;
}

const guarded = routed({ kind: 'guarded' });
const policies: readonly Contestant[] = [guarded, routed({ kind: 'largest' })];

async function compare(
  label: string,
  scenario: Scenario,
  { hindsightRounds }: Pick<SimulateSizes, 'hindsightRounds'>,
): Promise<Compared> {
  const results: Result[] = [];
  for (const contestant of [...rankLadder.map(fixedRank), ...policies]) {
    results.push(await simulate(scenario, contestant));
  }
  const summaries = results.map((result) => summarise(scenario, result));
  const bestFixed = summaries
    .slice(0, rankLadder.length)
    .reduce((a, b) => (b.quality > a.quality ? b : a));
  const found = await searchHindsight(scenario, results, hindsightRounds);
  const hindsight = summarise(scenario, found.result);
  return {
    ...{ label, bestFixed, hindsight, alone: qualityAlone(scenario) },
    summaries: [...summaries, hindsight],
  };
}

/** Of the way from the best fixed rank to the best in hindsight; 1 or 0 where that way has no length. */
function gapClosed(
  { quality }: Summary,
  { bestFixed, hindsight }: Pick<Compared, 'bestFixed' | 'hindsight'>,
): number {
  const gap = hindsight.quality - bestFixed.quality;
  if (gap <= 0) return quality >= bestFixed.quality ? 1 : 0;
  return (quality - bestFixed.quality) / gap;
}

async function manyFigures(seconds: number): Promise<Record<string, number>> {
  const figures: Record<string, number> = {};
  for (const [name, scenario] of [
    ['minute_1000', manyRequests(seconds, 1000)],
    ['seconds_10000', manyRequests(seconds / 12, 10_000)],
  ] as const) {
    const cpuStart = process.cpuUsage();
    const result = await simulate(scenario, guarded);
    const { user, system } = process.cpuUsage(cpuStart);
    figures[`${name}_cpu_s`] = round((user + system) / 1e6);
    figures[`${name}_requests`] = scenario.arrivals.length;
    figures[`${name}_met_share`] = round(summarise(scenario, result).metShare);
  }
  return figures;
}

function refusals({ requests, answered }: Summary): number {
  return requests - answered;
}

/** A series per load, contestant and figure, over the seeds; figures for the policies. */
function reportOf(compared: readonly Compared[], more: Readonly<Record<string, number>>): Report {
  const series: Record<string, Series> = {};
  const figures: Record<string, number> = {};
  for (const label of new Set(compared.map((one) => one.label))) {
    const runs = compared.filter((one) => one.label === label);
    const names = runs[0]!.summaries.map(({ contestant }) => contestant);
    for (const [i, name] of names.entries()) {
      const own = runs.map(({ summaries }) => summaries[i]!);
      addSummaries(series, `${label} ${name}`, own);
    }
    for (const { name } of policies) {
      const of = (figure: string): number => series[`${label} ${name}: ${figure}`]!.median;
      const own = (run: Compared): Summary =>
        run.summaries.find(({ contestant }) => contestant === name)!;
      const closed = seriesOf(
        '1',
        runs.map((run) => gapClosed(own(run), run)),
      );
      series[`${label} ${name}: gap_closed`] = closed;
      figures[`gap_closed_${name}_${label}`] = closed.median;
      figures[`met_share_${name}_${label}`] = of('met_share');
      figures[`refused_${name}_${label}`] = runs.reduce((sum, run) => sum + refusals(own(run)), 0);
      figures[`quality_to_bound_${name}_${label}`] = seriesOf(
        '1',
        runs.map((run) => own(run).quality / run.alone),
      ).median;
    }
  }
  return {
    bench: 'simulate',
    figures: { ...figures, ...more },
    series,
    sides: {},
    notes: [
      'simulated: the router and the engine loop of this commit on a machine of made-up or measured step costs (test/support/simulator/machine.ts); loads are shares of the rate served at full ranks',
      'quality: mean fidelity of the feasible requests, 0 for one that is late or refused; gap_closed: (policy - best fixed rank) / (hindsight - best fixed rank)',
      'hindsight: a local search over all ranks with everything known, a lower bound of the optimum; quality_to_bound: against each request alone on the machine, an upper bound',
    ],
  };
}
