// `bench simulate`: policies against each other on the simulated machine (test/support/simulator), where a minute takes
// seconds and everybody meets the same requests and the same noise. Loads are shares of what the machine serves of this
// traffic at full ranks. With a trace, that trace only. And what it takes to simulate 1,000 and
// 10,000 requests a second of 1,000 adapters.

import { readFileSync } from 'node:fs';
import { fixedRank, rankLadder, routed } from '../test/support/simulator/contestants.ts';
import { type Foreseen, foresee } from '../test/support/simulator/foresight.ts';
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
import { quantile, type Report, round, type Series, seriesOf } from './measure.ts';
import { addSummaries } from './summary-series.ts';

export interface SimulateSizes {
  readonly seeds: number;
  readonly seconds: number;
  readonly loads: readonly number[];
  readonly hindsightRounds: number;
  /** Requests whose prediction is compared with what could have been known, and of how many seconds of each load. */
  readonly foreseen: number;
  readonly foreseenSeconds: number;
  readonly futures: number;
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
  foreseen: 40,
  foreseenSeconds: 40,
  futures: 12,
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
  const floors: Record<string, number> = {};
  for (let seed = 1; seed <= sizes.seeds; seed++) {
    const capacity = await capacityOf(smallMachine, sizes.backlog, seed);
    for (const load of sizes.loads) {
      const perSecond = load * capacity;
      const arrivals = createTraffic({ ...smallTraffic, seed, seconds: sizes.seconds, perSecond });
      const scenario = { seed, machine: smallMachine, arrivals };
      compared.push(await compare(String(Math.round(100 * load)), scenario, sizes));
      if (seed === 1) Object.assign(floors, await floorFigures(load, sizes));
    }
  }
  return reportOf(compared, { ...floors, ...(await manyFigures(sizes.manySeconds)) });
}

/** How far off a prediction must be, answers' lengths known, and how far off those of the same requests are. */
async function floorFigures(
  load: number,
  { foreseen: samples, foreseenSeconds: seconds, futures, backlog }: SimulateSizes,
): Promise<Record<string, number>> {
  const whole = { ...smallTraffic, endsEarly: 0 };
  const perSecond = load * (await capacityOf(smallMachine, backlog, 1, whole));
  const traffic = { ...whole, seed: 11, seconds, perSecond };
  const scenario = { seed: 1, machine: smallMachine, arrivals: createTraffic(traffic) };
  const foreseen = await foresee(scenario, guarded, { traffic, samples, futures });
  const figures: Record<string, number> = {};
  for (const [name, guess] of [
    ['error_floor', (one: Foreseen) => one.expectedMs],
    ['error_beside_floor', (one: Foreseen) => one.predictedMs],
  ] as const) {
    const errors = foreseen.map((one) => Math.abs(guess(one) / one.actualMs - 1));
    figures[`${name}_median_${Math.round(100 * load)}`] = round(quantile(errors, 0.5));
    figures[`${name}_p90_${Math.round(100 * load)}`] = round(quantile(errors, 0.9));
  }
  return figures;
}

/** Requests a second that are served at full ranks when there is always one that waits. */
async function capacityOf(
  machine: Machine,
  count: number,
  seed: number,
  kind: typeof smallTraffic = smallTraffic,
): Promise<number> {
  const traffic = { ...kind, seed, seconds: count, perSecond: 2 };
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
      for (const [figure, read] of [
        ['error_median', (one: Summary) => one.errorMedian],
        ['error_p90', (one: Summary) => one.errorP90],
      ] as const) {
        const errors = runs.flatMap((run) => read(own(run)) ?? []); // none where nothing was predicted
        if (errors.length > 0) figures[`${figure}_${name}_${label}`] = seriesOf('1', errors).median;
      }
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
      'error_floor: what the best guess at an arrival would be off that knows everything but who comes later (test/support/simulator/foresight.ts), of answers that use their limit; error_beside_floor: the plan, of the same requests; error: all requests of the compared runs, of which 30 % end early',
    ],
  };
}
