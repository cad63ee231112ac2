// DiffoRA (arXiv 2502.08905, algorithms.md section 2): which modules get an adapter. While it searches, what each module adds is
// times g = σ(φ/T), φ learnt from held-out examples and the pairs from the others in turn; then the first ⌈ρ·M⌉ by g stay, at 1.

import type { Parameter } from './optimizers/optimizer.ts';

export class ModuleSearch {
  /** φ [1, M]: an optimiser's parameter. */
  readonly logits: Parameter;
  readonly #temperature: number;

  constructor(modules: number, temperature: number) {
    const zeros = (): Float32Array => new Float32Array(modules);
    this.logits = {
      name: 'modules',
      rows: 1,
      columns: modules,
      values: zeros(),
      gradient: zeros(),
    };
    this.#temperature = temperature;
  }

  /** g of each module. */
  gates(): Float32Array {
    return this.logits.values.map((phi) => 1 / (1 + Math.exp(-phi / this.#temperature)));
  }

  /** φ's gradient from those of the modules' g, which codyra.ts's throughGates finds rank by rank. */
  setGradient(ofGates: readonly Float32Array[]): void {
    this.gates().forEach((g, m) => {
      const sum = ofGates[m]!.reduce((all, value) => all + value, 0);
      this.logits.gradient[m] = (sum * g * (1 - g)) / this.#temperature;
    });
  }

  /** The modules that stay, in order: ⌈ρ·M⌉ with the largest g, of equal ones the first. */
  kept(keepRatio: number): number[] {
    const gates = this.gates();
    // 1/3 of 12 is 4, and not 5 by rounding.
    const count = Math.ceil(keepRatio * gates.length - 1e-9);
    const order = Array.from(gates.keys()).sort((i, j) => gates[j]! - gates[i]! || i - j);
    return order.slice(0, count).sort((i, j) => i - j);
  }
}
