// What `bench deadline` heard, in numbers. A request is feasible when its smallest allowed rank is predicted to meet its budget
// alone on the machine; shares, and quality, are of the feasible ones.

import { fixedRank, rankLadder, routed } from '../test/support/simulator/contestants.ts';
import { searchHindsight } from '../test/support/simulator/hindsight.ts';
import type { Machine } from '../test/support/simulator/machine.ts';
import type { Ended, Result, Scenario } from '../test/support/simulator/scenario.ts';
import type { SimulatedAdapter } from '../test/support/simulator/simulated-adapter.ts';
import { simulate } from '../test/support/simulator/simulation.ts';
import { type Summary, summarise } from '../test/support/simulator/summary.ts';
import type { Arrival } from '../test/support/simulator/traffic.ts';
import type { Heard } from './deadline-client.ts';
import { median, quantile, type Report, round, type Series, seriesOf } from './measure.ts';
import { addSummaries } from './summary-series.ts';

export interface Run {
  /** Who chose ranks: `guarded`, `rank R`, `rank 1`. */
  readonly name: string;
  /** Share of the capacity. */
  readonly load: number;
  readonly arrivals: readonly Arrival[];
  /** One for each. */
  readonly heard: readonly Heard[];
}

export interface DeadlineRuns {
  /** Requests a second at full ranks, and at rank 1. */
  readonly capacity: number;
  readonly capacityRank1: number;
  /** Budgets are the simulator's times this. */
  readonly scale: number;
  /** Share of the answers that end before their limit. */
  readonly endsEarly: number;
  readonly runs: readonly Run[];
  /** The same requests beside a neighbour that is as they are, and one that floods. */
  readonly neighbours: {
    readonly arrivals: readonly Arrival[];
    readonly alone: readonly Heard[];
    readonly beside: readonly Heard[];
  };
  readonly adapters: readonly SimulatedAdapter[];
  /** With the costs that the gateway has learned. */
  readonly machine: Machine;
}

/** A load's product, and the same requests simulated: by the product's policy, and in hindsight. */
interface Compared {
  readonly run: Run;
  readonly measured: Summary;
  readonly simulated: Summary;
  readonly hindsight: Summary;
}

export async function summariseDeadline(
  measured: DeadlineRuns,
  hindsightRounds: number,
): Promise<Omit<Report, 'sides'>> {
  const { runs, capacity, capacityRank1, scale, machine } = measured;
  const compared: Compared[] = [];
  for (const run of runs.filter(({ name }) => name === 'guarded')) {
    compared.push(await compare(scenarioOf(measured, run), run, hindsightRounds));
  }
  const errors = compared.flatMap(({ run }) => errorsOf(run));
  const lengths = compared.flatMap(({ run }) => lengthErrors(run, measured.endsEarly));
  const goodputs = compared.map((one) => one.measured.goodput);
  const within = compared.filter(({ run }) => run.load < 1);
  const figures: Record<string, number> = {
    fidelity_to_oracle: Math.min(...within.map(fidelityToOracle)),
    error_median: quantile(errors, 0.5),
    error_p90: quantile(errors, 0.9),
    error_median_of_lengths: quantile(lengths, 0.5),
    error_p90_of_lengths: quantile(lengths, 0.9),
    ...neighbourFigures(measured.neighbours),
    capacity_per_second: capacity,
    capacity_rank_1_per_second: capacityRank1,
    budget_scale: scale,
  };
  const series: Record<string, Series> = {};
  for (const one of compared) {
    const percent = Math.round(100 * one.run.load);
    figures[`met_share_${percent}`] = one.measured.metShare;
    figures[`fidelity_to_oracle_${percent}`] = fidelityToOracle(one);
    figures[`goodput_${percent}`] = one.measured.goodput / Math.max(...goodputs);
    addSummaries(series, `${percent} guarded`, [one.measured]);
    addSummaries(series, `${percent} simulated guarded`, [one.simulated]);
    addSummaries(series, `${percent} hindsight`, [one.hindsight]);
    addOwn(series, `${percent} guarded`, one.run);
    const { errorMedian, errorP90 } = one.simulated;
    if (errorMedian !== null && errorP90 !== null) {
      series[`${percent} simulated guarded: error_median`] = seriesOf('1', [errorMedian]);
      series[`${percent} simulated guarded: error_p90`] = seriesOf('1', [errorP90]);
    }
  }
  for (const run of runs.filter(({ name }) => name !== 'guarded')) {
    const label = `${Math.round(100 * run.load)} ${run.name}`;
    const summary = summarise(scenarioOf(measured, run), resultOf(measured, run));
    addSummaries(series, label, [summary]);
  }
  const rounded = Object.entries(figures).map(([key, value]) => [key, round(value)] as const);
  return {
    bench: 'deadline',
    figures: Object.fromEntries(rounded),
    series,
    notes: [...notes, `learned step costs, ms: ${JSON.stringify(machine.cost)}`],
  };
}

const notes = [
  'loads are shares of capacity_per_second: a closed loop of the same traffic without budgets at full ranks',
  'met_share: of the requests that the learned step costs say rank 1 meets alone; times at the client, from when a request was due',
  'quality: mean energy kept (rank curve at the mean rank) of the feasible requests, 0 for one that is late or refused; fidelity_to_oracle: against hindsight, the lowest of the loads below 1',
  'hindsight: a local search over all ranks with everything known, over the same requests in the simulator with the learned step costs; it pays for no HTTP and no other process',
  'error: |predicted − total| / total at the client; error_of_lengths: that of somebody who knows the machine perfectly and of an answer only its limit',
  'noisy_neighbour_p99_ratio: total time of three tenants beside a fourth that asks 50 times as often as one of them, over that beside one that asks as often',
];

async function compare(scenario: Scenario, run: Run, rounds: number): Promise<Compared> {
  const own = await simulate(scenario, routed({ kind: 'guarded' }));
  const starts: Result[] = [own];
  for (const rank of rankLadder) starts.push(await simulate(scenario, fixedRank(rank)));
  const { result } = await searchHindsight(scenario, starts, rounds);
  return {
    run,
    measured: summarise(scenario, resultOf(scenario, run)),
    simulated: summarise(scenario, own),
    hindsight: summarise(scenario, result),
  };
}

/** Answers as long as they were. */
function scenarioOf(
  { machine, adapters }: Pick<DeadlineRuns, 'machine' | 'adapters'>,
  { arrivals, heard }: Run,
): Scenario {
  return {
    ...{ seed: 1, machine, adapters },
    arrivals: arrivals.map((one, i) => ({
      ...one,
      answerTokens: Math.max(1, Math.min(one.tokensMax, heard[i]!.tokens || one.answerTokens)),
    })),
  };
}

/** The plan is not heard, but for what it predicted (errorsOf). */
function resultOf({ adapters = [] }: Pick<Scenario, 'adapters'>, run: Run): Result {
  const curves = new Map(adapters.map((one) => [one.name, one.routed.rankCurve]));
  const ended = run.heard.map((one, i): Ended => {
    const { outcome, tokens, ttftMs, totalMs, rankMean } = one;
    const fidelity = energyAt(curves.get(run.arrivals[i]!.adapter!)!, rankMean);
    return { plan: null, outcome, tokens, ttftMs, totalMs, rankMean, fidelity };
  });
  return { contestant: run.name, ended, endMs: 0, steps: 0 };
}

/** Of a mean rank: between two ranks on the line. Where a rank was changed on the way this is a little too much. */
function energyAt(curve: readonly number[], rank: number): number {
  const at = (whole: number): number => (whole === 0 ? 0 : curve[whole - 1]!);
  const [low, high] = [Math.floor(rank), Math.ceil(rank)];
  return at(low) + (rank - low) * (at(high) - at(low));
}

function fidelityToOracle({ measured, hindsight }: Compared): number {
  return measured.quality / hindsight.quality;
}

function answeredOf({ heard }: Pick<Run, 'heard'>): readonly Heard[] {
  return heard.filter(({ outcome }) => outcome === 'answered');
}

function errorsOf(run: Run): number[] {
  return answeredOf(run).flatMap(({ predictedMs, totalMs }) =>
    predictedMs === null ? [] : [Math.abs(predictedMs - totalMs) / totalMs],
  );
}

/** Of the mean length, where so many answers end early and anywhere. */
function lengthErrors({ arrivals, heard }: Run, endsEarly: number): number[] {
  return heard.flatMap(({ outcome, tokens }, i) => {
    if (outcome !== 'answered') return [];
    const { tokensMax } = arrivals[i]!;
    const mean = (1 - endsEarly) * tokensMax + (endsEarly * (1 + tokensMax)) / 2;
    return [Math.abs(mean - tokens) / tokens];
  });
}

function neighbourFigures({ alone, beside }: DeadlineRuns['neighbours']): Record<string, number> {
  const total = (heard: readonly Heard[], q: number): number =>
    quantile(
      answeredOf({ heard }).map(({ totalMs }) => totalMs),
      q,
    );
  const ranks = (heard: readonly Heard[]): number => {
    const answered = answeredOf({ heard });
    return answered.reduce((sum, { rankMean }) => sum + rankMean, 0) / answered.length;
  };
  return {
    noisy_neighbour_p99_ratio: total(beside, 0.99) / total(alone, 0.99),
    noisy_neighbour_p50_ratio: total(beside, 0.5) / total(alone, 0.5),
    noisy_neighbour_rank_alone: ranks(alone),
    noisy_neighbour_rank_beside: ranks(beside),
    noisy_neighbour_requests: beside.length,
    noisy_neighbour_refused: beside.length - answeredOf({ heard: beside }).length,
  };
}

/** What a run says of itself beside its summary. */
function addOwn(series: Record<string, Series>, label: string, run: Run): void {
  const answered = answeredOf(run);
  const errors = errorsOf(run);
  const share = (is: (one: Heard) => boolean): number =>
    answered.filter(is).length / answered.length;
  series[`${label}: error_median`] = seriesOf('1', [quantile(errors, 0.5)]);
  series[`${label}: error_p90`] = seriesOf('1', [quantile(errors, 0.9)]);
  const ratios = answered.flatMap(({ predictedMs, totalMs }) =>
    predictedMs === null ? [] : [predictedMs / totalMs],
  );
  series[`${label}: predicted_to_total`] = seriesOf('1', [median(ratios)]);
  series[`${label}: rank_changed_share`] = seriesOf('1', [
    share(({ rank, rankMean }) => rank !== rankMean),
  ]);
  series[`${label}: cached_share`] = seriesOf('1', [share(({ cachedTokens }) => cachedTokens > 0)]);
}
