import { describe, expect, it } from 'vitest';
import { createRandom } from '../../../src/adapters/families/seeded-random.ts';
import {
  afterGain,
  evidence,
  isWorse,
  lossGain,
  lowerBound,
  noCapitals,
  scoreGain,
} from '../../../src/jobs/refresh-watch.ts';

/** Of the bets and of the bound together. */
const alpha = 0.05;

/** The observation at which it is called worse; Infinity: at none of so many. */
function alarmAt(count: number, gain: () => number): number {
  let capitals = noCapitals;
  for (let i = 1; i <= count; i++) {
    capitals = afterGain(capitals, gain());
    if (isWorse(capitals, alpha / 2)) return i;
  }
  return Infinity;
}

type Score = (uniform: () => number) => number;
/** Of so many runs, each looked at after every score; `known`: scores of the generation before. */
function runs(count: number, known: number, [before, now]: readonly [Score, Score]): number[] {
  return Array.from({ length: count }, (_, run) => {
    const { uniform } = createRandom(BigInt(run), [7, 0]);
    const scores = Array.from({ length: known }, () => before(uniform));
    const bound = lowerBound(scores, alpha / 2);
    return bound <= 0 ? Infinity : alarmAt(500, () => scoreGain(now(uniform), bound));
  });
}

const thumbs =
  (rate: number): Score =>
  (uniform) =>
    uniform() < rate ? 1 : 0;
const any: Score = (uniform) => uniform();
const alarms = (ends: readonly number[]): number =>
  ends.filter(Number.isFinite).length / ends.length;
const median = (ends: readonly number[]): number =>
  ends.toSorted((a, b) => a - b)[Math.floor(ends.length / 2)]!;
/** Three deviations of a share of 1000. */
const spread = 3 * Math.sqrt((alpha * (1 - alpha)) / 1000);

describe('the watch over a generation', () => {
  it.each<[string, number, readonly [Score, Score]]>([
    ['thumbs, of few known', 20, [thumbs(0.5), thumbs(0.5)]],
    ['thumbs, of many known', 500, [thumbs(0.5), thumbs(0.5)]],
    ['mostly up', 100, [thumbs(0.95), thumbs(0.95)]],
    ['scores of two shapes with one mean', 200, [any, thumbs(0.5)]],
  ])('accuses one that is as good at most at its rate: %s', (_, known, scores) => {
    expect(alarms(runs(1000, known, scores))).toBeLessThanOrEqual(alpha + spread);
  });

  it('keeps its rate for bets alone, where nothing is bounded away', () => {
    // The worst case: the mean gain is exactly 0.
    const ends = Array.from({ length: 1000 }, (_, run) => {
      const { uniform } = createRandom(BigInt(run), [8, 0]);
      return alarmAt(500, () => (uniform() < 0.5 ? 1 : -1));
    });
    expect(alarms(ends)).toBeLessThanOrEqual(alpha / 2 + spread);
    expect(alarms(ends)).toBeGreaterThan(0);
  });

  it('finds one that is worse, the sooner the worse it is', () => {
    const slightly = runs(200, 500, [thumbs(0.8), thumbs(0.6)]);
    const badly = runs(200, 100, [thumbs(0.9), thumbs(0.1)]);
    expect([alarms(slightly), alarms(badly)]).toEqual([1, 1]);
    expect(median(badly)).toBeLessThan(12);
    expect(median(slightly)).toBeLessThan(150);
    expect(median(slightly)).toBeGreaterThan(median(badly));
  });

  it('finds what gets worse later', () => {
    let left = 50;
    const { uniform } = createRandom(1n);
    const bound = lowerBound(new Array<number>(200).fill(0.9), alpha / 2);
    const end = alarmAt(500, () => {
      left -= 1;
      return scoreGain(uniform() < (left > 0 ? 0.9 : 0) ? 1 : 0, bound);
    });
    expect(end).toBeGreaterThan(50);
    expect(end).toBeLessThan(120);
  });

  it('says nothing where too little is known', () => {
    expect(lowerBound([], alpha)).toBeLessThan(0);
    expect(lowerBound([1], alpha)).toBeLessThan(0);
    const bound = lowerBound(new Array<number>(100).fill(1), alpha);
    expect(bound).toBeCloseTo(1 - Math.sqrt(Math.log(20) / 200), 12);
  });

  it('starts at evidence 1 and never loses all', () => {
    expect(evidence(noCapitals)).toBe(1);
    let capitals = noCapitals;
    for (let i = 0; i < 50; i++) capitals = afterGain(capitals, 1);
    expect(evidence(capitals)).toBeGreaterThan(0);
    expect(capitals.every(Number.isFinite)).toBe(true);
  });

  it('takes losses, one nat being the most that counts', () => {
    expect([lossGain(1, 1), lossGain(1, 9), lossGain(9, 1), lossGain(1, 0.5)]).toEqual([
      0, -1, 1, 0.5,
    ]);
    expect(alarmAt(40, () => lossGain(1, 1.5))).toBeLessThan(20);
    expect(alarmAt(400, () => lossGain(1, 0.9))).toBe(Infinity);
  });
});
