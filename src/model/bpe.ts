// Byte-level BPE: merges the bytes of one word into tokens, lowest merge rank first, leftmost first among equals. The
// result is llama.cpp's (llm_tokenizer_bpe_session); the time is O(n log n) in the word's bytes, whatever they are.

import { GatewayError } from '../errors.ts';

export interface Merger {
  /** Appends the word's tokens to `output`. */
  merge(word: string, output: TokenBuffer): void;
}

export interface BpeVocabulary {
  readonly tokens: readonly string[];
  /** Pairs in rank order, `left right` in the byte alphabet. */
  readonly merges: readonly string[];
  /** Tokens that text never becomes, whatever the merges say. */
  readonly isSpecial: (token: number) => boolean;
  readonly ignoresMerges: boolean;
}

/** A growing run of tokens with an end: pushing past `max` throws CONTEXT_LENGTH_EXCEEDED. */
export class TokenBuffer {
  readonly #max: number;
  readonly #tokens: number[] = [];

  constructor(max: number) {
    this.#max = max;
  }

  push(token: number): void {
    if (this.#tokens.length === this.#max) {
      throw new GatewayError(
        'CONTEXT_LENGTH_EXCEEDED',
        `the text has more than ${this.#max} tokens, the most that the context holds`,
      );
    }
    this.#tokens.push(token);
  }

  finish(): Int32Array<ArrayBuffer> {
    return Int32Array.from(this.#tokens);
  }
}

/** GPT-2's alphabet: byte → the printable character that stands for it in vocabularies. */
export const byteCharacters: readonly string[] = (() => {
  const isPrintable = (byte: number): boolean =>
    (byte >= 0x21 && byte <= 0x7e) || (byte >= 0xa1 && byte <= 0xac) || byte >= 0xae;
  let others = 0;
  return Array.from({ length: 256 }, (_, byte) =>
    String.fromCharCode(isPrintable(byte) ? byte : 256 + others++),
  );
})();

// A heap key is rank * wordBytesMax + position: exact in a double while ranks stay below 2^29.
const wordBytesMax: number = 2 ** 24;
const none = -1;

export function createMerger(vocabulary: BpeVocabulary): Merger {
  const symbols = internSymbols(vocabulary);
  const pairs = createPairTable(vocabulary.merges, symbols.idOf);
  const byteSymbols = Int32Array.from(byteCharacters, (character) => symbols.idOf(character));
  const encoder = new TextEncoder();
  const run = createRun(pairs);

  return {
    merge(word, output) {
      const bytes = encoder.encode(word);
      if (bytes.length >= wordBytesMax) {
        throw new GatewayError('CONTEXT_LENGTH_EXCEEDED', `one word has ${bytes.length} bytes`);
      }
      if (vocabulary.ignoresMerges) {
        let spelled = '';
        for (const byte of bytes) spelled += byteCharacters[byte]!;
        const whole = symbols.tokenOf(spelled);
        if (whole !== undefined) return output.push(whole);
      }
      const merged = run(bytes, byteSymbols);
      for (const symbol of merged) for (const token of symbols.tokensOf(symbol)) output.push(token);
    },
  };
}

interface Symbols {
  /** The number of a string that merges may produce; gives it one when it is new. */
  idOf(text: string): number;
  tokenOf(text: string): number | undefined;
  /** What a symbol is written as: itself when it is a token, else what llama.cpp falls back to. */
  tokensOf(symbol: number): readonly number[];
}

function internSymbols({ tokens, isSpecial }: BpeVocabulary): Symbols {
  const ids = new Map<string, number>();
  const texts: string[] = [];
  const written: (readonly number[] | undefined)[] = [];
  const tokenIds = new Map<string, number>();
  tokens.forEach((text, token) => {
    if (!isSpecial(token)) tokenIds.set(text, token);
  });
  const write = (text: string): readonly number[] => {
    const token = tokenIds.get(text);
    if (token !== undefined) return [token];
    // llama.cpp looks each UTF-8 byte of the alphabet's spelling up by itself: only the ASCII part of it can be found,
    // the rest is dropped. It takes a vocabulary without all 256 bytes to get here.
    const ascii = [...text].filter((character) => character < '\u0080');
    return ascii.flatMap((character) => tokenIds.get(character) ?? []);
  };
  return {
    idOf(text) {
      const known = ids.get(text);
      if (known !== undefined) return known;
      ids.set(text, texts.length);
      texts.push(text);
      return texts.length - 1;
    },
    tokenOf: (text) => tokenIds.get(text),
    tokensOf(symbol) {
      written[symbol] ??= write(texts[symbol]!);
      return written[symbol];
    },
  };
}

interface PairTable {
  /** The rank of the merge of two symbols, or -1. */
  rankOf(left: number, right: number): number;
  /** The symbol that the merge of this rank makes. */
  readonly products: Int32Array;
}

/** Open addressing in flat arrays: a Map keyed by a number beyond 2^31 allocates on every look-up. */
function createPairTable(merges: readonly string[], idOf: (text: string) => number): PairTable {
  const mask = 2 ** Math.ceil(Math.log2(merges.length * 2 + 2)) - 1;
  const lefts = new Int32Array(mask + 1);
  const rights = new Int32Array(mask + 1);
  const ranks = new Int32Array(mask + 1).fill(none);
  const products = new Int32Array(merges.length);
  const slotOf = (left: number, right: number): number => {
    let slot = (Math.imul(left, 0x9e3779b1) ^ Math.imul(right, 0x85ebca6b)) & mask;
    while (ranks[slot] !== none && (lefts[slot] !== left || rights[slot] !== right)) {
      slot = (slot + 1) & mask;
    }
    return slot;
  };
  merges.forEach((merge, rank) => {
    const cutAt = merge.indexOf(' ', 1);
    if (cutAt < 0 || cutAt === merge.length - 1) {
      throw new GatewayError('INVALID_MODEL_FILE', `merge ${rank} is not two parts: '${merge}'`);
    }
    const [left, right] = [merge.slice(0, cutAt), merge.slice(cutAt + 1)];
    products[rank] = idOf(left + right);
    const slot = slotOf(idOf(left), idOf(right));
    if (ranks[slot] !== none) return; // the first of two equal merges counts
    lefts[slot] = idOf(left);
    rights[slot] = idOf(right);
    ranks[slot] = rank;
  });
  return { rankOf: (left, right) => ranks[slotOf(left, right)]!, products };
}

// Longer words than this get memory of their own, so that one hostile word is not paid for until the process ends.
const keptBytesMax = 4096;

/** The merge loop over reused memory; not re-entrant. */
function createRun(pairs: PairTable): (bytes: Uint8Array, byteSymbols: Int32Array) => Int32Array {
  const kept = createWork(keptBytesMax);
  return (bytes, byteSymbols) => {
    const count = bytes.length;
    const { symbols, next, previous, ranks, heap } =
      count <= keptBytesMax ? kept : createWork(count);
    const offer = (left: number): void => {
      const right = next[left]!;
      const rank = right === none ? none : pairs.rankOf(symbols[left]!, symbols[right]!);
      ranks[left] = rank;
      if (rank !== none) heap.push(rank * wordBytesMax + left);
    };
    for (let i = 0; i < count; i += 1) {
      symbols[i] = byteSymbols[bytes[i]!]!;
      next[i] = i + 1 < count ? i + 1 : none;
      previous[i] = i - 1;
    }
    for (let i = 0; i < count; i += 1) offer(i);
    while (heap.size > 0) {
      const key = heap.pop();
      const rank = Math.floor(key / wordBytesMax);
      const left = key - rank * wordBytesMax;
      // Left over from before one of its symbols grew: the pair that starts here now has another rank.
      if (ranks[left] !== rank) continue;
      const right = next[left]!;
      symbols[left] = pairs.products[rank]!;
      ranks[right] = none;
      next[left] = next[right]!;
      if (next[left] !== none) previous[next[left]!] = left;
      if (previous[left] !== none) offer(previous[left]!);
      offer(left);
    }
    let length = 0;
    for (let i = count === 0 ? none : 0; i !== none; i = next[i]!) {
      symbols[length] = symbols[i]!;
      length += 1;
    }
    return symbols.subarray(0, length);
  };
}

interface Work {
  readonly symbols: Int32Array;
  readonly next: Int32Array;
  readonly previous: Int32Array;
  /** Rank of the pair that starts at a position, none when there is no such merge. */
  readonly ranks: Int32Array;
  readonly heap: Heap;
}

function createWork(count: number): Work {
  const array = (): Int32Array => new Int32Array(count);
  // One entry per position at the start, and at most two per merge, of which there are fewer than positions.
  const heap = createHeap(count * 3);
  return { symbols: array(), next: array(), previous: array(), ranks: array(), heap };
}

interface Heap {
  readonly size: number;
  push(key: number): void;
  /** The smallest key. */
  pop(): number;
}

function createHeap(capacity: number): Heap {
  const keys = new Float64Array(capacity);
  let size = 0;
  return {
    get size() {
      return size;
    },
    push(key) {
      let at = size;
      size += 1;
      while (at > 0) {
        const parent = (at - 1) >> 1;
        if (keys[parent]! <= key) break;
        keys[at] = keys[parent]!;
        at = parent;
      }
      keys[at] = key;
    },
    pop() {
      const smallest = keys[0]!;
      size -= 1;
      const key = keys[size]!;
      let at = 0;
      for (let child = 1; child < size; child = 2 * at + 1) {
        if (child + 1 < size && keys[child + 1]! < keys[child]!) child += 1;
        if (keys[child]! >= key) break;
        keys[at] = keys[child]!;
        at = child;
      }
      keys[at] = key;
      return smallest;
    },
  };
}
