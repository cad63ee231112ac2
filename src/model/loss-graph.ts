// Loss of one adapter over a frozen decoder: a batch of windows of tokens through the same blocks as serving (decoder-block.ts),
// with what is trained at every projection (trained-delta.ts). TrainingDecoder adds the way back.
//
// Sizes: B windows of L rows, T = B·L rows, R ranks.

import { mismatch } from '../kernels/check.ts';
import type { ForwardOps, Kernels, Program, StoredTensor, Tensor } from '../kernels/kernels.ts';
import { causalMask } from '../kernels/training-ops.ts';
import type { DecoderWeights } from './decoder.ts';
import { type BlockParts, decoderBlock } from './decoder-block.ts';
import type { DecoderConfig } from './decoder-config.ts';
import { type TrainedDelta, tensorName } from './trained-delta.ts';

export interface LossOptions {
  readonly config: DecoderConfig;
  readonly weights: DecoderWeights;
  readonly kernels: Kernels;
  /** Its tensors are zero until they are written. */
  readonly delta: TrainedDelta;
  readonly windows: number; // B
  readonly windowRows: number; // L
  /** Most rows of a batch whose next token is learnt: only they pay for logits. */
  readonly answersMax: number;
}

export interface TrainingBatch {
  readonly tokens: Int32Array; // [T]
  /** The number of each row's sequence [T]: equal, adjacent rows of a window see each other causally. */
  readonly sequences: Int32Array;
  /** [T,R], R at least the delta's largest gate rank: what each rank of each row is multiplied with, 0 beyond the row's rank. */
  readonly gate: Float32Array;
  readonly answers: readonly Answer[];
}

export interface Answer {
  readonly row: number;
  readonly target: number;
  /** Of its loss in the sum: 1 / answers for a mean. */
  readonly weight: number;
}

/** What the delta observes, by tensorName. */
export type Seen = Map<string, Tensor>;
/** Where a delta has penalties, among what is seen: the sum of the answers' weights, by which a batch counts in a mean. */
export const batchShare = 'share of the batch';
/** Computes a block, given its input and how it is made of ops. */
export type RunBlock = (x: Tensor, build: (on: ForwardOps, value: Tensor) => Tensor) => Tensor;

interface PassParts {
  readonly mask: Tensor; // [B, L, L]
  readonly gates: ReadonlyMap<number, Tensor>; // [T, ranks] each
  readonly seen: Seen;
  readonly delta: TrainedDelta;
}

/** What programs over one delta share: its tensors, their inputs and how the loss is computed. */
export class LossGraph {
  readonly tensors: ReadonlyMap<string, StoredTensor>;
  readonly #options: LossOptions;

  constructor(options: LossOptions) {
    const { delta, kernels } = options;
    this.#options = options;
    this.tensors = new Map(
      Object.entries({ ...delta.trained, ...delta.constants }).map(([name, shape]) => [
        name,
        kernels.store('f32', shape),
      ]),
    );
  }

  /** A tensor of the delta. */
  write(name: string, { buffer, byteOffset, byteLength }: Float32Array): void {
    const tensor = this.tensors.get(name);
    if (tensor === undefined) throw mismatch('write', `the delta has no tensor ${name}`);
    this.#options.kernels.write(tensor, new Uint8Array(buffer, byteOffset, byteLength), 0);
  }

  /** Runs a program whose loss this is. */
  run(
    program: Program,
    { tokens, sequences, gate, answers }: TrainingBatch,
    delta: TrainedDelta = this.#options.delta,
  ): number {
    const { windowRows, answersMax } = this.#options;
    if (answers.length > answersMax) {
      throw mismatch('step', `at most ${answersMax} answers wanted, got ${answers.length}`);
    }
    const column = (of: (answer: Answer) => number): number[] =>
      Array.from({ length: answersMax }, (_, i) => (i < answers.length ? of(answers[i]!) : 0));
    program.write('tokens', tokens);
    program.write('positions', positionsOf(sequences, windowRows));
    program.write('mask', causalMask(sequences, windowRows));
    for (const rank of delta.gateRanks) {
      program.write(gateName(rank), firstRanks(gate, tokens.length, rank));
    }
    program.write('rows', Int32Array.from(column(({ row }) => row)));
    program.write('targets', Int32Array.from(column(({ target }) => target)));
    program.write('weights', Float32Array.from(column(({ weight }) => weight)));
    program.run([]);
    const loss = new Float32Array(1);
    program.read('loss', 0, loss);
    return loss[0]!;
  }

  /** [1]. Declares the inputs that `run` writes. `delta`: another one over the same tensors. */
  build(
    ops: ForwardOps,
    run: RunBlock,
    seen: Seen,
    delta: TrainedDelta = this.#options.delta,
  ): Tensor {
    const { answersMax, config, weights, windows, windowRows } = this.#options;
    const rows = windows * windowRows;
    const tokens = ops.input('tokens', 'i32', [rows]);
    const positions = ops.input('positions', 'i32', [rows]);
    const mask = ops.input('mask', 'f32', [windows, windowRows, windowRows]);
    const gates = new Map(
      delta.gateRanks.map((rank) => [rank, ops.input(gateName(rank), 'f32', [rows, rank])]),
    );
    let x = ops.embed(weights.tokenEmbedding, tokens); // [T, E]
    weights.blocks.forEach((norms, block) => {
      x = run(x, (on, value) => {
        const parts = this.#parts(on, block, { mask, gates, seen, delta });
        return decoderBlock(on, { config, norms, positions }, value, parts);
      });
    });
    const learnt = ops.input('rows', 'i32', [answersMax]);
    const last = ops.gatherRows(x, learnt); // [answers, E]
    const normed = ops.rmsNorm(last, weights.outputNorm, config.normEps); // [answers, E]
    const logits = ops.linear(normed, weights.output); // [answers, V]
    const targets = ops.input('targets', 'i32', [answersMax]);
    const shares = ops.input('weights', 'f32', [answersMax]);
    if (delta.penalties !== undefined) {
      const row = ops.reshape(shares, [1, answersMax]);
      seen.set(batchShare, ops.training.linearT(row, ops.training.fill([answersMax, 1], 1))); // [1, 1]
    }
    return ops.training.crossEntropy(logits, targets, shares); // [1]
  }

  #parts(ops: ForwardOps, block: number, { mask, gates, seen, delta }: PassParts): BlockParts {
    const { config, weights } = this.#options;
    return {
      project: (x, names) =>
        names.map((projection) => {
          const module = { block, projection };
          const y = ops.linear(x, weights.blocks[block]![projection]); // [T, out]
          return delta.add(ops, (name) => this.tensors.get(name)!, {
            ...module,
            x,
            y,
            gate: (rank) => gates.get(rank)!,
            observe: (name, value) => {
              // A block that is computed again on the way back observes nothing new.
              const full = tensorName(module, name);
              if (!seen.has(full)) seen.set(full, value);
            },
          });
        }),
      attend: (q, k, v) => {
        const split = ops.reshape(v, [v.shape[0]!, config.kvHeads, config.headSize]);
        return ops.training.attendSelf(q, k, split, mask); // [T, H·D]
      },
    };
  }
}

/** The loss alone. The weights and the kernels are the caller's. */
export class LossDecoder implements Disposable {
  readonly #options: LossOptions;
  readonly #graph: LossGraph;
  readonly #programs: Map<TrainedDelta, Program> = new Map();

  constructor(options: LossOptions) {
    this.#options = options;
    this.#graph = new LossGraph(options);
  }

  write(name: string, values: Float32Array): void {
    this.#graph.write(name, values);
  }

  /** With the options' delta, or another one over its tensors: few of them, each keeps a program. */
  evaluate(batch: TrainingBatch, delta: TrainedDelta = this.#options.delta): number {
    const program = this.#programs.get(delta) ?? this.#compile(delta);
    this.#programs.set(delta, program);
    return this.#graph.run(program, batch, delta);
  }

  #compile(delta: TrainedDelta): Program {
    return this.#options.kernels.compile(
      (ops) => ({ loss: this.#graph.build(ops, (x, build) => build(ops, x), new Map(), delta) }),
      { segments: 0 },
    );
  }

  [Symbol.dispose](): void {
    for (const program of this.#programs.values()) program[Symbol.dispose]();
  }
}

/** Of each row in its sequence. */
export function positionsOf(sequences: Int32Array, windowRows: number): Int32Array {
  const positions = new Int32Array(sequences.length);
  for (let row = 1; row < positions.length; row++) {
    const goes = row % windowRows !== 0 && sequences[row] === sequences[row - 1];
    positions[row] = goes ? positions[row - 1]! + 1 : 0;
  }
  return positions;
}

function gateName(rank: number): string {
  return `gate of ${rank}`;
}

/** [T,R] → [T,ranks]. */
function firstRanks(gate: Float32Array, rows: number, ranks: number): Float32Array {
  const all = gate.length / rows;
  if (all === ranks) return gate;
  if (!(all > ranks)) throw mismatch('gate', `at least ${ranks} ranks a row wanted, got ${all}`);
  const first = new Float32Array(rows * ranks);
  for (let row = 0; row < rows; row++) {
    first.set(gate.subarray(row * all, row * all + ranks), row * ranks);
  }
  return first;
}
