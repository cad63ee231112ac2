import { describe, expect, it } from 'vitest';
import { AnswerLengths, savedCurves } from '../../../src/router/answer-length.ts';
import { createRng } from '../../support/random.ts';

describe('expected answer lengths', () => {
  it('start at the whole limit', () => {
    expect(new AnswerLengths(4).expect('a', 300)).toEqual({ mean: 300, deviation: 0 });
  });

  it('follow answers that stop by themselves, per adapter', () => {
    const lengths = new AnswerLengths(4);
    for (let i = 0; i < 100; i++) {
      lengths.learn('short', 12, false);
      lengths.learn('long', 700, false);
    }
    const short = lengths.expect('short', 1000);
    const long = lengths.expect('long', 1000);
    expect(short.mean).toBeGreaterThan(8);
    expect(short.mean).toBeLessThan(20);
    expect(long.mean).toBeGreaterThan(512);
    expect(long.mean).toBeLessThan(1000);
    expect(short.mean + 2 * short.deviation).toBeLessThan(100);
  });

  it('a cut answer says at least, not exactly', () => {
    const lengths = new AnswerLengths(4);
    for (let i = 0; i < 200; i++) lengths.learn('a', 16, true);
    expect(lengths.expect('a', 16).mean).toBeCloseTo(16, 5);
    // Nothing was ever seen to stop, so a larger limit is expected to be used up.
    expect(lengths.expect('a', 2000)).toEqual({ mean: 2000, deviation: 0 });
  });

  it('recovers the mean of lengths of which half are cut', () => {
    const lengths = new AnswerLengths(4);
    const rng = createRng(1);
    const cut = 64;
    for (let i = 0; i < 2000; i++) {
      // Exponential with mean 90: 51 % are cut at 64 while others run free.
      const length = Math.max(1, Math.round(-90 * Math.log(1 - rng.next())));
      if (i % 2 === 0) lengths.learn('a', Math.min(cut, length), length >= cut);
      else lengths.learn('a', length, false);
    }
    const { mean } = lengths.expect('a', 4096);
    expect(mean).toBeGreaterThan(60);
    expect(mean).toBeLessThan(140);
  });

  it('never expect more than the limit, also with its deviation', () => {
    const lengths = new AnswerLengths(4);
    const rng = createRng(2);
    for (let i = 0; i < 300; i++) {
      lengths.learn('a', 1 + rng.below(3000), rng.next() < 0.3);
      const tokensMax = 1 + rng.below(2000);
      const { mean, deviation } = lengths.expect('a', tokensMax);
      expect(mean).toBeGreaterThanOrEqual(1);
      expect(mean + 2 * deviation).toBeLessThanOrEqual(tokensMax + 1e-9);
      expect(deviation).toBeGreaterThanOrEqual(0);
    }
  });

  it('forget old answers', () => {
    const lengths = new AnswerLengths(4);
    for (let i = 0; i < 500; i++) lengths.learn('a', 900, false);
    for (let i = 0; i < 300; i++) lengths.learn('a', 12, false);
    expect(lengths.expect('a', 1000).mean).toBeLessThan(30);
  });

  it('are kept for a bounded number of adapters, the least used going first, and survive a restart', () => {
    const lengths = new AnswerLengths(2);
    for (const name of ['a', 'b', 'c']) {
      for (let i = 0; i < 50; i++) lengths.learn(name, 10, false);
    }
    expect(lengths.expect('a', 500).mean).toBe(500);
    const saved = savedCurves.parse(JSON.parse(JSON.stringify(lengths.save())));
    expect(saved.map(([name]) => name).sort()).toEqual(['b', 'c']);
    const restored = new AnswerLengths(2);
    restored.restore(saved);
    expect(restored.expect('c', 500)).toEqual(lengths.expect('c', 500));
    restored.learn('d', 10, false);
    expect(restored.expect('b', 500).mean).toBe(500);
    expect(restored.expect('c', 500).mean).toBeLessThan(500);
  });
});
