// A sample of all that was captured of an adapter, by Vitter's algorithm R ("Random sampling with a reservoir", ACM TOMS 11,
// 1985): once it is full, item n stays with probability places / n, in the place of any other. Draw n depends on the seed
// and n alone, so a process that starts again goes on as it would have. Pure.
//
// What gets too old makes room, and newer items take it first: the sample leans to the present until it is full again.

import { createRandom } from '../adapters/families/seeded-random.ts';

export interface Reservoir {
  /** Items that the kept ones stand for. */
  readonly seen: number;
  readonly kept: number;
}

/** `add`: there is room. */
export type Placing = 'add' | 'drop' | { readonly replace: number };

const seenMax = 2 ** 32 - 1; // what `below` draws from

/** Where the next item goes; places are counted from 0. */
export function placeNext({ seen, kept }: Reservoir, places: number, seed: bigint): Placing {
  if (kept < places) return 'add';
  const n = Math.min(seen + 1, seenMax);
  const replace = createRandom(seed, [n, 0]).below(n);
  return replace < places ? { replace } : 'drop';
}

/** What is left of it stands for the same share of what it stood for. */
export function withoutOld({ seen, kept }: Reservoir, gone: number): Reservoir {
  const left = kept - gone;
  return { seen: kept === 0 ? 0 : Math.max(left, Math.round((seen * left) / kept)), kept: left };
}

/** By a hash, so for ever: uniform in [0, 1) below the share. */
export function isHeldOut(sha256: Buffer, share: number): boolean {
  return sha256.readUIntBE(0, 6) / 2 ** 48 < share;
}
