// Draw i of seed s is a function of (s, i) alone, so a sequence resumed after an engine death continues as it would
// have, whatever ran beside it. Philox2x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).

const multiplier = 0xd256d193;
const weyl = 0x9e3779b9;
const rounds = 10;

/** The two output words for counter (c0, c1) and key, all uint32. */
export function philox2x32(c0: number, c1: number, key: number): readonly [number, number] {
  let x = c0 >>> 0;
  let y = c1 >>> 0;
  let k = key >>> 0;
  for (let round = 0; round < rounds; round++) {
    const high = Number((BigInt(multiplier) * BigInt(x)) >> 32n);
    const low = Math.imul(multiplier, x) >>> 0;
    x = (high ^ k ^ y) >>> 0;
    y = low;
    k = (k + weyl) >>> 0;
  }
  return [x, y];
}

/** Uniform in [0, 1), 53 bits. */
export function drawUniform(seed: number, index: number): number {
  const [a, b] = philox2x32(index, 0, seed);
  return ((a >>> 5) * 0x4000000 + (b >>> 6)) / 0x20000000000000;
}
