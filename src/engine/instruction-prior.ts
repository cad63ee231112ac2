// What an instruction says about a queryable adapter's atoms: λ·log softmax_k(<e, τ_k> / T) with T = 1, to be added to the
// routing logits (algorithms.md section 6). e is the mean of the instruction's token embeddings, τ_k the same of atom k's
// label, made when the adapter was. Linear in λ, and never infinite.

import type { Floats } from '../adapters/pack.ts';

/** `words` [ids, width], ids ≥ 1; `labels` [K, width]. One number an atom. */
export function atomLogits(words: Float32Array, labels: Floats, strength: number): number[] {
  const [atoms = 0, width = 0] = labels.shape;
  const e = new Float64Array(width);
  for (const [i, value] of words.entries()) e[i % width]! += (value * width) / words.length;
  const scores = Array.from({ length: atoms }, (_, k) =>
    e.reduce((sum, value, i) => sum + value * labels.values[k * width + i]!, 0),
  );
  const top = Math.max(...scores);
  const mass = scores.reduce((sum, score) => sum + Math.exp(score - top), 0);
  return scores.map((score) => strength * (score - top - Math.log(mass)));
}
