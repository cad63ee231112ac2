import { describe, expect, it } from 'vitest';
import { atomLogits } from '../../../src/engine/instruction-prior.ts';

// e = (1, 2), the mean of (0, 4) and (2, 0); scores <e, τ> are 1, 2 and 5.
const words = Float32Array.of(0, 4, 2, 0);
const labels = { shape: [3, 2], values: Float32Array.of(1, 0, 0, 1, 1, 2) };
const softmax = (logits: readonly number[]): number[] => {
  const mass = logits.reduce((sum, logit) => sum + Math.exp(logit), 0);
  return logits.map((logit) => Math.exp(logit) / mass);
};

describe('what an instruction says about atoms', () => {
  it('is the log of a softmax over labels, times the strength', () => {
    const mass = Math.exp(1) + Math.exp(2) + Math.exp(5);
    const want = [1, 2, 5].map((score) => score - Math.log(mass));
    for (const strength of [1, 0.5]) {
      for (const [k, logit] of atomLogits(words, labels, strength).entries()) {
        expect(logit).toBeCloseTo(strength * want[k]!, 12);
      }
    }
  });

  it('is nothing at strength 0, and finite for scores whose softmax underflows', () => {
    expect(atomLogits(words, labels, 0).every((logit) => logit === 0)).toBe(true);
    const far = { shape: [2, 2], values: Float32Array.of(1e6, 0, -1e6, 0) };
    expect(atomLogits(words, far, 0).map(Math.abs)).toEqual([0, 0]);
    expect(atomLogits(words, far, 100)).toEqual([0, -2e8]);
  });

  it('gives the atom that the instruction names more weight the stronger it is', () => {
    const routed = [0.3, 0.9, -0.2]; // logits that speak for atom 1; the instruction is for atom 2
    const weights = [0, 0.25, 0.5, 1, 2].map((strength) => {
      const prior = atomLogits(words, labels, strength);
      return softmax(routed.map((logit, k) => logit + prior[k]!))[2]!;
    });
    expect(weights).toEqual([...weights].sort((a, b) => a - b));
    expect(weights.at(-1)! - weights[0]!).toBeGreaterThan(0.5);
  });
});
