// Thompson sampling inside the safe set (algorithms.md section 11): what the latency guard lets through (mean + 2σ) and the
// rank curve holds to be near enough. A rank is worth (chance to be in time) × (quality). The chance starts at what the
// prediction implies and is corrected per load, slack and rank, for all adapters together: it is the machine's. Quality starts
// at the rank curve and is corrected per adapter by scores; where nobody scores it is not drawn, because exploring would cost
// quality and teach nothing.

import { LRUCache } from 'lru-cache';
import { z } from 'zod';
import { betaDraw, normalDraw, normalShare } from './draws.ts';
import type { Outcome, Plan, Predict, RankPolicy, RouteInput } from './policy.ts';
import { energy, guardSigmas, safePlans, slackOf } from './rank-policy.ts';
import { parseSaved } from './saved-state.ts';

/** What a prediction's chance weighs, in outcomes (guess). */
const priorOutcomes = 8;
/** What the rank curve weighs, in scores: its shape is trusted to √(¼ / 256) = 0.03 of a score. Less, and ranks that are nearly as
 *  good are confused for thousands of scores: at 4, 60 to 71 % of the gap in section 11's setting, at 256, 77 %. */
const priorScores = 256;
const keep = 0.995; // guess: an outcome counts half after 138 more of its kind
const keepScore = 0.999; // guess: half after 693 more
const scoreVarianceMax = 0.25; // of anything in [0, 1]
const adaptersMax = 1024;

const loadBins = 7; // 0, 1–2, 3–6, … 63 and more sequences besides
const slackBins = [3, 5, Number.POSITIVE_INFINITY]; // upper ends, in σ
const rankBins = 10; // 0, 1, 2, 4, … 256, rounded up
const cellCount = loadBins * slackBins.length * rankBins;

/** Per rank bin: scores seen, and their sum. */
interface Scores {
  readonly counts: number[];
  readonly sums: number[];
}

const amount = z.number().nonnegative();
const perCell = z.array(amount).length(cellCount);
const perRank = z.array(amount).length(rankBins);
const savedPolicy = z.strictObject({
  format: z.literal('rankgate-guarded/1'),
  met: perCell,
  missed: perCell,
  scores: z
    .array(z.tuple([z.string().max(2048), z.strictObject({ counts: perRank, sums: perRank })]))
    .max(adaptersMax),
});

export class GuardedPolicy implements RankPolicy {
  readonly name = 'guarded';
  #met: number[] = new Array<number>(cellCount).fill(0);
  #missed: number[] = new Array<number>(cellCount).fill(0);
  readonly #scores: LRUCache<string, Scores> = new LRUCache({ max: adaptersMax });

  choose(input: RouteInput, predict: Predict, draw: () => number): Plan {
    const plans = safePlans(input, predict);
    if (plans.length === 1) return plans[0];
    const worths = plans.map((plan) => this.#worth(input, plan, draw));
    return plans[worths.indexOf(Math.max(...worths))]!;
  }

  settle({ input, plan, met, score }: Outcome): void {
    const { adapter } = input;
    if (adapter === null) return;
    const slack = slackOf(input, plan);
    // Outside the guard's set nothing is chosen by what is learned here.
    if (met !== null && slack >= guardSigmas && Number.isFinite(slack)) {
      const cell = cellOf(input, plan, slack);
      this.#met[cell] = this.#met[cell]! * keep + (met ? 1 : 0);
      this.#missed[cell] = this.#missed[cell]! * keep + (met ? 0 : 1);
    }
    if (score !== null && score >= 0 && score <= 1) this.#learn(adapter.name, plan.rank, score);
  }

  #learn(adapter: string, rank: number, score: number): void {
    const none = (): number[] => new Array<number>(rankBins).fill(0);
    const scores = this.#scores.get(adapter) ?? { counts: none(), sums: none() };
    const bin = rankBin(rank);
    scores.counts[bin] = scores.counts[bin]! * keepScore + 1;
    scores.sums[bin] = scores.sums[bin]! * keepScore + score;
    this.#scores.set(adapter, scores);
  }

  #worth(input: RouteInput, plan: Plan, draw: () => number): number {
    const slack = slackOf(input, plan);
    const cell = cellOf(input, plan, slack);
    // Not 1, which has no posterior; near enough that a loose budget is not gambled with.
    const chance = Math.min(1 - 1e-6, normalShare(slack));
    const inTime = betaDraw(
      priorOutcomes * chance + this.#met[cell]!,
      priorOutcomes * (1 - chance) + this.#missed[cell]!,
      draw,
    );
    return inTime * this.#quality(input.adapter!, plan.rank, draw);
  }

  #quality(
    { name, rankCurve }: NonNullable<RouteInput['adapter']>,
    rank: number,
    draw: () => number,
  ): number {
    const expected = energy(rankCurve, rank);
    const scores = this.#scores.get(name);
    if (scores === undefined) return expected;
    const bin = rankBin(rank);
    const weight = priorScores + scores.counts[bin]!;
    const sum = priorScores * expected * scaleOf(scores, rankCurve) + scores.sums[bin]!;
    return Math.max(0, sum / weight + Math.sqrt(scoreVarianceMax / weight) * normalDraw(draw));
  }

  save(): string {
    const state: z.infer<typeof savedPolicy> = {
      format: 'rankgate-guarded/1',
      met: this.#met,
      missed: this.#missed,
      scores: [...this.#scores.entries()],
    };
    return JSON.stringify(state);
  }

  restore(text: string): boolean {
    const saved = parseSaved(text, savedPolicy);
    if (saved === null) return false;
    this.#met = saved.met;
    this.#missed = saved.missed;
    this.#scores.clear();
    for (const [adapter, scores] of saved.scores.toReversed()) this.#scores.set(adapter, scores);
    return true;
  }
}

function cellOf({ load }: RouteInput, plan: Plan, slack: number): number {
  const busy = Math.min(loadBins - 1, Math.floor(Math.log2(1 + load.decodeRows + load.waiting)));
  const tight = slackBins.findIndex((end) => slack <= end);
  return (busy * slackBins.length + tight) * rankBins + rankBin(plan.rank);
}

/** Bin b > 0 ends at rank 2^(b−1). */
function rankBin(rank: number): number {
  return rank === 0 ? 0 : 1 + Math.min(rankBins - 2, Math.ceil(Math.log2(rank)));
}

/** What scores are to the curve, over all ranks: the curve says how ranks compare, not what a score of 1 is. */
function scaleOf({ counts, sums }: Scores, curve: readonly number[]): number {
  let [seen, expected] = [1, 1]; // guess: as if the curve had come true once
  for (const [bin, count] of counts.entries()) {
    seen += sums[bin]!;
    if (bin > 0) expected += count * energy(curve, Math.min(curve.length, 2 ** (bin - 1)));
  }
  return seen / expected;
}
