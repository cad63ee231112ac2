// What nobody can know when a request arrives. Some requests are simulated again and again: everything up to their arrival as
// it was, and after it others who come as often but not as they came. Whoever knew all that the arrival finds — who is there,
// how long each answer gets, ranks, the machine's noise — and how many come a second, could say no better than these futures
// do: a floor for predictions. Futures are drawn as of steady traffic.

import type { Contestant, Scenario } from './scenario.ts';
import { simulate } from './simulation.ts';
import { createTraffic, type Traffic } from './traffic.ts';

export interface Foreseen {
  readonly actualMs: number;
  /** By the plan. */
  readonly predictedMs: number;
  /** The guess with the smallest expected error, as a share of what comes true. */
  readonly expectedMs: number;
}

export interface ForesightOptions {
  /** What the scenario's arrivals were made from. */
  readonly traffic: Traffic;
  readonly samples: number;
  readonly futures: number;
}

/** Of the second half of the requests, those answered of so many, evenly spread. */
export async function foresee(
  scenario: Scenario,
  contestant: Contestant,
  { traffic, samples, futures }: ForesightOptions,
): Promise<Foreseen[]> {
  const { arrivals } = scenario;
  const { ended } = await simulate(scenario, contestant);
  const foreseen: Foreseen[] = [];
  const half = Math.floor(arrivals.length / 2);
  for (let sample = 0; sample < samples; sample++) {
    const index = half + Math.floor((sample * (arrivals.length - half)) / samples);
    const { outcome, totalMs: actualMs, plan } = ended[index]!;
    const predictedMs = plan?.prediction?.totalMs;
    if (outcome !== 'answered' || predictedMs === undefined) continue;
    const past = arrivals.slice(0, index + 1);
    const { atMs: nowMs } = past.at(-1)!;
    const totals: number[] = [];
    for (let future = 0; future < futures; future++) {
      const seed = traffic.seed + 1 + sample * futures + future;
      // Who comes when the answer should long have ended changes nothing.
      const later = createTraffic({ ...traffic, seed, seconds: (6 * actualMs) / 1000 }).map(
        (one) => ({ ...one, atMs: nowMs + one.atMs }),
      );
      const result = await simulate({ ...scenario, arrivals: [...past, ...later] }, contestant);
      totals.push(result.ended[index]!.totalMs);
    }
    foreseen.push({ actualMs, predictedMs, expectedMs: weightedMedian(totals) });
  }
  return foreseen;
}

/** Minimises the mean of |guess − total| ÷ total. */
function weightedMedian(totals: number[]): number {
  const ascending = totals.sort((a, b) => a - b);
  const all = ascending.reduce((sum, total) => sum + 1 / total, 0);
  let below = 0;
  return ascending.find((total) => {
    below += 1 / total;
    return below >= all / 2;
  })!;
}
