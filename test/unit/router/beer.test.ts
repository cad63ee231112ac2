import { describe, expect, it } from 'vitest';
import { beerTerm, type Transition } from '../../../src/router/beer.ts';
import { createRng, type Rng } from '../../support/random.ts';

const size = 5;

function vectorOf(rng: Rng): Float64Array {
  return Float64Array.from({ length: size }, () => rng.normal());
}

function draw(rng: Rng): Transition & { readonly w: Float64Array } {
  const w = vectorOf(rng);
  return {
    ...{ phi: vectorOf(rng), phiNext: vectorOf(rng), w, weightNorm: Math.hypot(...w) },
    ...{ reward: 3 * rng.normal(), discount: 0.05 + 0.94 * rng.next() },
  };
}

const dot = (a: ArrayLike<number>, b: ArrayLike<number>): number =>
  Array.from(a, (value, i) => value * b[i]!).reduce((x, y) => x + y, 0);

/** relu(cos − (0.5/γ)(‖φ‖² + γ²‖φ'‖² − r²/‖w‖²)/(‖φ‖‖φ'‖)), as section 16 writes it. */
function transcribed({ phi, phiNext, w, reward, discount }: ReturnType<typeof draw>): {
  cosine: number;
  bound: number;
} {
  const lengths = Math.sqrt(dot(phi, phi)) * Math.sqrt(dot(phiNext, phiNext));
  const inner = dot(phi, phi) + discount ** 2 * dot(phiNext, phiNext) - reward ** 2 / dot(w, w);
  return { cosine: dot(phi, phiNext) / lengths, bound: ((0.5 / discount) * inner) / lengths };
}

describe('BEER', () => {
  it('has the loss of the formula on 1000 random transitions, and no slope where it is zero', () => {
    const rng = createRng(1);
    let above = 0;
    for (let i = 0; i < 1000; i++) {
      const transition = draw(rng);
      const { cosine, bound } = transcribed(transition);
      const { loss, gradient } = beerTerm(transition);
      expect(Math.abs(loss - Math.max(0, cosine - bound))).toBeLessThan(1e-6);
      expect(gradient === null).toBe(cosine <= bound);
      if (cosine > bound) above += 1;
    }
    expect(above).toBeGreaterThan(100);
    expect(above).toBeLessThan(900);
  });

  it('has the slope of the cosine, with the bound held still', () => {
    const rng = createRng(2);
    for (let i = 0; i < 200; i++) {
      const transition = draw(rng);
      const { gradient } = beerTerm(transition);
      if (gradient === null) continue;
      for (let at = 0; at < size; at++) {
        const cosineAt = (step: number): number => {
          const phi = transition.phi.map((value, j) => (j === at ? value + step : value));
          return transcribed({ ...transition, phi }).cosine;
        };
        const slope = (cosineAt(1e-6) - cosineAt(-1e-6)) / 2e-6;
        expect(Math.abs(gradient[at]! - slope)).toBeLessThan(1e-6 * (1 + Math.abs(slope)));
      }
    }
  });

  it('never finds fault with features of an exact value function', () => {
    const rng = createRng(3);
    for (let i = 0; i < 1000; i++) {
      const transition = draw(rng);
      const { phi, phiNext, w, discount } = transition;
      const reward = dot(w, phi) - discount * dot(w, phiNext);
      const { cosine, bound } = transcribed({ ...transition, reward });
      expect(cosine).toBeLessThanOrEqual(bound + 1e-9);
      expect(beerTerm({ ...transition, reward }).loss).toBeLessThan(1e-9);
    }
  });

  it('is silent where there is no direction', () => {
    const transition = draw(createRng(4));
    const none = new Float64Array(size);
    for (const change of [{ phi: none }, { phiNext: none }, { weightNorm: 0 }]) {
      expect(beerTerm({ ...transition, ...change })).toEqual({ loss: 0, gradient: null });
    }
  });
});
