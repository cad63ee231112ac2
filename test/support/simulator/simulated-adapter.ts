// Adapters that exist by their name only: rank, rank curve and generation are a function of it, so a trace may name any. Those
// that a scenario describes are as it says.

import { createHash } from 'node:crypto';
import type { Generation } from '../../../src/adapters/adapter.ts';
import type { RouteInput } from '../../../src/router/policy.ts';
import { createRng } from '../random.ts';
import { routedAdapter } from '../routed-adapter.ts';

export interface SimulatedAdapter {
  readonly name: string;
  readonly generation: Generation;
  readonly rankMax: number;
  readonly routed: NonNullable<RouteInput['adapter']>;
}

const rankMaxes = [16, 64] as const;

/** Singular values fall as i^-d with d from 0.3 to 0.8, so a quarter of the ranks keeps 44 to 73 % of the energy. */
function createAdapter(name: string): SimulatedAdapter {
  const hash = createHash('sha256').update(name).digest('hex');
  const rng = createRng(Number.parseInt(hash.slice(0, 8), 16));
  const rankMax = rankMaxes[rng.below(rankMaxes.length)]!;
  const decay = 0.3 + 0.5 * rng.next();
  const energies = Array.from({ length: rankMax }, (_, i) => (i + 1) ** (-2 * decay));
  const total = energies.reduce((sum, energy) => sum + energy, 0);
  let kept = 0;
  const curve = energies.map((energy) => {
    kept += energy;
    return Math.min(1, kept / total);
  });
  return adapterOfCurve(name, curve);
}

/** One that exists, as far as the router sees it. */
export function adapterOfCurve(name: string, curve: readonly number[]): SimulatedAdapter {
  const hash = createHash('sha256').update(name).digest('hex');
  const routed = { ...routedAdapter(curve.length, curve), name };
  return { name, generation: `sha256:${hash}`, rankMax: curve.length, routed };
}

/** Remembers what it made: the same object for the same name. */
export function createAdapters(
  given: readonly SimulatedAdapter[] = [],
): (name: string) => SimulatedAdapter {
  const known = new Map(given.map((one) => [one.name, one]));
  return (name) => {
    const found = known.get(name) ?? createAdapter(name);
    known.set(name, found);
    return found;
  };
}

/** Energy kept at a rank; rank 0 keeps none. */
export function fidelityAt({ routed }: SimulatedAdapter, rank: number): number {
  return rank === 0 ? 0 : routed.rankCurve[Math.min(rank, routed.rankMax) - 1]!;
}
