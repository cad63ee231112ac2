import { execFileSync } from 'node:child_process';
import { join } from 'node:path';
import { describe, expect, it } from 'vitest';
import { addNoise, pairNoise, pairWeights, shapeFitness } from '../../../src/trainer/eggroll.ts';

const shape = { rows: 24, columns: 32 };
const size = shape.rows * shape.columns;

interface Estimate {
  readonly seed: number;
  readonly rank: number;
  readonly members: number;
  readonly sigma?: number;
}

function estimate(
  scoreOf: (moved: Float32Array) => number,
  { seed, rank, members, sigma = 1e-3 }: Estimate,
): Float32Array {
  const noiseOf = (pair: number) =>
    pairNoise({ seed, generation: 0, pair, module: 3 }, shape, rank);
  const scores = Array.from({ length: members }, (_, member) => {
    const moved = new Float32Array(size);
    addNoise(moved, noiseOf(member >> 1), member % 2 === 0 ? sigma : -sigma, rank);
    return scoreOf(moved);
  });
  const gradient = new Float32Array(size);
  pairWeights(shapeFitness(scores, members)).forEach((weight, pair) => {
    addNoise(gradient, noiseOf(pair), weight, rank);
  });
  return gradient;
}

/** A linear score: its gradient is `direction`. */
function direction(seed: number): Float32Array {
  return pairNoise({ seed, generation: 999, pair: 0, module: 9 }, { rows: size, columns: 1 }, 1)
    .left;
}

function dot(a: Float32Array, b: Float32Array): number {
  return a.reduce((sum, value, i) => sum + value * b[i]!, 0);
}

function rankOf(matrix: Float32Array): number {
  const rows = Array.from({ length: shape.rows }, (_, i) =>
    Float64Array.from(matrix.subarray(i * shape.columns, (i + 1) * shape.columns)),
  );
  let rank = 0;
  for (let column = 0; column < shape.columns && rank < shape.rows; column++) {
    const rest = rows.slice(rank);
    const best = rest.reduce((a, b) => (Math.abs(b[column]!) > Math.abs(a[column]!) ? b : a));
    if (Math.abs(best[column]!) < 1e-5) continue;
    const at = rows.indexOf(best);
    [rows[rank], rows[at]] = [best, rows[rank]!];
    for (const row of rows.slice(rank + 1)) {
      const factor = row[column]! / best[column]!;
      for (let j = column; j < shape.columns; j++) row[j]! -= factor * best[j]!;
    }
    rank += 1;
  }
  return rank;
}

describe('the estimate of a gradient', () => {
  it.each([
    { rank: 1, members: 64, seeds: 16 },
    { rank: 1, members: 512, seeds: 8 },
    { rank: 1, members: 4096, seeds: 2 },
    { rank: 4, members: 64, seeds: 16 },
    { rank: 4, members: 512, seeds: 8 },
    { rank: 4, members: 4096, seeds: 2 },
  ])(
    'is as far from the true one as theory has it: $rank, $members',
    ({ rank, members, seeds }) => {
      let sum = 0;
      for (let seed = 1; seed <= seeds; seed++) {
        const truth = direction(seed);
        const found = estimate((moved) => dot(moved, truth), { seed, rank, members });
        sum += dot(found, truth) / Math.sqrt(dot(found, found) * dot(truth, truth));
      }
      const theory = Math.sqrt(members / 2 / (members / 2 + size));
      expect(Math.abs(sum / seeds - theory)).toBeLessThan(0.05);
    },
  );

  it('has every rank once there are enough members, and no more than they have', () => {
    const score = (moved: Float32Array): number => dot(moved, direction(5));
    expect(rankOf(estimate(score, { seed: 5, rank: 1, members: 12 }))).toBe(6);
    expect(rankOf(estimate(score, { seed: 5, rank: 2, members: 12 }))).toBe(12);
    expect(rankOf(estimate(score, { seed: 5, rank: 1, members: 64 }))).toBe(24);
  });

  it('is exactly 0 where both members of each pair fare alike', () => {
    // A score that is even in what moves them.
    const found = estimate((moved) => dot(moved, moved), { seed: 1, rank: 1, members: 32 });
    expect(found.every((value) => value === 0)).toBe(true);
    expect(pairWeights(shapeFitness([1, 1, 4, 4], 4))).toEqual([0, 0]);
  });

  it('moves a member and its partner to opposite sides, exactly', () => {
    const noise = pairNoise({ seed: 1, generation: 2, pair: 3, module: 4 }, shape, 2);
    const both = new Float32Array(size);
    addNoise(both, noise, 0.37, 2);
    expect(both.some((value) => value !== 0)).toBe(true);
    const other = new Float32Array(size);
    addNoise(other, noise, -0.37, 2);
    expect(other).toEqual(both.map((value) => -value));
  });
});

describe('fitness', () => {
  it('counts what differs within a task, not between tasks', () => {
    const shaped = shapeFitness([0, 1, 100, 101], 2);
    expect(shaped.slice(0, 2)).toEqual(shaped.slice(2));
    expect(shaped[1]).toBeCloseTo(0.5 / Math.sqrt(0.25 + 1e-5), 12);
    expect(shapeFitness([7, 7, 7, 7], 4)).toEqual([0, 0, 0, 0]);
    expect(shapeFitness([0, 1, 100, 101], 4)[0]).toBeLessThan(-0.9);
  });
});

describe('noise', () => {
  const key = { seed: 42, generation: 7, pair: 5, module: 11 };

  it('is the same in another process', () => {
    const file = join(import.meta.dirname, '../../../src/trainer/eggroll.ts');
    const script = `import(${JSON.stringify(file)}).then(({ pairNoise }) => {
      const { left, right } = pairNoise(${JSON.stringify(key)}, ${JSON.stringify(shape)}, 2);
      process.stdout.write(JSON.stringify([[...left], [...right]]));
    })`;
    const args = ['--import', 'tsx', '-e', script];
    const there = JSON.parse(execFileSync(process.execPath, args, { encoding: 'utf8' }));
    const { left, right } = pairNoise(key, shape, 2);
    expect(there).toEqual([[...left], [...right]]);
  });

  it.each(['seed', 'generation', 'pair', 'module'] as const)(
    'is another for another %s',
    (name) => {
      const other = pairNoise({ ...key, [name]: key[name] + 1 }, shape, 1);
      expect(other.left).not.toEqual(pairNoise(key, shape, 1).left);
    },
  );
});
