// The task of algorithms.md section 6 that more ranks do not help with: which of three maps applies is the token's to say.

import { times, transposedTimes } from '../../src/adapters/families/matrices.ts';
import type { Random } from '../../src/adapters/families/seeded-random.ts';
import type { Columns } from '../../src/adapters/orthogonal.ts';
import { normalColumns } from './family-site.ts';

export interface Batch {
  readonly x: Columns; // [in, T]
  /** What a module must add to the base. */
  readonly target: Columns; // [out, T]
}

/** target = U·M_g·V·x, g the largest of three directions of V·x; in and out are 16. */
export function threeRegimes(random: Random): (source: Random, count: number) => Batch {
  const v = normalColumns(random, 4, 16, 1 / 4);
  const u = normalColumns(random, 4, 16, 1 / 4);
  const maps = Array.from({ length: 3 }, () => normalColumns(random, 4, 4));
  const directions = normalColumns(random, 3, 4);
  return (source, count) => {
    const x = normalColumns(source, count, 16);
    const h = transposedTimes(v, x); // [4, T]
    const scores = transposedTimes(directions, h); // [3, T]
    const images = maps.map((m) => times(m, h));
    const mixed = { ...h, data: new Float64Array(h.data.length) };
    for (let t = 0; t < count; t++) {
      const column = Array.from(scores.data.subarray(3 * t, 3 * t + 3));
      const regime = column.indexOf(Math.max(...column));
      mixed.data.set(images[regime]!.data.subarray(4 * t, 4 * t + 4), 4 * t);
    }
    return { x, target: times(u, mixed) };
  };
}
