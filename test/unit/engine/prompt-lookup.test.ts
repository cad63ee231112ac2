import fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { PromptLookup } from '../../../src/engine/prompt-lookup.ts';

/** What the textbook says: the newest earlier place where the last 3 tokens stand, or else the last 2, and what followed. */
function naiveGuesses(tokens: readonly number[], max: number): number[] {
  for (const length of [3, 2]) {
    if (tokens.length < length) continue;
    const end = tokens.slice(-length).join();
    for (let at = tokens.length - 1; at >= length; at--) {
      if (tokens.slice(at - length, at).join() !== end) continue;
      const known = [...tokens];
      for (let i = 0; i < max; i++) known.push(known[at + i]!);
      return known.slice(tokens.length);
    }
  }
  return [];
}

function guess(known: readonly number[], max: number, room = max): number[] {
  const tokens = new Int32Array(known.length + room);
  tokens.set(known);
  const count = new PromptLookup(tokens).propose(known.length, max);
  return [...tokens.subarray(known.length, known.length + count)];
}

describe('PromptLookup', () => {
  it('guesses what followed the newest earlier place of the same end, longest end first', () => {
    expect(guess([1, 2, 3, 4, 5, 9, 2, 3, 7, 1, 2, 3], 3)).toEqual([4, 5, 9]);
    expect(guess([1, 2, 7, 1, 2, 8, 1, 2], 2)).toEqual([8, 1]);
    expect(guess([1, 2, 3, 4], 4)).toEqual([]);
    expect(guess([5], 4)).toEqual([]);
    expect(guess([], 4)).toEqual([]);
  });

  it('goes on with a period that is shorter than the guess', () => {
    expect(guess([6, 7, 6, 7, 6], 5)).toEqual([7, 6, 7, 6, 7]);
  });

  it('writes no further than the sequence has room', () => {
    expect(guess([1, 2, 3, 1, 2], 8, 2)).toEqual([3, 1]);
    expect(guess([1, 2, 3, 1, 2], 8, 0)).toEqual([]);
  });

  it('guesses as the naive search while a sequence grows, but for guesses lost to collisions', () => {
    let guesses = 0;
    let lost = 0;
    fc.assert(
      fc.property(
        fc.array(fc.nat(5), { minLength: 1, maxLength: 200, size: 'max' }),
        fc.array(fc.integer({ min: 1, max: 7 }), { minLength: 200, maxLength: 200 }),
        (text, wishes) => {
          const tokens = new Int32Array(text.length + 7);
          const lookup = new PromptLookup(tokens);
          for (let count = 0; count <= text.length; count++) {
            if (count > 0) tokens[count - 1] = text[count - 1]!;
            if (count % 3 === 0) continue; // not asked at every step: it catches up
            const max = wishes[count % 200]!;
            const found = lookup.propose(count, max);
            const want = naiveGuesses(text.slice(0, count), max);
            if (want.length > 0) guesses += 1;
            const got = [...tokens.subarray(count, count + found)];
            if (got.join() === want.join()) continue;
            lost += 1;
            // A collision can hide the longer or the newer place; what is guessed stood behind the same two tokens.
            if (found === 0) continue;
            const end = text.slice(count - 2, count).join();
            const places = text
              .slice(0, count)
              .flatMap((_, at) =>
                at >= 2 && text.slice(at - 2, at).join() === end ? [text[at]] : [],
              );
            expect(places).toContain(got[0]);
          }
        },
      ),
      { numRuns: 50 },
    );
    expect(guesses).toBeGreaterThan(1000);
    expect(lost / guesses).toBeLessThan(0.25);
  });
});
