import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { merge } from '../../../src/server/merge.ts';

describe('merge', () => {
  it('delivers every value once, each source in its order', async () => {
    await fc.assert(
      fc.asyncProperty(
        fc.array(fc.array(fc.nat(5), { maxLength: 8 }), { maxLength: 5 }),
        async (turns) => {
          // The numbers are how many microtasks a source waits before its next value.
          const sources = turns.map(async function* (waits) {
            for (const [i, wait] of waits.entries()) {
              for (let turn = 0; turn < wait; turn++) await null;
              yield i;
            }
          });
          const got = turns.map((): number[] => []);
          for await (const { index, value } of merge(sources.map((source) => source))) {
            got[index]!.push(value);
          }
          expect(got).toEqual(turns.map((waits) => waits.map((_, i) => i)));
        },
      ),
    );
  });

  it('closes every source when it is left early, and when one fails', async () => {
    for (const isFailure of [false, true]) {
      let open = 0;
      const source = async function* (fails: boolean): AsyncGenerator<number> {
        open += 1;
        try {
          yield 1;
          if (fails) throw new Error('broken');
          yield 2;
        } finally {
          open -= 1;
        }
      };
      const merged = merge([source(isFailure), source(false), source(false)]);
      const reading = (async () => {
        for await (const { value } of merged) if (!isFailure && value === 2) break;
      })();
      if (isFailure) await expect(reading).rejects.toThrow('broken');
      else await reading;
      await new Promise((resolve) => setImmediate(resolve));
      expect(open).toBe(0);
    }
  });

  it('asks no source ahead of its reader', async () => {
    let asked = 0;
    const source = {
      [Symbol.asyncIterator]: () => ({
        next: () => Promise.resolve({ done: false as const, value: ++asked }),
      }),
    };
    const merged = merge([source]);
    for (let i = 1; i <= 3; i++) {
      await merged.next();
      expect(asked).toBe(i);
    }
    await merged.return();
  });
});
