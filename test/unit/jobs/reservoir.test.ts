import { createHash } from 'node:crypto';
import { describe, expect, it } from 'vitest';
import { isHeldOut, placeNext, type Reservoir, withoutOld } from '../../../src/jobs/reservoir.ts';

/** Items that are kept of 0, 1, … count − 1. */
function fill(places: number, count: number, seed: bigint): number[] {
  const kept: number[] = [];
  for (let item = 0; item < count; item++) {
    const placing = placeNext({ seen: item, kept: kept.length }, places, seed);
    if (placing === 'add') kept.push(item);
    else if (placing !== 'drop') kept[placing.replace] = item;
  }
  return kept;
}

describe('reservoir', () => {
  it('keeps all while there is room, then so many', () => {
    expect(fill(8, 8, 1n)).toEqual([0, 1, 2, 3, 4, 5, 6, 7]);
    expect(new Set(fill(8, 1000, 1n)).size).toBe(8);
  });

  it('keeps every item equally often', () => {
    const [places, count, seeds] = [5, 40, 4000];
    const times = new Array<number>(count).fill(0);
    for (let seed = 0; seed < seeds; seed++) {
      for (const item of fill(places, count, BigInt(seed))) times[item]! += 1;
    }
    const expected = (seeds * places) / count;
    const chiSquare = times.reduce((sum, one) => sum + (one - expected) ** 2 / expected, 0);
    // 39 degrees of freedom: above 72.1 once in a thousand draws of seeds; these are fixed.
    expect(chiSquare).toBeLessThan(72.1);
  });

  it('goes on after a restart as it would have', () => {
    const state: Reservoir = { seen: 1234, kept: 8 };
    expect(placeNext(state, 8, 7n)).toEqual(placeNext({ ...state }, 8, 7n));
    const places = Array.from({ length: 50 }, (_, i) => placeNext({ seen: 9 + i, kept: 8 }, 8, 7n));
    expect(new Set(places.map((place) => JSON.stringify(place))).size).toBeGreaterThan(5);
  });

  it('forgets what the old ones stood for', () => {
    expect(withoutOld({ seen: 100, kept: 10 }, 5)).toEqual({ seen: 50, kept: 5 });
    expect(withoutOld({ seen: 10, kept: 10 }, 10)).toEqual({ seen: 0, kept: 0 });
    expect(withoutOld({ seen: 0, kept: 0 }, 0)).toEqual({ seen: 0, kept: 0 });
  });

  it('has places for more items than can be counted', () => {
    expect(placeNext({ seen: 2 ** 40, kept: 8 }, 8, 1n)).toBe('drop');
  });

  it('holds out a share by hash', () => {
    const hashes = Array.from({ length: 4000 }, (_, i) =>
      createHash('sha256').update(String(i)).digest(),
    );
    const share = hashes.filter((hash) => isHeldOut(hash, 0.25)).length / hashes.length;
    expect(Math.abs(share - 0.25)).toBeLessThan(0.03);
    expect(hashes.some((hash) => isHeldOut(hash, 0))).toBe(false);
    expect(hashes.every((hash) => isHeldOut(hash, 1))).toBe(true);
  });
});
