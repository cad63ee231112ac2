// Draws from a posterior, made from uniform draws in [0, 1) that the caller hands in.

/** Standard normal (Box and Muller 1958). */
export function normalDraw(draw: () => number): number {
  return Math.sqrt(-2 * Math.log(1 - draw())) * Math.cos(2 * Math.PI * draw());
}

/** Marsaglia and Tsang 2000, with their boost for shapes below 1. More than 19 of 20 rounds are the last. */
function gammaDraw(shape: number, draw: () => number): number {
  if (shape < 1) return gammaDraw(shape + 1, draw) * draw() ** (1 / shape);
  const d = shape - 1 / 3;
  for (;;) {
    const x = normalDraw(draw);
    const v = (1 + x / Math.sqrt(9 * d)) ** 3;
    if (v > 0 && Math.log(1 - draw()) <= (x * x) / 2 + d * (1 - v + Math.log(v))) return d * v;
  }
}

/** Both above 0, and one of them at least 1. */
export function betaDraw(alpha: number, beta: number, draw: () => number): number {
  const a = gammaDraw(alpha, draw);
  return a / (a + gammaDraw(beta, draw));
}

/** Φ: the share of a normal below `z`, to 2e-7 (Abramowitz and Stegun 26.2.17 by way of its density). */
export function normalShare(z: number): number {
  const t = 1 / (1 + 0.2316419 * Math.abs(z));
  const series =
    t *
    (0.31938153 + t * (-0.356563782 + t * (1.781477937 + t * (-1.821255978 + t * 1.330274429))));
  const tail = (Math.exp((-z * z) / 2) / Math.sqrt(2 * Math.PI)) * series;
  return z < 0 ? tail : 1 - tail;
}
