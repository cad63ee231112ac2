import { expect, it } from 'vitest';
import { leastShare, Pacer } from '../../../src/trainer/pacer.ts';
import { createManualClock } from '../../support/manual-clock.ts';

/** Computes for so long, with so much CPU time, and then breathes; `advance` tells null until the breath is over. */
function compute(ms: number, share: number, cpuMs = ms) {
  const clock = createManualClock();
  let usedMs = 7;
  const pacer = new Pacer({ ...clock, cpuMs: () => usedMs });
  pacer.setShare(share);
  let answer: string | null = null;
  const piece = (wallMs: number, ownMs: number): void => {
    clock.advance(wallMs);
    usedMs += ownMs;
    answer = null;
    void pacer.breathe().then((wish) => {
      answer = wish;
    });
  };
  piece(ms, cpuMs);
  const advance = async (restMs: number): Promise<string | null> => {
    clock.advance(restMs);
    for (let i = 0; i < 10; i++) await Promise.resolve();
    return answer;
  };
  return { clock, pacer, piece, advance };
}

it('only takes a turn when it may compute all the time', async () => {
  const { advance, clock } = compute(500, 1);
  expect(await advance(0)).toBe('go');
  expect(clock.pending()).toBe(0);
});

it('rests three times as long as it computed at a quarter, however many threads it computed with', async () => {
  for (const cpuMs of [500, 1000, 4000]) {
    const { advance } = compute(500, 0.25, cpuMs);
    expect(await advance(0)).toBeNull();
    expect(await advance(1499)).toBeNull();
    expect(await advance(1)).toBe('go');
  }
});

it('rests while it may not compute, but has its least share of a core’s time after all', async () => {
  const { advance, piece } = compute(500, 0);
  expect(await advance(0)).toBeNull();
  expect(await advance(500 / leastShare - 500 - 1)).toBeNull();
  expect(await advance(1)).toBe('go');
  // A piece that waited for the cores nearly all the time owes only what it used.
  piece(10_000, 300);
  expect(await advance(0)).toBeNull();
  expect(await advance(300 / leastShare - 10_000 - 1)).toBeNull();
  expect(await advance(1)).toBe('go');
  piece(60_000, 300);
  expect(await advance(0)).toBe('go');
});

it.each([0, 0.001, 0.25])(
  'ends a job of 100 pieces in fifty times its CPU time at share %d',
  async (share) => {
    const { advance, piece, clock } = compute(900, share, 200);
    const startMs = clock.nowMs() - 900;
    for (let i = 1; i < 100; i++) {
      while ((await advance(100)) === null);
      piece(900, 200);
    }
    const ms = clock.nowMs() - startMs;
    const rounding = 100 * 100; // this test looks at it every 100 ms
    expect(ms).toBeLessThanOrEqual((100 * 200) / leastShare + rounding);
    expect(ms).toBeGreaterThan(share === 0.25 ? 100 * 900 : 98 * (200 / leastShare));
  },
);

it('goes on at once when it may again', async () => {
  const { advance, pacer } = compute(10_000, 0);
  for (let i = 0; i < 5; i++) expect(await advance(60_000)).toBeNull();
  pacer.setShare(1);
  expect(await advance(0)).toBe('go');
});

it('goes by the share of now, not by that of when the rest began', async () => {
  const { advance, pacer } = compute(1000, 0.01);
  expect(await advance(0)).toBeNull();
  expect(await advance(2000)).toBeNull();
  pacer.setShare(0.5); // a second is owed, two have passed
  expect(await advance(0)).toBe('go');
});

it('counts what is computed from the end of the last rest', async () => {
  const { advance, piece } = compute(100, 0.5);
  expect(await advance(0)).toBeNull();
  expect(await advance(100)).toBe('go');
  piece(40, 40);
  expect(await advance(39)).toBeNull();
  expect(await advance(1)).toBe('go');
});

it('stops in the middle of a rest', async () => {
  const { advance, pacer, clock, piece } = compute(1000, 0);
  expect(await advance(0)).toBeNull();
  pacer.stop();
  expect(await advance(0)).toBe('stop');
  expect(clock.pending()).toBe(0);
  piece(0, 0);
  expect(await advance(0)).toBe('stop');
});
