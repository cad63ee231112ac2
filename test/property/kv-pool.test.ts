import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { blockCells, KvPool, type Run, reservedBlocks } from '../../src/engine/kv-pool.ts';

// Random lives of runs against the plainest model there is: who owns each block.

type Operation =
  | { readonly kind: 'allocate'; readonly blocks: number }
  | {
      readonly kind: 'release' | 'grow' | 'shrink';
      readonly pick: number;
      readonly blocks: number;
    };

const operation: fc.Arbitrary<Operation> = fc.oneof(
  fc.record({ kind: fc.constant('allocate' as const), blocks: fc.integer({ min: 1, max: 12 }) }),
  fc.record({
    kind: fc.constantFrom('release' as const, 'grow' as const, 'shrink' as const),
    pick: fc.nat(),
    blocks: fc.integer({ min: 1, max: 12 }),
  }),
);

function owners(runs: readonly Run[], blocks: number): Array<Run | null> {
  const map: Array<Run | null> = new Array(blocks).fill(null);
  for (const run of runs) {
    for (let i = run.first; i < run.first + run.blocks; i++) {
      if (i < reservedBlocks || i >= blocks) throw new Error(`block ${i} is outside the pool`);
      if (map[i] !== null) throw new Error(`block ${i} has two owners`);
      map[i] = run;
    }
  }
  return map;
}

/** Lengths of the free stretches. */
function gaps(map: ReadonlyArray<Run | null>): number[] {
  const found: number[] = [];
  let size = 0;
  for (const owner of [...map.slice(reservedBlocks), 'end']) {
    if (owner === null) size += 1;
    else if (size > 0) {
      found.push(size);
      size = 0;
    }
  }
  return found;
}

describe('KvPool', () => {
  it('never overlaps, never loses a block, and refuses only what really does not fit', () => {
    fc.assert(
      fc.property(
        fc.integer({ min: 2, max: 40 }),
        fc.array(operation, { maxLength: 120, size: 'max' }),
        (blocks, operations) => {
          const pool = new KvPool(blocks * blockCells + 5);
          const runs: Run[] = [];
          for (const one of operations) {
            const before = owners(runs, blocks);
            if (one.kind === 'allocate') {
              const fits = gaps(before).filter((gap) => gap >= one.blocks);
              const run = pool.allocate(one.blocks);
              expect(run !== null).toBe(fits.length > 0);
              if (run === null) continue;
              runs.push(run);
              // Best fit: it came out of the smallest stretch that holds it.
              const rest = gaps(owners(runs, blocks)).reduce((sum, gap) => sum + gap, 0);
              expect(rest).toBe(gaps(before).reduce((sum, gap) => sum + gap, 0) - one.blocks);
              const end = before.findIndex((owner, i) => i >= run.first && owner !== null);
              const stretch = (end < 0 ? blocks : end) - run.first;
              expect(stretch).toBe(Math.min(...fits));
            } else if (runs.length > 0) {
              const run = runs[one.pick % runs.length]!;
              const size = run.blocks;
              if (one.kind === 'release') {
                pool.release(run);
                runs.splice(runs.indexOf(run), 1);
              } else if (one.kind === 'shrink') {
                pool.shrink(run, one.blocks);
                expect(run.blocks).toBe(Math.min(size, one.blocks));
              } else {
                const more = before.slice(run.first + size, run.first + one.blocks);
                const fits =
                  run.first + one.blocks <= blocks && more.every((owner) => owner === null);
                expect(pool.grow(run, one.blocks)).toBe(one.blocks <= size || fits);
                expect(run.blocks).toBe(fits ? Math.max(size, one.blocks) : size);
              }
            }
            const free = gaps(owners(runs, blocks)).reduce((sum, gap) => sum + gap, 0);
            expect(pool.freeBlocks).toBe(free);
          }
          for (const run of runs) pool.release(run);
          expect(pool.allocate(blocks - reservedBlocks)).not.toBeNull(); // merged back into one
        },
      ),
      { numRuns: 100 },
    );
  });

  it('refuses a run that it did not give out, or that was given back', () => {
    const pool = new KvPool(10 * blockCells);
    const run = pool.allocate(2)!;
    pool.release(run);
    expect(() => pool.release(run)).toThrow('not allocated');
    expect(() => pool.grow({ first: 1, blocks: 2 }, 3)).toThrow('not allocated');
    expect(() => pool.allocate(0)).toThrow();
    expect(() => new KvPool(blockCells)).toThrow('holds no sequence');
  });
});
