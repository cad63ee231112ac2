import { describe, expect, it } from 'vitest';
import { PredictionErrors } from '../../../src/router/prediction-errors.ts';

describe('prediction errors', () => {
  it('have a median and a p90 over the last answers, of all and of each adapter', () => {
    const errors = new PredictionErrors();
    expect([errors.ofAll(), errors.ofEach()]).toEqual([[], []]);
    for (let percent = 1; percent <= 10; percent++) errors.add('a', 100, 100 - percent);
    errors.add(null, 100, 300);
    expect(errors.ofAll()).toEqual([
      { quantile: 0.5, error: expect.closeTo(0.06) },
      { quantile: 0.9, error: expect.closeTo(0.1) },
    ]);
    expect(errors.ofEach()).toEqual([
      [
        'a',
        [
          { quantile: 0.5, error: expect.closeTo(0.05) },
          { quantile: 0.9, error: expect.closeTo(0.09) },
        ],
      ],
    ]);
  });

  it('forget what is old: 512 answers of all, 128 of one adapter, 128 adapters', () => {
    const errors = new PredictionErrors();
    for (let i = 0; i < 600; i++) errors.add('a', 100, i < 88 ? 900 : 110);
    expect(errors.ofAll().map(({ error }) => error)).toEqual([
      expect.closeTo(0.1),
      expect.closeTo(0.1),
    ]);
    for (let i = 0; i < 128; i++) errors.add('a', 100, 120);
    expect(errors.ofEach()[0]![1][0]!.error).toBeCloseTo(0.2);
    for (let i = 0; i < 1000; i++) errors.add(`b${i}`, 100, 100);
    expect(errors.ofEach()).toHaveLength(128);
    expect(errors.ofEach()[0]![0]).toBe('b999');
  });

  it('take nothing that is no number', () => {
    const errors = new PredictionErrors();
    errors.add('a', 0, 1);
    errors.add('a', Number.NaN, 1);
    errors.add('a', 0, 0);
    expect(errors.ofAll()).toEqual([]);
  });
});
