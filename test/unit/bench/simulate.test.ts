import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, describe, expect, it } from 'vitest';
import { benchSimulate } from '../../../bench/simulate.ts';
import { formatTrace } from '../../support/simulator/trace-file.ts';
import { createTraffic, smallTiers } from '../../support/simulator/traffic.ts';

const tiny = {
  ...{ seeds: 1, seconds: 20, loads: [0.8], hindsightRounds: 2, backlog: 20, manySeconds: 1.2 },
  ...{ foreseen: 3, foreseenSeconds: 8, futures: 3 },
};

describe('bench simulate', () => {
  const folder = mkdtempSync(join(tmpdir(), 'simulate-'));
  afterAll(() => rmSync(folder, { recursive: true, force: true }));

  it('reports a number for every load, contestant and figure', async () => {
    const { figures, series } = await benchSimulate({ tracePath: null }, tiny);
    expect(Object.values(figures).filter((one) => !Number.isFinite(one))).toEqual([]);
    expect(Object.keys(figures)).toEqual(
      expect.arrayContaining([
        'gap_closed_guarded_80',
        'met_share_largest_80',
        'error_median_guarded_80',
        'error_floor_p90_80',
        'error_beside_floor_p90_80',
        'minute_1000_cpu_s',
      ]),
    );
    expect(series['80 hindsight: quality']!.median).toBeGreaterThanOrEqual(
      series['80 rank 64: quality']!.median,
    );
  });

  it('replays a trace: the same figures each time', async () => {
    const tracePath = join(folder, 'trace.jsonl');
    const arrivals = createTraffic({
      ...{ seed: 1, seconds: 20, perSecond: 2, shape: 'bursts', adapters: 3, zipf: 1, tenants: 2 },
      ...{ tiers: smallTiers, promptTokens: [4, 40], tokensMax: [8, 16], endsEarly: 0.5 },
    });
    writeFileSync(tracePath, formatTrace(arrivals));
    const first = await benchSimulate({ tracePath }, tiny);
    expect(Object.keys(first.figures)).toContain('gap_closed_guarded_trace');
    expect(await benchSimulate({ tracePath }, tiny)).toEqual(first);
  });
});
