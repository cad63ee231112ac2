// What sampling reads of a whole row of logits, by blocks of 64 so that the rest looks at a few blocks only: in plain
// JavaScript here, in C where there is a compiler (ggml/native/sampling.c). Both give the same to the last digits.

export const blockNumbers = 64;

export interface RowMath {
  /** Writes the largest number of every block; false when one is NaN or infinite. */
  maxima(row: Float32Array, maxima: Float32Array): boolean;
  /** Writes `Σ exp((x - max) · inverse)` of every block; returns the sum of these. */
  masses(row: Float32Array, scale: RowScale, masses: Float64Array): number;
}

export interface RowScale {
  /** Of the row, and of its blocks. */
  readonly max: number;
  readonly maxima: Float32Array;
  /** 1 ÷ temperature. */
  readonly inverse: number;
}

/** A block wholly so far below the maximum counts as 0: all such together are below 1e-14 of the sum. */
const depthMax = 45;

export function leastMaximum({ max, inverse }: RowScale): number {
  return max - depthMax / inverse;
}

export const plainRowMath: RowMath = {
  maxima(row, maxima) {
    let poison = 0;
    for (let block = 0, i = 0; i < row.length; block++) {
      const end = Math.min(i + blockNumbers, row.length);
      let max = Number.NEGATIVE_INFINITY;
      for (; i < end; i++) {
        const x = row[i]!;
        poison += x * 0; // NaN for NaN and infinities, and NaN stays
        if (x > max) max = x;
      }
      maxima[block] = max;
    }
    return poison === 0;
  },
  masses(row, scale, masses) {
    const { max, maxima, inverse } = scale;
    const least = leastMaximum(scale);
    let total = 0;
    for (let block = 0; block < masses.length; block++) {
      let mass = 0;
      if (maxima[block]! >= least) {
        const end = Math.min((block + 1) * blockNumbers, row.length);
        for (let i = block * blockNumbers; i < end; i++)
          mass += Math.exp((row[i]! - max) * inverse);
      }
      masses[block] = mass;
      total += mass;
    }
    return total;
  },
};
