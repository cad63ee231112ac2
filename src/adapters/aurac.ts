// Area under the rank–quality curve, one number for how well an adapter degrades (MatryoshkaLoRA, arXiv 2605.07850):
// trapezoids over the ranks (v1) or over their base-2 logarithms (v2), divided by the range. In the quality's own unit.

import { GatewayError } from '../errors.ts';

export interface Aurac {
  readonly v1: number;
  readonly v2: number;
}

/** `quality[i]` is that of rank `ranks[i]`; ranks rise from at least 1. One rank's area is its quality. */
export function aurac(ranks: readonly number[], quality: readonly number[]): Aurac {
  const rises = ranks.every((rank, i) => rank > (ranks[i - 1] ?? 0) && rank >= 1);
  if (ranks.length === 0 || ranks.length !== quality.length || !rises) {
    const message = `aurac: ${ranks.length} rising ranks from 1 on and ${quality.length} qualities`;
    throw new GatewayError('INVALID_REQUEST', message);
  }
  return { v1: meanUnder(ranks, quality), v2: meanUnder(ranks.map(Math.log2), quality) };
}

function meanUnder(x: readonly number[], y: readonly number[]): number {
  if (x.length === 1) return y[0]!;
  const area = y.slice(1).reduce((sum, to, i) => sum + ((x[i + 1]! - x[i]!) * (y[i]! + to)) / 2, 0);
  return area / (x.at(-1)! - x[0]!);
}
