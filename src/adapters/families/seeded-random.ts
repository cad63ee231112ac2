// Random numbers that every process on every machine makes alike: Philox4x32-10 (Salmon et al., "Parallel random numbers: as
// easy as 1, 2, 3", SC 2011) keyed by a 64-bit seed; the counter is (n-th block, 0, stream). Normals by Marsaglia's polar
// method over a logarithm of our own: only integers and + - * / sqrt, which IEEE 754 rounds one way; Math.log may differ.

/** Draws in order. A stream is good for 2^32 blocks of 128 bits. */
export interface Random {
  /** Uniform in (0, 1): odd multiples of 2^-53. */
  uniform(): number;
  /** Uniform in 0 … limit-1, without bias; limit ≤ 2^32. */
  below(limit: number): number;
  normal(): number;
}

/** `stream` keeps apart what draws from one seed: two words, say module and row. */
export function createRandom(seed: bigint, stream: readonly [number, number] = [0, 0]): Random {
  const key = [Number(seed & 0xffffffffn), Number((seed >> 32n) & 0xffffffffn)] as const;
  const words = new Uint32Array(4);
  let block = 0;
  let used = words.length;
  let spare: number | null = null;
  const next = (): number => {
    if (used === words.length) {
      words.set([block++, 0, stream[0], stream[1]]);
      philox4x32(words, key);
      used = 0;
    }
    return words[used++]!;
  };
  const uniform = (): number => {
    const high = next() >>> 6;
    const low = next() >>> 6;
    return (2 * (high * 2 ** 26 + low) + 1) * 2 ** -53;
  };
  return {
    uniform,
    below(limit) {
      const bound = 2 ** 32 - (2 ** 32 % limit);
      for (;;) {
        const word = next();
        if (word < bound) return word % limit;
      }
    },
    normal() {
      if (spare !== null) {
        const value = spare;
        spare = null;
        return value;
      }
      for (;;) {
        const u = 2 * uniform() - 1; // Never 0: an odd multiple of 2^-52 less 1.
        const v = 2 * uniform() - 1;
        const s = u * u + v * v;
        if (s >= 1) continue;
        const factor = Math.sqrt((-2 * logarithm(s)) / s);
        spare = v * factor;
        return u * factor;
      }
    },
  };
}

const multipliers = [0xd2511f53, 0xcd9e8d57] as const;
const weyl = [0x9e3779b9, 0xbb67ae85] as const;

/** Ten rounds, in place. */
export function philox4x32(words: Uint32Array, key: readonly [number, number]): void {
  let [c0, c1, c2, c3] = words as unknown as [number, number, number, number];
  let [k0, k1] = key;
  for (let round = 0; round < 10; round++) {
    const high0 = highWord(multipliers[0], c0);
    const high1 = highWord(multipliers[1], c2);
    const low0 = Math.imul(multipliers[0], c0);
    const low1 = Math.imul(multipliers[1], c2);
    c0 = (high1 ^ c1 ^ k0) >>> 0;
    c1 = low1 >>> 0;
    c2 = (high0 ^ c3 ^ k1) >>> 0;
    c3 = low0 >>> 0;
    k0 = (k0 + weyl[0]) >>> 0;
    k1 = (k1 + weyl[1]) >>> 0;
  }
  words.set([c0, c1, c2, c3]);
}

/** Upper 32 bits of x·y: every product below stays under 2^49, exact in f64. */
function highWord(x: number, y: number): number {
  const low = Math.floor((x * (y & 0xffff)) / 65_536);
  return Math.floor((x * (y >>> 16) + low) / 65_536);
}

/** ln x for x in (0, 1): x = m·2^e with m in [√½, √2), ln m = 2 artanh((m-1)/(m+1)). Error below 1e-15 of the result's size
 *  or of 1. */
function logarithm(x: number): number {
  let m = x;
  let e = 0;
  for (; m < Math.SQRT1_2; e--) m *= 2;
  const z = (m - 1) / (m + 1); // |z| ≤ 0.1716, so z^23 is below the last bit.
  const square = z * z;
  let sum = 0;
  for (let n = 21; n >= 1; n -= 2) sum = sum * square + 1 / n;
  return 2 * z * sum + e * Math.LN2;
}
