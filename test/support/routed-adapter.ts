import type { RouteInput } from '../../src/router/policy.ts';

/** One adapter as the router sees it; energy in proportion to the rank unless told. */
export function routedAdapter(
  rankMax: number,
  rankCurve: readonly number[] = Array.from({ length: rankMax }, (_, i) => (i + 1) / rankMax),
): NonNullable<RouteInput['adapter']> {
  return blendedAdapter([rankMax], rankCurve);
}

/** A blend of parts that have so many ranks each. */
export function blendedAdapter(
  parts: readonly number[],
  curve?: readonly number[],
): NonNullable<RouteInput['adapter']> {
  const rankMax = Math.max(...parts);
  const cuts = Array.from({ length: rankMax }, (_, i) => parts.map((own) => Math.min(i + 1, own)));
  const sum = (figures: readonly number[]): number => figures.reduce((a, b) => a + b, 0);
  return {
    name: 'support',
    rankMax,
    rankCurve: curve ?? cuts.map((_, i) => (i + 1) / rankMax),
    ranks: cuts.map(sum),
    pages: cuts.map((ranks) => sum(ranks.map((rank) => Math.ceil(rank / 8)))),
  };
}
