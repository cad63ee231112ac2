import { mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, describe, expect, it } from 'vitest';
import { GgmlKernels } from '../../../src/kernels/ggml/ggml-kernels.ts';
import {
  explainChoice,
  fastestWay,
  keptTimes,
  timeRatio,
  timeWays,
  type WayTimes,
} from '../../../src/model/weight-choice.ts';

const folder = mkdtempSync(join(tmpdir(), 'rankgate-ways-'));
afterAll(() => rmSync(folder, { recursive: true }));

const times: WayTimes = {
  q4_1: [
    { way: 'library', ms: [2, 16, 64] },
    { way: 'int8', ms: [1, 2, 8] },
    { way: 'f32', ms: [4, 8, 32] },
  ],
  f16: [{ way: 'f32', ms: [1, 1, 1] }],
};

describe('the choice', () => {
  it('is the least geometric mean over the row counts, not the least sum', () => {
    const [slowAlone, slowInPanels] = [
      { way: 'f32', ms: [4, 4, 4] },
      { way: 'int8', ms: [1, 2, 16] }, // mean 3.17, sum 19
    ] as const;
    expect(fastestWay([slowAlone, slowInPanels])).toBe('int8');
    expect(timeRatio(slowAlone, slowInPanels)).toBeCloseTo(2 ** (1 / 3), 12);
  });

  it('is the first of equals, in whatever order they stand', () => {
    const [a, b] = [
      { way: 'f32', ms: [1, 4, 4] },
      { way: 'int16', ms: [4, 1, 4] },
    ] as const;
    expect(fastestWay([a, b])).toBe('f32');
    expect(fastestWay([b, a])).toBe('int16');
  });

  it('is explained by what the others would take', () => {
    expect(explainChoice(times)).toBe('q4_1 int8 (library 5.04 ×, f32 4.00 ×); f16 f32');
    expect(explainChoice({})).toBe('');
  });
});

describe('times', () => {
  it('are measured once for what they depend on, and again when that is another', async () => {
    let measured = 0;
    const measure = async (): Promise<WayTimes> => {
      measured++;
      return times;
    };
    expect(await keptTimes(folder, ['cpu', 'q4_1'], measure)).toEqual(times);
    expect(await keptTimes(folder, ['cpu', 'q4_1'], measure)).toEqual(times);
    expect(measured).toBe(1);
    await keptTimes(folder, ['other cpu', 'q4_1'], measure);
    await keptTimes(folder, ['cpu,q4_1'], measure);
    expect(measured).toBe(3);
    await keptTimes(null, ['cpu', 'q4_1'], measure);
    expect(measured).toBe(4);
  });

  it('that are damaged are measured again and replaced', async () => {
    const own = mkdtempSync(join(folder, 'damaged-'));
    const measure = (): Promise<WayTimes> => Promise.resolve(times);
    await keptTimes(own, [], measure);
    const file = join(own, readdirSync(own)[0]!);
    const whole = readFileSync(file, 'utf8');
    for (const bad of [
      '',
      '{',
      whole.replace('"int8"', '"int2"'),
      whole.replace('[1,2,8]', '[]'),
    ]) {
      writeFileSync(file, bad);
      expect(await keptTimes(own, [], measure)).toEqual(times);
      expect(readFileSync(file, 'utf8')).toBe(whole);
    }
    expect(readdirSync(own)).toHaveLength(1);
  });

  it('are of the ways that this machine has for a type', () => {
    using kernels = new GgmlKernels({ threads: 1 });
    const ways = ['int8', 'f32', 'library'] as const;
    const named = (type: 'q4_1' | 'q6_k'): string[] =>
      timeWays(kernels, type, ways).map(({ way }) => way);
    expect(named('q4_1')).toEqual(ways);
    expect(named('q6_k')).toEqual(['f32', 'library']);
    for (const { ms } of timeWays(kernels, 'q4_0', ['int16'])) {
      for (const each of ms) expect(each).toBeGreaterThan(0);
    }
  });
});
