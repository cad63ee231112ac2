// CoDyRA's choice of ranks (arXiv 2412.01004): y += B·(g ⊙ A·x), and after a dense phase each step pulls the gates g towards
// zero by a growing threshold. Ranks whose gates reach zero are gone; the others' gates give their order. The reference
// zeroes gates below the threshold once more after it took it off; that is not what the formula says, and not done here. Nor
// is what was learnt merged into the base, which all adapters share.

import { type Family, pairFamily } from '../adapters/families/family.ts';
import { type LoraOptions, lora } from '../adapters/families/lora.ts';
import { filled, picked } from '../adapters/families/matrices.ts';
import { GatewayError } from '../errors.ts';
import type { TrainedModule } from './family-graph.ts';
import type { Parameter } from './optimizers/optimizer.ts';

/** A lora whose ranks have gates of their own, which train with it: s·(g ⊙ B)·A, g drawn from N(0, 1). */
export function gatedLora(options: LoraOptions): Family {
  const plain = lora(options);
  return pairFamily({
    kind: 'lora',
    describe: `${plain.describe}, its ranks chosen by CoDyRA`,
    axes: { ...plain.axes, g: ['rank', 1] },
    trained: [...plain.trained, 'g'],
    order: options.order,
    init(site, random) {
      const pair = plain.init(site, random);
      return { ...pair, g: filled(options.rank, 1, () => random.normal()) };
    },
    pair(site, tensors, k) {
      const pair = plain.pair(site, tensors, k);
      const g = tensors.g!.data;
      return {
        ...pair,
        gates: pair.gates.map((scale, r) => scale * g[r]!),
        gradient(d) {
          const data = d.gates.map((value, r) => value * pair.gates[r]!);
          return { ...pair.gradient(d), g: { rows: 1, columns: data.length, data } };
        },
      };
    },
  });
}

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

/** What is done to the gates among the parameters after a step. */
export function shrinkRanks(parameters: readonly Parameter[], threshold: number): void {
  for (const { name, values } of parameters)
    if (name.endsWith('.g')) shrinkGates(values, threshold);
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
export function keptRanks(gates: Float32Array | Float64Array): number[] {
  const size = (r: number): number => Math.abs(gates[r]!);
  return Array.from(gates.keys())
    .filter((r) => size(r) > 0)
    .sort((x, y) => size(y) - size(x) || x - y);
}

/** The modules without the ranks that are gone, and without those that have none left. Throws INVALID_ADAPTER when nothing is. */
export function openModules(modules: readonly TrainedModule[]): TrainedModule[] {
  const open = modules.flatMap(({ site, tensors }) => {
    const order = keptRanks(tensors.g!.data);
    const kept = Object.entries(tensors).map(([name, x]) => [name, picked(x, order)] as const);
    return order.length === 0 ? [] : [{ site, tensors: Object.fromEntries(kept) }];
  });
  if (open.length > 0) return open;
  const message = 'codyra: the threshold has closed every gate: a smaller thresholdMax is wanted';
  throw new GatewayError('INVALID_ADAPTER', message, { param: 'rankSelection.thresholdMax' });
}
