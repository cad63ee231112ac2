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
  // Looks ahead instead of consuming: special tokens that overlap are all found.
  const anySpecial = new RegExp(`(?=${specials.map(escapeExpression).join('|')}).`, 'gisu');

  return (text, mark) => {
    const marked = text.replace(anySpecial, (first) => first + mark);
    // Templates trim: the edges that count are those with and without the white space around the text.
    const head = marked.length - marked.trimStart().length;
    const tail = marked.trimEnd().length;
    let result = marked;
    if (endsIn(beginnings, marked, longest)) result += mark;
    if (tail < marked.length && endsIn(beginnings, marked.slice(0, tail), longest)) {
      result = marked.slice(0, tail) + mark + result.slice(tail);
    }
    if (head > 0 && startsIn(endings, marked.slice(head), longest)) {
      result = result.slice(0, head) + mark + result.slice(head);
    }
    return startsIn(endings, marked, longest) ? mark + result : result;
  };
}

const escapeExpression = (text: string): string => text.replace(/[\\^$.*+?()[\]{}|/-]/g, '\\$&');

const properPrefixes = (text: string): string[] =>
  Array.from({ length: text.length - 1 }, (_, at) => text.slice(0, at + 1));

const properSuffixes = (text: string): string[] =>
  Array.from({ length: text.length - 1 }, (_, at) => text.slice(at + 1));

function endsIn(set: ReadonlySet<string>, text: string, longest: number): boolean {
  for (let length = 1; length < Math.min(longest, text.length + 1); length += 1) {
    if (set.has(text.slice(text.length - length).toLowerCase())) return true;
  }
  return false;
}

function startsIn(set: ReadonlySet<string>, text: string, longest: number): boolean {
  for (let length = 1; length < Math.min(longest, text.length + 1); length += 1) {
    if (set.has(text.slice(0, length).toLowerCase())) return true;
  }
  return false;
}
