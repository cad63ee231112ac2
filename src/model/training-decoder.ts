// Loss and gradients of one adapter over a frozen decoder: a batch of windows of tokens through the same blocks as serving
// (decoder-block.ts), a low-rank delta at every projection, backward by the tape. Recorded once, replayed each step.
//
// Sizes: B windows of L rows, T = B·L rows, R ranks. The update of the factors is the caller's.

import { Tape } from '../kernels/autodiff.ts';
import { elementCount, mismatch } from '../kernels/check.ts';
import { dequantizeRows } from '../kernels/dequantize.ts';
import type {
  ForwardOps,
  Kernels,
  Ops,
  Program,
  StoredTensor,
  Tensor,
  WeightType,
} from '../kernels/kernels.ts';
import { causalMask } from '../kernels/training-ops.ts';
import type { DecoderWeights } from './decoder.ts';
import { type BlockParts, decoderBlock } from './decoder-block.ts';
import {
  type DecoderConfig,
  type Projection,
  projectionShape,
  projections,
} from './decoder-config.ts';

export interface TrainingOptions {
  readonly config: DecoderConfig;
  readonly weights: DecoderWeights;
  readonly kernels: Kernels;
  readonly rank: number; // R
  /** The projections that have a delta. */
  readonly targets: readonly Projection[];
  readonly windows: number; // B
  readonly windowRows: number; // L
  /** Most rows of a batch whose next token is learnt: only they pay for logits. */
  readonly answersMax: number;
  /** Blocks are computed again on the way back instead of keeping their values. */
  readonly recompute: boolean;
}

export interface TrainingBatch {
  readonly tokens: Int32Array; // [T]
  /** The number of each row's sequence [T]: equal, adjacent rows of a window see each other causally. */
  readonly sequences: Int32Array;
  /** [T,R]: what each rank of each row is multiplied with, 0 beyond the row's rank. */
  readonly gate: Float32Array;
  readonly answers: readonly Answer[];
}

export interface Answer {
  readonly row: number;
  readonly target: number;
  /** Of its loss in the sum: 1 / answers for a mean. */
  readonly weight: number;
}

/** The trained factors of one projection; A x goes in, Bᵀ comes out: both rank-major, so a prefix is one range. */
export interface LowRankFactors {
  readonly a: StoredTensor; // [R, in]
  readonly b: StoredTensor; // [R, out]
}

export function factorName(block: number, projection: Projection, factor: 'a' | 'b'): string {
  return `blk.${block}.${projection}.${factor}`;
}

export class TrainingDecoder implements Disposable {
  /** By block; zero until they are written with Kernels.write. */
  readonly factors: ReadonlyArray<Readonly<Partial<Record<Projection, LowRankFactors>>>>;
  readonly #options: TrainingOptions;
  readonly #transposed: ReadonlyMap<Tensor, Tensor>;
  readonly #program: Program;
  #forward: Program | undefined;

  constructor(options: TrainingOptions) {
    const { config, weights, kernels, rank, targets } = options;
    this.#options = options;
    this.factors = weights.blocks.map(() =>
      Object.fromEntries(
        targets.map((projection) => {
          const shape = projectionShape(config, projection);
          const a = kernels.store('f32', [rank, shape.in]);
          return [projection, { a, b: kernels.store('f32', [rank, shape.out]) }];
        }),
      ),
    );
    const frozen = weights.blocks.flatMap((block) => projections.map((name) => block[name]));
    this.#transposed = new Map(
      [...frozen, weights.output].map((weight) => [weight, storeTransposed(kernels, weight)]),
    );
    this.#program = kernels.compile((ops) => this.#build(ops), { segments: 0 });
  }

  /** Runs forward and backward; returns the loss. Gradients are read with `gradient` until the next step. */
  step(batch: TrainingBatch): number {
    return this.#run(this.#program, batch);
  }

  /** The loss alone. Gradients of the last step are no longer to be read. */
  evaluate(batch: TrainingBatch): number {
    this.#forward ??= this.#options.kernels.compile((ops) => this.#forwardOnly(ops), {
      segments: 0,
    });
    return this.#run(this.#forward, batch);
  }

  #run(program: Program, { tokens, sequences, gate, answers }: TrainingBatch): number {
    const { windowRows, answersMax } = this.#options;
    if (answers.length > answersMax) {
      throw mismatch('step', `at most ${answersMax} answers wanted, got ${answers.length}`);
    }
    const positions = new Int32Array(sequences.length);
    for (let row = 1; row < positions.length; row++) {
      const goes = row % windowRows !== 0 && sequences[row] === sequences[row - 1];
      positions[row] = goes ? positions[row - 1]! + 1 : 0;
    }
    const column = (of: (answer: Answer) => number): number[] =>
      Array.from({ length: answersMax }, (_, i) => (i < answers.length ? of(answers[i]!) : 0));
    program.write('tokens', tokens);
    program.write('positions', positions);
    program.write('mask', causalMask(sequences, windowRows));
    program.write('gate', gate);
    program.write('rows', Int32Array.from(column(({ row }) => row)));
    program.write('targets', Int32Array.from(column(({ target }) => target)));
    program.write('weights', Float32Array.from(column(({ weight }) => weight)));
    program.run([]);
    const loss = new Float32Array(1);
    program.read('loss', 0, loss);
    return loss[0]!;
  }

  gradient(name: string, out: Float32Array): void {
    this.#program.read(name, 0, out);
  }

  #forwardOnly(ops: Ops): Record<string, Tensor> {
    return { loss: this.#loss(ops, (x, build) => build(ops, x)) };
  }

  #build(ops: Ops): Record<string, Tensor> {
    const trainable = this.factors.flatMap((block) => Object.values(block)).flatMap(Object.values);
    const tape = new Tape(ops, { trainable, transposed: this.#transposed });
    const loss = this.#loss(tape, (x, build) =>
      this.#options.recompute
        ? tape.checkpoint([x], (inner, [value]) => build(inner, value!))
        : build(tape, x),
    );
    const one = ops.training.fill([1], 1);
    const gradients = tape.gradients([{ of: loss, gradient: one }], trainable);
    const names = this.factors.flatMap((block, i) =>
      Object.keys(block).flatMap((name) =>
        (['a', 'b'] as const).map((factor) => factorName(i, name as Projection, factor)),
      ),
    );
    return { loss, ...Object.fromEntries(names.map((name, i) => [name, gradients[i]!])) };
  }

  /** `run` computes a block, given its input and how it is made of ops. */
  #loss(
    ops: ForwardOps,
    run: (x: Tensor, build: (on: ForwardOps, value: Tensor) => Tensor) => Tensor,
  ): Tensor {
    const { answersMax, config, weights } = this.#options;
    const inputs = this.#inputs(ops);
    let x = ops.embed(weights.tokenEmbedding, inputs.tokens); // [T, E]
    weights.blocks.forEach((norms, i) => {
      const { positions } = inputs;
      x = run(x, (on, value) =>
        decoderBlock(on, { config, norms, positions }, value, this.#parts(on, i, inputs)),
      );
    });
    const rows = ops.input('rows', 'i32', [answersMax]);
    const last = ops.gatherRows(x, rows); // [answers, E]
    const normed = ops.rmsNorm(last, weights.outputNorm, config.normEps); // [answers, E]
    const logits = ops.linear(normed, weights.output); // [answers, V]
    const targets = ops.input('targets', 'i32', [answersMax]);
    const shares = ops.input('weights', 'f32', [answersMax]);
    return ops.training.crossEntropy(logits, targets, shares); // [1]
  }

  #inputs(ops: ForwardOps): Record<'tokens' | 'positions' | 'mask' | 'gate', Tensor> {
    const { windows, windowRows, rank } = this.#options;
    const rows = windows * windowRows;
    return {
      tokens: ops.input('tokens', 'i32', [rows]),
      positions: ops.input('positions', 'i32', [rows]),
      mask: ops.input('mask', 'f32', [windows, windowRows, windowRows]),
      gate: ops.input('gate', 'f32', [rows, rank]),
    };
  }

  #parts(
    ops: ForwardOps,
    block: number,
    { mask, gate }: Record<'mask' | 'gate', Tensor>,
  ): BlockParts {
    const { config, weights } = this.#options;
    return {
      project: (x, names) =>
        names.map((name) => {
          const y = ops.linear(x, weights.blocks[block]![name]); // [T, out]
          const factors = this.factors[block]![name];
          if (factors === undefined) return y;
          const { a, b } = factors;
          const h = ops.mul(ops.linear(x, a), gate); // [T, R]
          return ops.add(y, ops.training.linearT(h, b));
        }),
      attend: (q, k, v) => {
        const split = ops.reshape(v, [v.shape[0]!, config.kvHeads, config.headSize]);
        return ops.training.attendSelf(q, k, split, mask); // [T, H·D]
      },
    };
  }

  /** The weights and the kernels are the caller's. */
  [Symbol.dispose](): void {
    this.#program[Symbol.dispose]();
    this.#forward?.[Symbol.dispose]();
  }
}

/** [N,K] of any type → [K,N] in f32. */
function storeTransposed(kernels: Kernels, weight: StoredTensor): StoredTensor {
  const [outer, inner] = weight.shape as [number, number];
  const bytes = new Uint8Array(weight.bytes);
  kernels.read(weight, bytes, 0);
  const numbers = new Float32Array(elementCount(weight.shape));
  dequantizeRows(weight.dtype as WeightType, bytes, numbers);
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
