import { describe, expect, it } from 'vitest';
import {
  type Learnable,
  type ScheduleSettings,
  type Timing,
  whyNotNow,
  whyTooLittle,
} from '../../../src/jobs/refresh-schedule.ts';

const settings: ScheduleSettings = { everyS: 3600, freshMin: 10, trainingMin: 20, heldOutMin: 8 };
const ready: Timing & Learnable = {
  nowS: 10_000,
  lastS: 5000,
  fresh: 10,
  training: 20,
  heldOut: 8,
  isRunning: false,
};
const whyNot = (facts: typeof ready, by: ScheduleSettings, asked: boolean): string | null =>
  whyNotNow(facts, by, asked) ?? whyTooLittle(facts, by, asked);

describe('the refresh schedule', () => {
  it('starts when all is there, and the first time at once', () => {
    expect(whyNot(ready, settings, false)).toBeNull();
    expect(whyNot({ ...ready, lastS: null }, settings, false)).toBeNull();
  });

  it.each([
    ['another runs', { isRunning: true }, /under way/, true],
    ['there is too little to train on', { training: 19 }, /19 accepted examples to train/, true],
    ['there is too little to judge by', { heldOut: 7 }, /7 accepted examples to judge/, true],
    ['nothing is new', { fresh: 9 }, /9 new accepted/, false],
    ['it is too early', { lastS: 9000 }, /^1000 s since the last: at least 3600/, false],
  ])('does not when %s', (_, over, why, alsoAsked) => {
    expect(whyNot({ ...ready, ...over }, settings, false)).toMatch(why);
    const asked = whyNot({ ...ready, ...over }, settings, true);
    if (alsoAsked) expect(asked).toMatch(why);
    else expect(asked).toBeNull();
  });

  it('is not held up by a clock that was set back', () => {
    expect(whyNot({ ...ready, nowS: 100 }, settings, false)).toBeNull();
  });
});
