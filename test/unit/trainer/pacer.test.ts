import { expect, it } from 'vitest';
import { Pacer } from '../../../src/trainer/pacer.ts';
import { createManualClock } from '../../support/manual-clock.ts';

/** Computes for so long and then breathes; `rested` is null until the breath is over. */
function compute(ms: number, share: number) {
  const clock = createManualClock();
  const pacer = new Pacer(clock);
  pacer.setShare(share);
  clock.advance(ms);
  let answer: string | null = null;
  const breath = pacer.breathe().then((wish) => {
    answer = wish;
  });
  const advance = async (restMs: number): Promise<string | null> => {
    clock.advance(restMs);
    for (let i = 0; i < 10; i++) await Promise.resolve();
    return answer;
  };
  return { clock, pacer, breath, advance };
}

it('only takes a turn when it may compute all the time', async () => {
  const { advance, clock } = compute(500, 1);
  expect(await advance(0)).toBe('go');
  expect(clock.pending()).toBe(0);
});

it('rests three times as long as it computed at a quarter', async () => {
  const { advance } = compute(500, 0.25);
  expect(await advance(0)).toBeNull();
  expect(await advance(1499)).toBeNull();
  expect(await advance(1)).toBe('go');
});

it('rests for as long as it may not compute, and not a moment longer', async () => {
  const { advance, pacer } = compute(0, 0);
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
  const { advance, clock, pacer } = compute(100, 0.5);
  expect(await advance(0)).toBeNull();
  expect(await advance(100)).toBe('go');
  clock.advance(40);
  let isOver = false;
  const breath = pacer.breathe().then(() => {
    isOver = true;
  });
  await advance(0);
  await advance(39);
  expect(isOver).toBe(false);
  await advance(1);
  await breath;
});

it('stops in the middle of a rest', async () => {
  const { advance, pacer, clock } = compute(1000, 0);
  expect(await advance(0)).toBeNull();
  pacer.stop();
  expect(await advance(0)).toBe('stop');
  expect(clock.pending()).toBe(0);
  const again = pacer.breathe();
  await advance(0);
  expect(await again).toBe('stop');
});
