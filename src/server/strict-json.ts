// JSON for request bodies: what JSON.parse accepts, minus what two parsers could read differently or what costs more to
// hold than to send. Refused besides bad grammar: duplicate keys, `__proto__`, nesting beyond a limit (faults.md B61, B83).

import { invalidRequest } from './problem.ts';

const quote = 34;
const backslash = 92;

export interface JsonLimits {
  readonly depthMax: number;
  /** Keys of all objects together: a key costs a hundred times what a character costs. */
  readonly keysMax: number;
}

/** O(text). Throws INVALID_REQUEST. */
export function parseStrictJson(text: string, limits: JsonLimits): unknown {
  // The scan comes first, so that depth is bounded before a parser sees the text; on text that is no JSON it may miss
  // anything, and the parser refuses that text.
  scanStructure(text, limits);
  try {
    return JSON.parse(text);
  } catch {
    throw invalidRequest('the body is not valid JSON');
  }
}

function scanStructure(text: string, { depthMax, keysMax }: JsonLimits): void {
  let keyCount = 0;
  /** Keys seen per open object; null for an open array. */
  const open: Array<Set<string> | null> = [];
  let isKeyNext = false;
  for (let i = 0; i < text.length; i++) {
    switch (text[i]) {
      case '"': {
        const end = stringEnd(text, i);
        const keys = open.at(-1);
        if (isKeyNext && keys) {
          keyCount += 1;
          if (keyCount > keysMax) throw invalidRequest(`the body has more than ${keysMax} keys`);
          addKey(keys, text.slice(i, end + 1));
        }
        isKeyNext = false;
        i = end;
        break;
      }
      case ',':
        isKeyNext = open.at(-1) instanceof Set;
        break;
      case '{':
      case '[':
        if (open.length === depthMax) {
          throw invalidRequest(`the body is nested deeper than ${depthMax} levels`);
        }
        isKeyNext = text[i] === '{';
        open.push(isKeyNext ? new Set() : null);
        break;
      case '}':
      case ']':
        open.pop();
        break;
    }
  }
}

/** Index of the closing quote of the string that opens at `start`, or past the text's end. */
function stringEnd(text: string, start: number): number {
  let i = start + 1;
  while (i < text.length && text.charCodeAt(i) !== quote) {
    i += text.charCodeAt(i) === backslash ? 2 : 1;
  }
  return i;
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
