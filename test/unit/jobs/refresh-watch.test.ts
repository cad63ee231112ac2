import { describe, expect, it } from 'vitest';
import { createRandom } from '../../../src/adapters/families/seeded-random.ts';
import {
  afterPair,
  evidence,
  isWorse,
  lossPair,
  noCapitals,
  type Pair,
} from '../../../src/jobs/refresh-watch.ts';

const alpha = 0.05;

/** The pair at which it is called worse; Infinity: at none of so many. */
function alarmAt(pairs: number, next: (i: number) => Pair): number {
  let capitals = noCapitals;
  for (let i = 1; i <= pairs; i++) {
    capitals = afterPair(capitals, next(i));
    if (isWorse(capitals, alpha)) return i;
  }
  return Infinity;
}

type Draw = () => number;
/** Of so many runs, each looked at after every pair. */
function runs(count: number, pairs: number, before: (u: Draw) => number, now: (u: Draw) => number) {
  return Array.from({ length: count }, (_, run) => {
    const { uniform } = createRandom(BigInt(run), [7, 0]);
    return alarmAt(pairs, () => ({ before: before(uniform), now: now(uniform) }));
  });
}

const thumbs =
  (rate: number) =>
  (uniform: Draw): number =>
    uniform() < rate ? 1 : 0;
const alarms = (ends: readonly number[]): number =>
  ends.filter(Number.isFinite).length / ends.length;
/** Three deviations of a share of 1000. */
const spread = 3 * Math.sqrt((alpha * (1 - alpha)) / 1000);

describe('the watch over a generation', () => {
  it.each([
    ['thumbs at the worst rate', thumbs(0.5), thumbs(0.5)],
    ['rare thumbs', thumbs(0.05), thumbs(0.05)],
    ['scores of two shapes with one mean', (u: Draw) => u(), thumbs(0.5)],
  ])('accuses a generation that is as good at most at its rate: %s', (_, before, now) => {
    const ends = runs(1000, 400, before, now);
    expect(alarms(ends)).toBeLessThanOrEqual(alpha + spread);
  });

  it('hardly ever accuses one that is better', () => {
    expect(alarms(runs(1000, 400, thumbs(0.5), thumbs(0.7)))).toBeLessThan(0.01);
  });

  it('finds one that is worse, the sooner the worse it is', () => {
    const median = (ends: number[]): number => ends.sort((a, b) => a - b)[ends.length / 2]!;
    const slightly = runs(200, 2000, thumbs(0.8), thumbs(0.6));
    const badly = runs(200, 2000, thumbs(0.9), thumbs(0.1));
    expect([alarms(slightly), alarms(badly)]).toEqual([1, 1]);
    expect(median(badly)).toBeLessThan(12);
    expect(median(slightly)).toBeLessThan(150);
    expect(median(slightly)).toBeGreaterThan(median(badly));
  });

  it('starts at evidence 1 and never bets more than it has', () => {
    expect(evidence(noCapitals)).toBe(1);
    let capitals = noCapitals;
    for (let i = 0; i < 50; i++) capitals = afterPair(capitals, { before: 0, now: 1 });
    expect(evidence(capitals)).toBeGreaterThan(0);
    expect(capitals.every(Number.isFinite)).toBe(true);
  });

  it('takes losses, one nat being the most that counts', () => {
    expect(lossPair(1, 1)).toEqual({ before: 0.5, now: 0.5 });
    expect(lossPair(1, 9)).toEqual({ before: 1, now: 0 });
    expect(lossPair(1, 0.5)).toEqual({ before: 0.25, now: 0.75 });
    expect(alarmAt(40, () => lossPair(1, 1.5))).toBeLessThan(12);
    expect(alarmAt(400, () => lossPair(1, 0.9))).toBe(Infinity);
  });
});
