// The swap oracle at any length: a minute in the normal tier, ten in the nightly one.

import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { type Heard, IdleOracle } from './idle-oracle.ts';
import { openTiny, tinyPath } from './open-test-decoder.ts';
import { openStormGateway, type StormGateway, type StormReport, storm } from './swap-storm.ts';

/** Nats below the best token of an idle run. Covers the last bits that differ with a batch's shape; the planted faults below
 *  must miss it by ten times. */
const epsilon = 0.02;

interface StormTier {
  readonly seconds: number;
  readonly growthMax: number;
}

/** `growthMax`: of the resident set from the middle to the end; the first minutes also fill heaps and caches. */
export function swapOracleSuite({ seconds, growthMax }: StormTier): void {
  describe(`${seconds} s of swaps, as many as two cores give and at most 100 a second`, () => {
    let opened: StormGateway;
    let oracle: IdleOracle;
    let report: StormReport;

    beforeAll(
      async () => {
        opened = await openStormGateway();
        const generations = [...opened.generations.values()].flat();
        const { decoder } = await openTiny({ mode: 'faithful', pages: 1 + 2 * generations.length });
        const blobs = join(opened.gateway.dataDir, 'blobs');
        oracle = IdleOracle.open(decoder, tinyPath, blobs, generations);
        report = await storm(opened, { seconds, seed: 1 });
      },
      1000 * (seconds + 120),
    );

    afterAll(async () => {
      oracle?.[Symbol.dispose]();
      await opened?.[Symbol.asyncDispose]();
    });

    it('was a storm: changes, streams of many generations, base rows, cancels', () => {
      const { heard, changes, changesPerSecond, cancelled, notFound } = report;
      console.log(
        `${changes} changes (${changesPerSecond.toFixed(0)}/s), ${heard.length} streams, ${cancelled} cancelled, ${notFound} found no such name`,
      );
      // 27 were seen beside the streams on two cores, 10 beside other load, and 100 are wanted: docs/log.md.
      expect(changesPerSecond).toBeGreaterThan(4);
      expect(heard.length).toBeGreaterThan(4 * seconds);
      expect(cancelled).toBeGreaterThan(seconds / 8);
      expect(heard.filter(({ generation }) => generation === null).length).toBeGreaterThan(seconds);
      expect(new Set(heard.map(({ generation }) => generation)).size).toBeGreaterThan(20);
    });

    it('nothing failed', () => {
      expect(report.failures).toEqual([]);
    });

    it(`every stream is its own generation's answer, token by token`, () => {
      const gaps = report.heard.map((heard) => oracle.worstGap(heard));
      const mismatches = report.heard.filter((_, i) => gaps[i]! > epsilon);
      console.log(`worst gap of ${gaps.length} streams: ${Math.max(...gaps).toFixed(4)} nats`);
      expect(mismatches).toEqual([]);
    }, 600_000);

    it('a wrong generation, a wrong rank, a missing adapter and a foreign one would have been seen', () => {
      const all = [...opened.generations.values()];
      const other = ({ generation }: Heard) => {
        const family = all.find((one) => one.includes(generation!))!;
        return { generation: family.find((one) => one !== generation)!, rank: 4 };
      };
      const tuned = report.heard.filter(({ generation }) => generation !== null).slice(0, 60);
      const base = report.heard.filter(({ generation }) => generation === null).slice(0, 60);
      const faults: Record<string, readonly number[]> = {
        generation: tuned
          .filter(({ rank }) => rank === 4)
          .map((heard) => oracle.worstGap(heard, other(heard))),
        missing: tuned.map((heard) => oracle.worstGap(heard, { generation: null })),
        rank: tuned
          .filter(({ rank }) => rank >= 4)
          .map((heard) => oracle.worstGap(heard, { rank: 2 })),
        foreign: base.map((heard) => oracle.worstGap(heard, { generation: all[0]![0]!, rank: 16 })),
      };
      for (const [fault, gaps] of Object.entries(faults)) {
        const caught = gaps.filter((gap) => gap > 10 * epsilon).length / gaps.length;
        console.log(`${fault}: caught in ${(100 * caught).toFixed(0)} % of ${gaps.length} streams`);
        expect(caught, fault).toBeGreaterThan(0.5);
      }
    }, 120_000);

    it('leases are back to zero, and memory is flat', () => {
      expect(report.leases.every((count) => count === 0)).toBe(true);
      expect(report.uses.every((count) => count === 0)).toBe(true);
      // The first half grows caches and code; then the mean of a fifth before the middle against that of the last.
      const { rssMb } = report;
      const fifth = Math.max(1, Math.floor(rssMb.length / 5));
      const mean = (values: readonly number[]): number =>
        values.reduce((sum, value) => sum + value, 0) / values.length;
      const middle = Math.floor(rssMb.length / 2);
      const [before, after] = [
        mean(rssMb.slice(middle - fifth, middle)),
        mean(rssMb.slice(-fifth)),
      ];
      console.log(`resident set ${before.toFixed(0)} MB, then ${after.toFixed(0)} MB`);
      expect(after).toBeLessThan(growthMax * before);
    });
  });
}
