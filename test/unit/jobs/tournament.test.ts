import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { describe, expect, it } from 'vitest';
import { createRandom } from '../../../src/adapters/families/seeded-random.ts';
import {
  alphaRank,
  type Bound,
  runTournament,
  type Tournament,
  winner,
  winRates,
} from '../../../src/jobs/tournament.ts';

// algorithms.md section 7; the golden tables are open-spiel's (test/oracle/alpha-rank.py).

interface Golden {
  readonly tables: readonly {
    readonly alpha: number;
    readonly payoffs: readonly (readonly number[])[];
    readonly shares: readonly number[];
  }[];
}
const golden = JSON.parse(
  readFileSync(join(import.meta.dirname, '../../golden/tournament/alpha-rank.json'), 'utf8'),
) as Golden;

describe('alpha-Rank', () => {
  it('is open-spiel’s on 50 random tables', () => {
    expect(golden.tables).toHaveLength(50);
    for (const { alpha, payoffs, shares } of golden.tables) {
      const ours = alphaRank(payoffs, { alpha, size: 50 });
      for (const [i, share] of shares.entries()) {
        expect(Math.abs(ours[i]! - share)).toBeLessThan(1e-8);
      }
    }
  });

  it('is even where each beats the next in a circle', () => {
    const circle = [
      [0, -1, 1],
      [1, 0, -1],
      [-1, 1, 0],
    ];
    for (const share of alphaRank(circle, { alpha: 1, size: 50 })) {
      expect(share).toBeCloseTo(1 / 3, 10);
    }
  });

  it('gives all to the best of a chain, also where a difference counts so much that powers overflow', () => {
    const chain = [0, 1, 2, 3].map((i) => [0, 1, 2, 3].map((j) => Math.sign(j - i)));
    for (const alpha of [1, 100, 1e6]) {
      const [best, ...others] = alphaRank(chain, { alpha, size: 50 });
      expect(best).toBeCloseTo(1, 10);
      for (const share of others) expect(share).toBeLessThan(1e-10);
    }
    expect(alphaRank([[0]], { alpha: 1, size: 50 })).toEqual([1]);
  });
});

const delta = 0.05;
const skills = [0.9, 0.65, 0.4, 0.2];
/** P(i beats j), by how much more often it is right. */
const rate = (i: number, j: number): number => 0.5 + (skills[i]! - skills[j]!) / 2;

function play(seed: number, bound: Bound, gamesMax = 10_000): Tournament {
  const { uniform } = createRandom(BigInt(seed), [11, 0]);
  return runTournament(4, (i, j) => uniform() < rate(i, j), { bound, delta, gamesMax });
}
const isRight = ({ games, isResolved }: Tournament, bound: Bound): boolean =>
  isResolved && [...games.values()].every((one) => winner(one, bound, delta) === 1);

describe('a tournament', () => {
  it.each<Bound>(['ucb-standard', 'clopper-pearson'])('finds who is better: %s', (bound) => {
    const right = Array.from({ length: 20 }, (_, seed) => isRight(play(seed, bound), bound));
    expect(right.filter(Boolean).length / 20).toBeGreaterThanOrEqual(1 - delta);
  });

  // Near a half, z²/4 games times 1/d² against ln(2/delta)/2: 0.52 at this delta.
  it('needs little more than half the games by Clopper and Pearson', () => {
    const games = (bound: Bound): number =>
      Array.from({ length: 20 }, (_, seed) => play(seed, bound).played).reduce((a, b) => a + b, 0);
    expect(games('clopper-pearson')).toBeLessThanOrEqual(0.6 * games('ucb-standard'));
  });

  it('ends at its most games, not resolved', () => {
    const { isResolved, played } = play(1, 'ucb-standard', 10);
    expect([isResolved, played]).toEqual([false, 60]);
  });

  it('knows a winner when the interval leaves a half out', () => {
    const known = (won: number, played: number): number =>
      winner({ won, played }, 'clopper-pearson', 0.05);
    // Two-sided binomial tests: 9 of 10 has 0.0215, 8 of 10 has 0.109.
    expect([known(9, 10), known(8, 10), known(1, 10), known(2, 10)]).toEqual([1, 0, -1, 0]);
    expect([known(0, 0), known(600, 1000), known(500, 1000)]).toEqual([0, 1, 0]);
    expect(winner({ won: 80, played: 100 }, 'ucb-standard', 0.05)).toBe(1);
    expect(winner({ won: 60, played: 100 }, 'ucb-standard', 0.05)).toBe(0);
  });

  it('is ranked by its win rates', () => {
    const { games } = play(3, 'clopper-pearson');
    const rates = winRates(4, games);
    expect(rates[1]![0]!).toBeCloseTo(1 - rates[0]![1]!, 12);
    const shares = alphaRank(rates, { alpha: 1, size: 50 });
    expect(shares[0]).toBeGreaterThan(0.99);
    expect(winRates(2, new Map())).toEqual([
      [0.5, 0.5],
      [0.5, 0.5],
    ]);
  });
});
