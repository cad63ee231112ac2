import { describe, expect, it } from 'vitest';
import type { Job, JobResult } from '../../../bench/job.ts';
import {
  agreement,
  idleShareMax,
  median,
  probeDistance,
  runRounds,
  seriesOf,
} from '../../../bench/measure.ts';
import type { SideProcess } from '../../../bench/side-process.ts';

const result = (ids: number[][], rest: Partial<JobResult> = {}): JobResult => ({
  totalMs: 100,
  decodeMs: 90,
  ttftMs: [10],
  stepMs: [],
  cpuMs: 100,
  idleCpuMs: 0,
  ids,
  probes: [],
  samples: {},
  ...rest,
});

const job: Job = {
  kind: 'generate',
  prompts: [[1]],
  newTokens: 2,
  adapters: [null],
  order: 'round-robin',
};

/** Answers like a child process and writes down when it was asked. */
function fakeSide(name: string, asked: string[], ids: number[]): SideProcess {
  return {
    run: () => {
      asked.push(name);
      return Promise.resolve(result([ids]));
    },
  } as unknown as SideProcess;
}

describe('bench measure', () => {
  it('takes the middle value, or the mean of the two in the middle', () => {
    expect(median([5, 1, 3])).toBe(3);
    expect(median([4, 1, 3, 2])).toBe(2.5);
    expect(() => median([])).toThrow(RangeError);
  });

  it('gives spread as a share of the median', () => {
    expect(seriesOf('ms', [10, 12, 8])).toMatchObject({ median: 10, min: 8, max: 12, spread: 0.4 });
  });

  it('counts equal tokens up to the first difference only', () => {
    const a = result([
      [1, 2, 3, 4],
      [5, 6],
    ]);
    expect(agreement(a, a)).toBe(1);
    expect(
      agreement(
        a,
        result([
          [1, 9, 3, 4],
          [5, 6],
        ]),
      ),
    ).toBe(0.5);
  });

  it('tells the same adapter from another one by the first logits', () => {
    const [a, near, far] = [
      [1, 2],
      [1.1, 2],
      [4, -2],
    ].map((probe) => result([], { probes: [probe] }));
    expect(probeDistance(a!, near!, far!)).toBeCloseTo(0.02, 6);
    expect(probeDistance(a!, far!, far!)).toBe(1);
  });

  it('notices a side that computes while another one is measured', () => {
    const quiet = [result([]), result([], { idleCpuMs: 1 })];
    const spinning = [result([]), result([], { idleCpuMs: 150 })];
    expect(
      idleShareMax(
        new Map([
          ['a', quiet],
          ['b', quiet],
        ]),
      ),
    ).toBeLessThan(0.01);
    expect(
      idleShareMax(
        new Map([
          ['a', quiet],
          ['b', spinning],
        ]),
      ),
    ).toBe(0.75);
  });

  it('runs every side once a round, rotates who begins, and throws the first run away', async () => {
    const asked: string[] = [];
    const entrants = ['a', 'b'].map((name) => ({ name, side: fakeSide(name, asked, [1, 2]), job }));
    const results = await runRounds(entrants, 3);
    expect(asked.join('')).toBe('ab' + 'ab' + 'ba' + 'ab');
    expect([...results.values()].map((all) => all.length)).toEqual([3, 3]);
  });

  it('refuses the result of a side that stopped early', async () => {
    const entrants = [{ name: 'short', side: fakeSide('short', [], [1]), job }];
    await expect(runRounds(entrants, 1)).rejects.toThrow('made 1 tokens, want 2');
  });
});
