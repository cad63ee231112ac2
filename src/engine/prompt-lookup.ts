// What followed the last time that the end of a sequence stood in it: guesses for the next tokens, from the prompt and
// the answer alone (prompt lookup decoding, Saxena 2023; the idea of LLMA, Yang et al., arXiv:2304.04487). Longer
// matches first. The table is direct-mapped and checked against the tokens: a collision loses a guess, never makes one.

/** Lengths of the ends that are looked for, longest first. */
const matchLengths = [3, 2] as const;
/** 256 KB a sequence at most; of a longer sequence the newest occurrences stay. */
const slotsMax = 65_536;

export class PromptLookup {
  readonly #tokens: Int32Array;
  /** Hash of a match → index of the token that followed it; 0 = none, as no match ends before index 1. */
  readonly #following: Int32Array;
  #indexed = 0;

  /** Reads and writes `tokens`, which the sequence goes on filling. */
  constructor(tokens: Int32Array) {
    this.#tokens = tokens;
    const slots = 2 ** Math.ceil(Math.log2(matchLengths.length * tokens.length + 1));
    this.#following = new Int32Array(Math.min(slots, slotsMax));
  }

  /** Writes up to `max` guesses behind the first `count` tokens; returns how many. */
  propose(count: number, max: number): number {
    this.#extend(count);
    const from = this.#find(count);
    const guesses = from === 0 ? 0 : Math.min(max, this.#tokens.length - count);
    // May read guesses just written: text that repeats itself has a period, which goes on.
    for (let i = 0; i < guesses; i++) this.#tokens[count + i] = this.#tokens[from + i]!;
    return guesses;
  }

  /** Indexes every match whose following token is known by now. */
  #extend(count: number): void {
    for (let end = Math.max(this.#indexed, 1); end < count; end++) {
      for (const length of matchLengths) {
        if (length <= end) this.#following[this.#slot(end, length)] = end;
      }
    }
    this.#indexed = count;
  }

  #find(count: number): number {
    for (const length of matchLengths) {
      if (length > count) continue;
      const from = this.#following[this.#slot(count, length)]!;
      if (from >= length && this.#isMatch(from, count, length)) return from;
    }
    return 0;
  }

  #isMatch(a: number, b: number, length: number): boolean {
    for (let i = 1; i <= length; i++) if (this.#tokens[a - i] !== this.#tokens[b - i]) return false;
    return true;
  }

  /** Of the `length` tokens before `end`. */
  #slot(end: number, length: number): number {
    let hash = length;
    for (let i = 1; i <= length; i++) {
      hash = Math.imul(hash ^ this.#tokens[end - i]!, 0x9e3779b1);
      hash ^= hash >>> 15;
    }
    return hash & (this.#following.length - 1);
  }
}
