// JSON for request bodies: what JSON.parse accepts, minus what two parsers could read differently or what costs more to
// hold than to send. Refused besides bad grammar: duplicate keys, `__proto__`, nesting beyond a limit (faults.md B61, B83).

import { invalidRequest } from './problem.ts';

const codes = { quote: 34, comma: 44, colon: 58, backslash: 92 } as const;
const brackets = { squareOpen: 91, squareClose: 93, curlyOpen: 123, curlyClose: 125 } as const;

/** O(text). Throws INVALID_REQUEST. */
export function parseStrictJson(text: string, depthMax: number): unknown {
  // The scan comes first, so that depth is bounded before a parser sees the text; on text that is no JSON it may miss
  // anything, and the parser refuses that text.
  scanStructure(text, depthMax);
  try {
    return JSON.parse(text);
  } catch {
    throw invalidRequest('the body is not valid JSON');
  }
}

function scanStructure(text: string, depthMax: number): void {
  /** Keys seen per open object; null for an open array. */
  const open: Array<Set<string> | null> = [];
  let isKeyNext = false;
  for (let i = 0; i < text.length; i++) {
    switch (text.charCodeAt(i)) {
      case codes.quote: {
        const end = stringEnd(text, i);
        const keys = open.at(-1);
        if (isKeyNext && keys) addKey(keys, text.slice(i, end + 1));
        i = end;
        break;
      }
      case codes.comma:
        isKeyNext = open.at(-1) instanceof Set;
        break;
      case codes.colon:
        isKeyNext = false;
        break;
      case brackets.curlyOpen:
      case brackets.squareOpen: {
        if (open.length === depthMax) {
          throw invalidRequest(`the body is nested deeper than ${depthMax} levels`);
        }
        isKeyNext = text.charCodeAt(i) === brackets.curlyOpen;
        open.push(isKeyNext ? new Set() : null);
        break;
      }
      case brackets.curlyClose:
      case brackets.squareClose:
        open.pop();
        isKeyNext = false;
        break;
    }
  }
}

/** Index of the closing quote of the string that opens at `start`, or the text's length. Backslash runs before two
 *  quotes do not overlap, so the whole scan stays linear. */
function stringEnd(text: string, start: number): number {
  for (let end = text.indexOf('"', start + 1); end !== -1; end = text.indexOf('"', end + 1)) {
    let backslashes = 0;
    while (text.charCodeAt(end - 1 - backslashes) === codes.backslash) backslashes++;
    if (backslashes % 2 === 0) return end;
  }
  return text.length;
}

function addKey(keys: Set<string>, quoted: string): void {
  let key: unknown;
  try {
    key = JSON.parse(quoted);
  } catch {
    throw invalidRequest('the body is not valid JSON');
  }
  if (typeof key !== 'string') return;
  if (key === '__proto__') throw invalidRequest('the key __proto__ is not accepted', '__proto__');
  if (keys.has(key)) {
    const shown = key.slice(0, 64);
    throw invalidRequest(`duplicate key: ${shown}`, shown);
  }
  keys.add(key);
}
