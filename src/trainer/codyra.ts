// CoDyRA's choice of ranks (arXiv 2412.01004): y += B·(g ⊙ A·x), and after a dense phase each step pulls the gates g towards
// zero by a growing threshold. Ranks whose gates reach zero are gone; the others' gates give their order. The reference
// zeroes gates below the threshold once more after it took it off; that is not what the formula says, and not done here.

/** The proximal step of threshold·|g|: sign(g)·max(|g| − threshold, 0). */
export function shrinkGates(gates: Float32Array | Float64Array, threshold: number): void {
  for (let i = 0; i < gates.length; i++) {
    gates[i] = Math.sign(gates[i]!) * Math.max(Math.abs(gates[i]!) - threshold, 0);
  }
}

export interface ThresholdOptions {
  /** Share of the steps without a threshold. */
  readonly denseShare: number;
  /** What it rises to in the last step. */
  readonly thresholdMax: number;
}

/** Of step 0 … steps-1: 0, then in a line from 0. */
export function thresholdAt(step: number, steps: number, options: ThresholdOptions): number {
  const first = Math.ceil(options.denseShare * steps);
  if (step <= first) return 0;
  return (options.thresholdMax * (step - first)) / Math.max(1, steps - 1 - first);
}

/** g ⊙ B, a row times its gate: what a module without gates computes the same with. */
export function gatedRows(b: Float32Array, gates: Float32Array, out: Float32Array): void {
  const width = b.length / gates.length;
  for (let i = 0; i < b.length; i++) out[i] = gates[Math.floor(i / width)]! * b[i]!;
}

export interface Gated {
  readonly b: Float32Array; // [R, out]
  readonly gates: Float32Array; // [R]
}

/** From the gradient of g ⊙ B to those of B and of g. */
export function throughGates(
  { b, gates }: Gated,
  gradient: Float32Array, // [R, out]
  out: Gated,
): void {
  const width = b.length / gates.length;
  for (let r = 0; r < gates.length; r++) {
    let sum = 0;
    for (let i = r * width; i < (r + 1) * width; i++) {
      sum += gradient[i]! * b[i]!;
      out.b[i] = gates[r]! * gradient[i]!;
    }
    out.gates[r] = sum;
  }
}

/** Ranks with a gate, the largest first. */
export function keptRanks(gates: Float32Array): number[] {
  const size = (r: number): number => Math.abs(gates[r]!);
  return Array.from(gates.keys())
    .filter((r) => size(r) > 0)
    .sort((x, y) => size(y) - size(x) || x - y);
}
