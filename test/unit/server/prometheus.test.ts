import { describe, expect, it } from 'vitest';
import { Page } from '../../../src/server/prometheus.ts';

describe('Page', () => {
  it('renders counters, gauges and cumulative histograms', () => {
    const page = new Page();
    const counter = page.counter('c_total', 'A counter.');
    page.gauge('g', 'A gauge.', () => [[{ a: 'x"\\\n' }, 1.5]]);
    const histogram = page.histogram('h', 'A histogram.', [1, 2], { m: 'y' });
    counter({ k: 'a' });
    counter({ k: 'a' }, 2);
    counter({ k: 'b' }, 5);
    for (const value of [0.5, 1, 1.5, 9, Number.NaN]) histogram(value);
    expect(page.render()).toBe(
      [
        '# HELP c_total A counter.',
        '# TYPE c_total counter',
        'c_total{k="a"} 3',
        'c_total{k="b"} 5',
        '# HELP g A gauge.',
        '# TYPE g gauge',
        'g{a="x\\"\\\\\\n"} 1.5',
        '# HELP h A histogram.',
        '# TYPE h histogram',
        'h_bucket{m="y",le="1"} 2',
        'h_bucket{m="y",le="2"} 3',
        'h_bucket{m="y",le="+Inf"} 4',
        'h_sum{m="y"} 12',
        'h_count{m="y"} 4',
        '',
      ].join('\n'),
    );
  });

  it('stops adding series at its limit, and goes on counting the known ones', () => {
    const page = new Page();
    const counter = page.counter('c', 'A counter.');
    for (let i = 0; i < 2000; i++) counter({ i: String(i) });
    counter({ i: '0' });
    const lines = page
      .render()
      .split('\n')
      .filter((line) => line.startsWith('c{'));
    expect(lines).toHaveLength(512);
    expect(lines[0]).toBe('c{i="0"} 2');
  });
});
