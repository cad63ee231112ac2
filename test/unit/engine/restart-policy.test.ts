import { describe, expect, it } from 'vitest';
import { RestartPolicy } from '../../../src/engine/restart-policy.ts';

const delays = (policy: RestartPolicy, times: readonly number[]) =>
  times.map((nowMs) => policy.died(nowMs));

describe('RestartPolicy', () => {
  it('doubles the pause, up to the most, and starts again after a token', () => {
    const policy = new RestartPolicy({ backoffMsMin: 100, backoffMsMax: 500 });
    expect(delays(policy, [0, 1, 2, 3]).map((one) => one.delayMs)).toEqual([100, 200, 400, 500]);
    policy.produced();
    expect(policy.died(4)).toEqual({ delayMs: 100, isLoop: false });
  });

  it('calls five deaths within a minute a loop, and slower ones not', () => {
    const policy = new RestartPolicy({ backoffMsMin: 1, backoffMsMax: 900 });
    const quick = delays(policy, [0, 10_000, 20_000, 30_000, 59_999]);
    expect(quick.map((one) => one.isLoop)).toEqual([false, false, false, false, true]);
    expect(quick[4]!.delayMs).toBe(900);
    const slow = new RestartPolicy({ backoffMsMin: 1, backoffMsMax: 900 });
    const spread = delays(slow, [0, 15_000, 30_000, 45_000, 60_000, 75_000]);
    expect(spread.some((one) => one.isLoop)).toBe(false);
  });
});
