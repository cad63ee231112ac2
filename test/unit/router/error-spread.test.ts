import { describe, expect, it } from 'vitest';
import { ErrorSpread } from '../../../src/router/error-spread.ts';
import { createRng } from '../../support/random.ts';

/** Errors of N(0, deviation(predicted)), of times from 100 ms to 10 s; the last weigh as the first. */
function learned(deviation: (predictedMs: number) => number, weight = 1): ErrorSpread {
  const spread = new ErrorSpread();
  const rng = createRng(1);
  for (let i = 0; i < 4000; i++) {
    const predictedMs = 100 * 100 ** rng.next();
    const errorMs = deviation(predictedMs) * rng.normal();
    spread.learn(predictedMs, predictedMs + errorMs, weight);
  }
  return spread;
}
const deviationOf = (spread: ErrorSpread, ms: number): number => Math.sqrt(spread.variance(ms));

describe('the spread of errors', () => {
  it.each([
    ['as arrivals add up', (ms: number) => Math.sqrt(40 * ms)],
    ['in proportion', (ms: number) => 0.3 * ms],
    ['the same for all', () => 150],
  ])('is found at every size: %s', (_, deviation) => {
    const spread = learned(deviation);
    for (const ms of [200, 700, 2000, 6000]) {
      expect(deviationOf(spread, ms) / deviation(ms)).toBeGreaterThan(0.75);
      expect(deviationOf(spread, ms) / deviation(ms)).toBeLessThan(1.35);
    }
  });

  it('starts as a share of what is predicted, and sizes that were not seen go by all others', () => {
    expect(deviationOf(new ErrorSpread(), 8)).toBeCloseTo(2, 9);
    const spread = new ErrorSpread();
    for (let i = 0; i < 400; i++) spread.learn(700, i % 2 === 0 ? 900 : 500, 1);
    expect(deviationOf(spread, 700) / 200).toBeCloseTo(1, 1);
    expect(deviationOf(spread, 16 * 700) / deviationOf(spread, 700)).toBeCloseTo(4, 0);
  });

  it('forgets, and what stood still once does not last', () => {
    const spread = learned((ms) => 0.5 * ms);
    const middle = 512 * Math.SQRT2; // of an octave: its neighbours have no part in it
    const before = deviationOf(spread, middle);
    spread.learn(middle, 1e7, 1);
    expect(deviationOf(spread, middle)).toBeLessThan(1.5 * before);
    for (let i = 0; i < 600; i++) spread.learn(middle, middle + (i % 2 === 0 ? 10 : -10), 1);
    expect(deviationOf(spread, middle)).toBeLessThan(0.15 * before);
  });

  it('changes slowly by errors of small weight', () => {
    const [light, heavy] = [learned(() => 10), learned(() => 10)];
    for (let i = 0; i < 20; i++) {
      light.learn(1000, 1500, 0.1);
      heavy.learn(1000, 1500, 1);
    }
    expect(deviationOf(heavy, 1000)).toBeGreaterThan(2 * deviationOf(light, 1000));
  });

  it('has no answer but numbers', () => {
    const spread = new ErrorSpread();
    spread.learn(0, 5, 1);
    spread.learn(Number.NaN, 5, 1);
    expect(deviationOf(spread, 100)).toBeCloseTo(25, 9);
    spread.learn(1e-3, 5, 1);
    spread.learn(1e12, 2e12, 1);
    for (const ms of [0, 1e-9, 1, 1e6, 1e15]) {
      expect(spread.variance(ms)).toSatisfy(Number.isFinite);
      expect(spread.variance(ms)).toBeGreaterThanOrEqual(0);
    }
  });

  it('is the same after a save', () => {
    const [one, other] = [learned((ms) => 0.3 * ms), new ErrorSpread()];
    other.restore(one.save());
    for (const ms of [1, 300, 3000]) expect(other.variance(ms)).toBe(one.variance(ms));
  });
});
