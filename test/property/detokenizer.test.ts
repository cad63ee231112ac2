import * as fc from 'fast-check';
import { describe, expect, it } from 'vitest';
import { createDetokenizer } from '../../src/engine/detokenizer.ts';
import { createStopMatcher } from '../../src/engine/stop-matcher.ts';

/** Bytes weighted towards what UTF-8 decoders get wrong: leads without followers, followers without leads, overlong
 *  forms, surrogates, beyond U+10FFFF, byte order marks. */
const byte = fc.oneof(
  fc.constantFrom(0x41, 0xc0, 0xc3, 0xe0, 0xed, 0xef, 0xf0, 0xf4, 0xf5, 0xff, 0xbb, 0xbf),
  fc.integer({ min: 0x80, max: 0xbf }),
  fc.integer({ min: 0, max: 255 }),
);
const tokens = fc.array(
  fc.oneof(
    fc.uint8Array({ maxLength: 5 }),
    fc.array(byte, { maxLength: 5 }).map((list) => Uint8Array.from(list)),
  ),
);

describe('streamed text', () => {
  it('concatenates to the text of all bytes decoded at once', async () => {
    await fc.assert(
      fc.property(tokens, (parts) => {
        const detokenizer = createDetokenizer((token) => parts[token]!);
        const streamed =
          parts.map((_, token) => detokenizer.push(token)).join('') + detokenizer.flush();
        const whole = new TextDecoder('utf-8', { ignoreBOM: true }).decode(Buffer.concat(parts));
        expect(streamed).toBe(whole);
      }),
      { numRuns: 2000 },
    );
  });

  it('stops where a search in the whole text stops, shows what is before it and holds nothing back for long', async () => {
    const letters = fc.string({
      unit: fc.constantFrom('a', 'b', '😀'),
      minLength: 1,
      maxLength: 4,
    });
    await fc.assert(
      fc.property(
        fc.array(letters, { maxLength: 4 }),
        fc.array(fc.string({ unit: fc.constantFrom('a', 'b', '😀'), maxLength: 5 }), {
          maxLength: 12,
        }),
        (stops, pieces) => {
          const matcher = createStopMatcher(stops);
          let shown = '';
          let seen = '';
          let stop: string | null = null;
          for (const piece of pieces) {
            seen += piece;
            const match = matcher.push(piece);
            shown += match.text;
            stop = match.stop;
            if (stop !== null) break;
            expect(shown).toBe(seen.slice(0, seen.length - heldBack(seen, stops)));
          }
          if (stop === null) shown += matcher.flush();
          expect({ shown, stop }).toEqual(naiveStop(pieces.join(''), stops));
        },
      ),
      { numRuns: 2000 },
    );
  });
});

/** The earliest end wins, then the longest. */
function naiveStop(text: string, stops: readonly string[]): { shown: string; stop: string | null } {
  const found = stops
    .map((stop) => ({ stop, begin: text.indexOf(stop) }))
    .filter(({ begin }) => begin >= 0)
    .sort((a, b) => a.begin + a.stop.length - b.begin - b.stop.length || a.begin - b.begin)[0];
  return found === undefined
    ? { shown: text, stop: null }
    : { shown: text.slice(0, found.begin), stop: found.stop };
}

/** Longest end of the text that begins a stop string. */
function heldBack(text: string, stops: readonly string[]): number {
  for (let length = text.length; length > 0; length -= 1) {
    const end = text.slice(text.length - length);
    if (stops.some((stop) => stop.length > length && stop.startsWith(end))) return length;
  }
  return 0;
}
