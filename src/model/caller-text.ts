// Strings of a caller on their way into a chat template, marked where they spell a special token or could become one half
// of it. A mark is a private-use character that occurs nowhere else in the chat.

import { GatewayError } from '../errors.ts';

const privateUse: readonly (readonly [first: number, last: number])[] = [
  [0xe000, 0xf8ff],
  [0xf0000, 0xffffd],
  [0x100000, 0x10fffd],
];

/** A private-use character that is in none of the texts. */
export function unusedMark(texts: Iterable<string>): string {
  const used = new Set<string>();
  for (const text of texts) for (const [mark] of text.matchAll(/\p{Co}/gu)) used.add(mark);
  for (const [first, last] of privateUse) {
    for (let point = first; point <= last; point += 1) {
      const mark = String.fromCodePoint(point);
      if (!used.has(mark)) return mark;
    }
  }
  throw new GatewayError('INVALID_REQUEST', 'the chat uses every private-use character', {
    param: 'messages',
  });
}

/** Puts `mark` into a caller's text so that no special token is left in it, alone or together with the text that a
 *  template puts before or after it. Letter case is ignored, for templates that change it. */
export type Guard = (text: string, mark: string) => string;

export function createGuard(specials: readonly string[]): Guard {
  const short = specials.find((special) => [...special].length < 2);
  if (short !== undefined) {
    // Nothing fits inside one character, so text with it could not be told from the template's.
    throw new GatewayError('UNSUPPORTED', `the special token '${short}' is a single character`);
  }
  if (specials.length === 0) return (text) => text;
  const lower = specials.map((special) => special.toLowerCase());
  const beginnings = new Set(lower.flatMap(properPrefixes));
  const endings = new Set(lower.flatMap(properSuffixes));
  const longest = lower.reduce((most, special) => Math.max(most, special.length), 0);
  const lengths = Array.from({ length: longest - 1 }, (_, i) => i + 1);
  // Looks ahead instead of consuming: special tokens that overlap are all found.
  const anySpecial = new RegExp(`(?=${specials.map(escapeExpression).join('|')}).`, 'gisu');

  return (text, mark) => {
    const marked = text.replace(anySpecial, (first) => first + mark);
    // Templates trim: the edges that count are those with and without the white space around the text.
    const head = marked.length - marked.trimStart().length;
    const tail = marked.trimEnd().length;
    let result = marked;
    const ends = (at: number): boolean =>
      lengths.some((n) => n <= at && beginnings.has(marked.slice(at - n, at).toLowerCase()));
    const starts = (at: number): boolean =>
      lengths.some((n) => endings.has(marked.slice(at, at + n).toLowerCase()));
    if (ends(marked.length)) result += mark;
    if (tail < marked.length && ends(tail)) {
      result = marked.slice(0, tail) + mark + result.slice(tail);
    }
    if (head > 0 && starts(head)) {
      result = result.slice(0, head) + mark + result.slice(head);
    }
    return starts(0) ? mark + result : result;
  };
}

const escapeExpression = (text: string): string => text.replace(/[\\^$.*+?()[\]{}|/-]/g, '\\$&');

const properPrefixes = (text: string): string[] =>
  Array.from({ length: text.length - 1 }, (_, at) => text.slice(0, at + 1));

const properSuffixes = (text: string): string[] =>
  Array.from({ length: text.length - 1 }, (_, at) => text.slice(at + 1));
