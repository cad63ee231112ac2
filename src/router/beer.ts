// BEER: keeps a critic's features from growing more alike from one decision to the next than any exact value function could
// have them (algorithms.md section 16). If w·φ = r + γ w·φ', then ‖φ − γφ'‖ ≥ |r|/‖w‖, which bounds their cosine; the loss is
// what it is above that. The bound is a number here, not differentiated through, and φ' is not learned from.

export interface Transition {
  readonly phi: Float64Array; // [H]
  readonly phiNext: Float64Array; // [H]
  /** ‖w‖ of the last layer. */
  readonly weightNorm: number;
  readonly reward: number;
  /** γ, above 0: without it no decision follows from another, and nothing is bounded. */
  readonly discount: number;
}

export interface BeerTerm {
  /** max(0, cos(φ, φ') − bound). */
  readonly loss: number;
  /** Of the loss by φ; null where it is zero. */
  readonly gradient: Float64Array | null; // [H]
}

export function beerTerm({ phi, phiNext, weightNorm, reward, discount }: Transition): BeerTerm {
  const [norm, normNext] = [Math.hypot(...phi), Math.hypot(...phiNext)];
  // Without length there is no direction, and without weights everything is worth the same: nothing to hold apart.
  if (norm === 0 || normNext === 0 || weightNorm === 0) return { loss: 0, gradient: null };
  const squares = norm ** 2 + (discount * normNext) ** 2 - (reward / weightNorm) ** 2;
  const bound = squares / (2 * discount * norm * normNext);
  const cosine = phi.reduce((sum, value, i) => sum + value * phiNext[i]!, 0) / (norm * normNext);
  if (!(cosine > bound)) return { loss: 0, gradient: null };
  const gradient = phi.map((value, i) => (phiNext[i]! / normNext - (cosine * value) / norm) / norm);
  return { loss: cosine - bound, gradient };
}
