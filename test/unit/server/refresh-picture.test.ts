import { describe, expect, it } from 'vitest';
import type { Verdict } from '../../../src/jobs/refresh-gate.ts';
import { drawReport } from '../../../src/server/refresh-picture.ts';

const verdict: Verdict = {
  isPromoted: false,
  reasons: ['rank 2 is <worse> & bad'],
  heldOut: 12,
  ranks: [
    { rank: 1, before: 3, after: 2.5 },
    { rank: 2, before: 2, after: 2.25 },
    { rank: 4, before: 2, after: 1 },
  ],
  gain: { v1: -0.125, v2: 0.1, error: 0.05 },
  guard: { before: 4, after: 4.5 },
};

describe('the report of a refresh', () => {
  it('has every rank before and after, the curves and the reasons', () => {
    const page = drawReport('acme/x, ftjob-1', verdict);
    expect(page).toContain('<td>2</td><td>2.0000</td><td>2.2500</td><td>0.2500</td>');
    expect(page).toContain('<td>1</td><td>3.0000</td><td>2.5000</td><td>-0.5000</td>');
    expect(page).toContain('Discarded.');
    expect(page).toContain('rank 2 is &#60;worse&#62; &#38; bad');
    expect(page).toContain('-0.1250 ± 0.0500 nats');
    expect(page).toContain('12 examples');
    // Ranks 1, 2 and 4 are equally far apart; 3 nats at the top, 1 at the bottom.
    expect(page).toContain('points="56.0,16.0 276.0,122.0 496.0,122.0"');
    expect(page).toContain('points="56.0,69.0 276.0,95.5 496.0,228.0"');
    expect(page).not.toMatch(/<script|http(?!:\/\/www\.w3\.org\/2000\/svg)/);
  });

  it('is of one rank, equal losses, or nothing that could be judged', () => {
    const one = { ...verdict, ranks: [{ rank: 1, before: 2, after: 2 }] };
    expect(drawReport('x', one)).not.toContain('NaN');
    const none = { ...verdict, ranks: [], gain: null, guard: null };
    expect(drawReport('x', none)).not.toContain('<svg');
  });
});
