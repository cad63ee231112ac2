// Parses the JSON header of a safetensors file. Not JSON.parse: that keeps the last of two equal names, rounds
// 18446744073709551614, takes 1.5 for a size, sets `__proto__`, and walks five million nested brackets for seconds. The
// header's grammar has three levels, so this reads exactly it, forward, without recursion:
//
//   { "__metadata__": { text: text, … }, name: { "dtype": text, "shape": [n, …], "data_offsets": [begin, end] }, … }

import { GatewayError } from '../errors.ts';
import { quoted } from './quoted.ts';

export interface HeaderEntry {
  readonly dtype: string;
  readonly shape: readonly number[];
  /** From the start of the data. */
  readonly begin: number;
  readonly end: number;
}

interface ParsedHeader {
  readonly metadata: Map<string, string>;
  readonly entries: Map<string, HeaderEntry>;
}

const tensorsMax = 10_000; // faults.md B15
const axesMax = 8;

/** Own names of every object: harmless in a Map, not in whatever a later reader puts the names into. */
const refusedNames: ReadonlySet<string> = new Set(['__proto__', 'constructor', 'prototype']);

function fail(message: string): never {
  throw new GatewayError('INVALID_ADAPTER', message);
}

/** A reason why `name` cannot name a tensor, or null. */
export function badName(name: string): string | null {
  if (name === '') return 'a tensor name is empty';
  if (refusedNames.has(name)) return `the tensor name ${quoted(name)} is not accepted`;
  return /\p{Surrogate}/u.test(name) ? 'a tensor name is not well-formed Unicode' : null;
}

class Scanner {
  readonly #text: string;
  #at = 0;

  constructor(text: string) {
    this.#text = text;
  }

  #skipSpace(): void {
    while (' \t\n\r'.includes(this.#text[this.#at] ?? 'end')) this.#at++;
  }

  /** Whether the next token is `mark`; takes it if so. */
  takes(mark: string): boolean {
    this.#skipSpace();
    if (this.#text[this.#at] !== mark) return false;
    this.#at++;
    return true;
  }

  expect(mark: string): void {
    if (!this.takes(mark)) fail(`the header has no ${mark} at character ${this.#at}`);
  }

  end(): void {
    this.#skipSpace();
    if (this.#at < this.#text.length) fail('the header goes on after its last }');
  }

  string(): string {
    this.expect('"');
    const start = this.#at;
    for (let c = this.#text[this.#at]; c !== '"'; c = this.#text[this.#at]) {
      if (c === undefined) fail('the header ends inside a string');
      this.#at += c === '\\' ? 2 : 1;
    }
    this.#at++;
    try {
      return JSON.parse(this.#text.slice(start - 1, this.#at)) as string;
    } catch {
      return fail(`the header has a broken string at character ${start - 1}`);
    }
  }

  /** A whole number ≥ 0 that a double holds exactly: no sign, fraction, exponent or leading zero. */
  size(): number {
    this.#skipSpace();
    const start = this.#at;
    while (/[0-9]/.test(this.#text[this.#at] ?? '')) this.#at++;
    const digits = this.#text.slice(start, this.#at);
    const value = Number(digits);
    if (!/^(0|[1-9][0-9]{0,15})$/.test(digits) || !Number.isSafeInteger(value)) {
      fail(`the header has no whole number below 2^53 at character ${start}`);
    }
    return value;
  }

  sizes(max: number): number[] {
    this.expect('[');
    const sizes: number[] = [];
    if (this.takes(']')) return sizes;
    do {
      if (sizes.length === max) fail(`the header has a list of more than ${max} numbers`);
      sizes.push(this.size());
    } while (this.takes(','));
    this.expect(']');
    return sizes;
  }

  /** Calls `value` after each `key:`; it must take the value. */
  object(value: (key: string) => void): void {
    this.expect('{');
    if (this.takes('}')) return;
    do {
      const key = this.string();
      this.expect(':');
      value(key);
    } while (this.takes(','));
    this.expect('}');
  }
}

function scanMetadata(scanner: Scanner): Map<string, string> {
  const metadata = new Map<string, string>();
  scanner.object((key) => {
    if (metadata.has(key)) fail(`__metadata__ has ${quoted(key)} twice`);
    if (refusedNames.has(key)) fail(`the metadata key ${quoted(key)} is not accepted`);
    metadata.set(key, scanner.string());
  });
  return metadata;
}

function scanEntry(scanner: Scanner, name: string): HeaderEntry {
  let dtype: string | undefined;
  let shape: number[] | undefined;
  let offsets: number[] | undefined;
  scanner.object((key) => {
    if (key === 'dtype' && dtype === undefined) dtype = scanner.string();
    else if (key === 'shape' && shape === undefined) shape = scanner.sizes(axesMax);
    else if (key === 'data_offsets' && offsets === undefined) offsets = scanner.sizes(2);
    else fail(`${quoted(name)} has the unknown or repeated field ${quoted(key)}`);
  });
  const [begin, end] = offsets ?? [];
  if (dtype === undefined || shape === undefined || begin === undefined || end === undefined) {
    return fail(`${quoted(name)} needs dtype, shape and two data_offsets`);
  }
  return { dtype, shape, begin, end };
}

/** Throws INVALID_ADAPTER for everything that is not exactly the grammar. */
export function parseHeader(bytes: Uint8Array): ParsedHeader {
  let text: string;
  try {
    // A byte order mark must stay, to be refused: the format wants { first.
    text = new TextDecoder('utf-8', { fatal: true, ignoreBOM: true }).decode(bytes);
  } catch {
    return fail('the header is not UTF-8');
  }
  if (!text.startsWith('{')) fail('the header does not start with {');
  const scanner = new Scanner(text);
  const entries = new Map<string, HeaderEntry>();
  let metadata: Map<string, string> | undefined;
  scanner.object((name) => {
    if (name === '__metadata__') {
      if (metadata !== undefined) fail('__metadata__ occurs twice');
      metadata = scanMetadata(scanner);
      return;
    }
    const bad = badName(name);
    if (bad !== null) fail(bad);
    if (entries.has(name)) fail(`the tensor ${quoted(name)} occurs twice`);
    if (entries.size === tensorsMax) fail(`there are more than ${tensorsMax} tensors`);
    entries.set(name, scanEntry(scanner, name));
  });
  scanner.end();
  return { metadata: metadata ?? new Map(), entries };
}
