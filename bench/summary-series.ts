// Summaries of runs, simulated or measured, as series of a report: one a figure, with a value a run.

import type { Summary } from '../test/support/simulator/summary.ts';
import { type Series, seriesOf } from './measure.ts';

const figures = [
  ['met_share', '1', (one: Summary) => one.metShare],
  ['quality', '1', (one: Summary) => one.quality],
  ['fidelity', '1', (one: Summary) => one.fidelityMean],
  ['rank', 'ranks', (one: Summary) => one.rankMean],
  ['goodput', '1/s', (one: Summary) => one.goodput],
  ['ttft_p50', 'ms', (one: Summary) => one.ttftMsP50],
  ['ttft_p99', 'ms', (one: Summary) => one.ttftMsP99],
  ['total_p50', 'ms', (one: Summary) => one.totalMsP50],
  ['total_p99', 'ms', (one: Summary) => one.totalMsP99],
  ['requests', '1', (one: Summary) => one.requests],
  ['feasible', '1', (one: Summary) => one.feasible],
  ['answered', '1', (one: Summary) => one.answered],
] as const;

/** As `LABEL: FIGURE`. */
export function addSummaries(
  series: Record<string, Series>,
  label: string,
  runs: readonly Summary[],
): void {
  for (const [figure, unit, read] of figures) {
    series[`${label}: ${figure}`] = seriesOf(unit, runs.map(read));
  }
}
