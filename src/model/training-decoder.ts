// Loss and gradients of one adapter over a frozen decoder: loss-graph.ts forward, and backward by the tape. Recorded once, replayed
// each step. The update of what is trained is the caller's.

import { Tape } from '../kernels/autodiff.ts';
import { elementCount, mismatch } from '../kernels/check.ts';
import { dequantizeRows } from '../kernels/dequantize.ts';
import type {
  Kernels,
  Ops,
  Program,
  StoredTensor,
  Tensor,
  WeightType,
} from '../kernels/kernels.ts';
import { projections } from './decoder-config.ts';
import {
  batchShare,
  LossGraph,
  type LossOptions,
  type RunBlock,
  type Seen,
  type TrainingBatch,
} from './loss-graph.ts';
import type { TrainedDelta } from './trained-delta.ts';

export interface TrainingOptions extends LossOptions {
  /** Blocks are computed again on the way back instead of keeping their values. */
  readonly recompute: boolean;
}

export class TrainingDecoder implements Disposable {
  readonly #options: TrainingOptions;
  readonly #graph: LossGraph;
  readonly #transposed: ReadonlyMap<Tensor, Tensor>;
  readonly #programs: Map<TrainedDelta, Program> = new Map();
  #last: Program;

  constructor(options: TrainingOptions) {
    const { weights, kernels, recompute, delta } = options;
    if (recompute && !delta.isLocal) {
      throw mismatch('recompute', 'blocks of this kind of adapter cannot be computed again');
    }
    this.#options = options;
    this.#graph = new LossGraph(options);
    const frozen = weights.blocks.flatMap((block) => projections.map((name) => block[name]));
    this.#transposed = new Map(
      [...frozen, weights.output].map((weight) => [weight, storeTransposed(kernels, weight)]),
    );
    this.#last = this.#programOf(delta);
  }

  /** A tensor of the delta: zero until it is written. */
  write(name: string, values: Float32Array): void {
    this.#graph.write(name, values);
  }

  /** Runs forward and backward; returns the loss. What `read` gives is of this step, until another program runs. With the
   *  options' delta, or another one that trains the same tensors: few of them, each keeps a program. */
  step(batch: TrainingBatch, delta: TrainedDelta = this.#options.delta): number {
    this.#last = this.#programOf(delta);
    return this.#graph.run(this.#last, batch, delta);
  }

  /** The gradient of a trained tensor, or what the delta observed, by its name. */
  read(name: string, out: Float32Array): void {
    this.#last.read(name, 0, out);
  }

  #programOf(delta: TrainedDelta): Program {
    const known = this.#programs.get(delta);
    if (known !== undefined) return known;
    const { kernels } = this.#options;
    const made = kernels.compile((ops) => this.#build(ops, delta), { segments: 0 });
    this.#programs.set(delta, made);
    return made;
  }

  #build(ops: Ops, delta: TrainedDelta): Record<string, Tensor> {
    const names = Object.keys(this.#options.delta.trained);
    const trainable = names.map((name) => this.#graph.tensors.get(name)!);
    const tape = new Tape(ops, { trainable, transposed: this.#transposed });
    const seen: Seen = new Map();
    const run: RunBlock = (x, build) =>
      this.#options.recompute
        ? tape.checkpoint([x], (inner, [value]) => build(inner, value!))
        : build(tape, x);
    const loss = this.#graph.build(tape, run, seen, delta);
    const seeds = [{ of: loss, gradient: ops.training.fill([1], 1) }];
    for (const [name, weight] of Object.entries(delta.penalties ?? {})) {
      const gradient = ops.mul(seen.get(batchShare)!, ops.training.fill([1, 1], weight));
      seeds.push({ of: seen.get(name)!, gradient });
    }
    const gradients = tape.gradients(seeds, trainable);
    const named = names.map((name, i) => [name, gradients[i]!] as const);
    return { loss, ...Object.fromEntries([...seen, ...named]) };
  }

  /** The weights and the kernels are the caller's. */
  [Symbol.dispose](): void {
    for (const program of this.#programs.values()) program[Symbol.dispose]();
  }
}

/** A stored weight of any type in f32. */
export function readWeight(kernels: Kernels, weight: StoredTensor): Float32Array {
  const bytes = new Uint8Array(weight.bytes);
  kernels.read(weight, bytes, 0);
  const numbers = new Float32Array(elementCount(weight.shape));
  dequantizeRows(weight.dtype as WeightType, bytes, numbers);
  return numbers;
}

/** [N,K] of any type → [K,N] in f32. */
function storeTransposed(kernels: Kernels, weight: StoredTensor): StoredTensor {
  const [outer, inner] = weight.shape as [number, number];
  const numbers = readWeight(kernels, weight);
  const turned = new Float32Array(numbers.length);
  const tile = 32; // numbers a side: both sides of the copy stay in the first cache
  for (let top = 0; top < outer; top += tile) {
    for (let left = 0; left < inner; left += tile) {
      for (let n = top; n < Math.min(top + tile, outer); n++) {
        for (let k = left; k < Math.min(left + tile, inner); k++) {
          turned[k * outer + n] = numbers[n * inner + k]!;
        }
      }
    }
  }
  const stored = kernels.store('f32', [inner, outer], 'undefined');
  kernels.write(stored, new Uint8Array(turned.buffer), 0);
  return stored;
}
