// What a request's adapters are to the engine: the residents that they need, each at its rank.

import { blendKey } from '../adapters/blend-key.ts';
import type { ResidentKey } from '../adapters/residency.ts';
import type { AdapterPart, AdapterUse } from './messages.ts';

/** The parts, the system adapter last. */
export function allParts({ parts, system }: AdapterUse): readonly AdapterPart[] {
  return system === null ? parts : [...parts, system];
}

/** One resident of a use at a rank: a part, or what parts were merged into. */
export interface Loadable {
  readonly key: ResidentKey;
  /** Infinity: all that it has. */
  readonly rank: number;
  readonly weight: number;
  /** Its rank is the sequence's, as far as it has that many. */
  readonly isGoverned: boolean;
}

export function loadables(use: AdapterUse): readonly Loadable[] {
  const { parts, system, merge, density } = use;
  const single = ({ generation: key, rank, weight }: AdapterPart): Loadable => ({
    ...{ key, rank, weight },
    isGoverned: false,
  });
  if (merge === 'linear' || parts.length === 0) {
    const governed = parts.map((part) => ({ ...single(part), isGoverned: true }));
    return [...governed, ...(system === null ? [] : [single(system)])];
  }
  const key = blendKey({ merge, density, parts });
  const merged = { key, rank: Number.POSITIVE_INFINITY, weight: 1, isGoverned: false };
  return [merged, ...(system === null ? [] : [single(system)])];
}

/** Without what has rank 0; null when nothing is left. */
export function activeUse(use: AdapterUse | null): AdapterUse | null {
  if (use === null) return null;
  const parts = use.parts.filter((part) => part.rank > 0);
  const system = use.system !== null && use.system.rank > 0 ? use.system : null;
  if (parts.length === 0 && system === null) return null;
  return { ...use, parts, system, prior: parts.length === 0 ? null : use.prior };
}
