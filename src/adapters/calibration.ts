// How large the inputs of each projection are, and in which directions, on a text: C = Σ x·xᵀ / tokens over the real forward
// pass, as EoRA (arXiv 2410.21271) measures them. One block at a time: the text's states between blocks are kept, and of the
// covariances one block's.

import { GatewayError } from '../errors.ts';
import type { Kernels, Ops, Program, Tensor } from '../kernels/kernels.ts';
import { causalMask } from '../kernels/training-ops.ts';
import type { DecoderWeights } from '../model/decoder.ts';
import { decoderBlock } from '../model/decoder-block.ts';
import {
  type DecoderConfig,
  type Projection,
  projectionShape,
  projections,
} from '../model/decoder-config.ts';
import { positionsOf } from '../model/loss-graph.ts';
import type { Columns } from './orthogonal.ts';

export interface CalibrationInput {
  readonly config: DecoderConfig;
  readonly weights: DecoderWeights;
  /** With training ops: attention inside a window, and sums of products over rows. */
  readonly kernels: Kernels;
  /** Cut into windows, a rest left out; of a shorter text all. */
  readonly tokens: Int32Array;
  /** Rows of a window; 512 when absent. */
  readonly windowRows?: number;
  /** Not 0 for tokens whose inputs count; all when absent. */
  readonly learnt?: Uint8Array;
  /** The number of each token's sequence: equal, adjacent ones of a window see each other; all of a window when absent. */
  readonly sequences?: Int32Array;
}

/** Of one input: E[x·xᵀ] and E[x]. Projections of one input share one. */
export interface InputMoments {
  readonly covariance: Columns; // [in, in]
  readonly mean: Float64Array; // [in]
}
export type BlockMoments = Readonly<Record<Projection, InputMoments>>;

/** Symmetric, [in, in] each; projections of one input share one. */
export type BlockCovariances = Readonly<Record<Projection, Columns>>;

const windowRowsMax = 512;
/** States of a text: 600 MB where a row has 2048 numbers. */
export const calibrationTokensMax = 65_536;
/** A covariance of this width is 32 MB. */
const widthMax = 2048;

/** The covariances of block 0, 1, …; each is the caller's. Throws what inputMoments throws. */
export function* calibrate(input: CalibrationInput): Generator<BlockCovariances, void> {
  for (const moments of inputMoments(input)) {
    const entries = projections.map((name) => [name, moments[name].covariance]);
    yield Object.fromEntries(entries) as BlockCovariances;
  }
}

/** The moments of block 0, 1, …; each is the caller's. Throws UNSUPPORTED for a wide model, INVALID_REQUEST without tokens. */
export function* inputMoments(input: CalibrationInput): Generator<BlockMoments, void> {
  const { config, tokens } = input;
  const widest = Math.max(...projections.map((name) => projectionShape(config, name).in));
  if (widest > widthMax) {
    const message = `calibration: inputs of ${widest} numbers, at most ${widthMax} are supported`;
    throw new GatewayError('UNSUPPORTED', message);
  }
  if (tokens.length < 1 || tokens.length > calibrationTokensMax) {
    const message = `calibration: ${tokens.length} tokens, want 1 to ${calibrationTokensMax}`;
    throw new GatewayError('INVALID_REQUEST', message);
  }
  const rows = Math.min(input.windowRows ?? windowRowsMax, tokens.length);
  const states = embedded(input, rows);
  const counts = countsOf(input, rows * states.length);
  const total = counts.reduce((sum, one) => sum + one, 0);
  if (total === 0) throw new GatewayError('INVALID_REQUEST', 'calibration: no token counts');
  for (let block = 0; block < config.blocks; block++) {
    yield throughBlock(input, block, { states, counts, share: 1 / total });
  }
}

/** 1 for tokens that count, 0 for the others. */
function countsOf({ learnt }: CalibrationInput, count: number): Float32Array {
  return Float32Array.from({ length: count }, (_, i) => ((learnt?.[i] ?? 1) === 0 ? 0 : 1));
}

interface Passing {
  /** One window after another, [rows, E] each. */
  readonly states: readonly Float32Array[];
  readonly counts: Float32Array; // of each token
  /** Of a token that counts in the mean. */
  readonly share: number;
}

/** One window after another, [rows, E] each. */
function embedded(
  { config, weights, kernels, tokens }: CalibrationInput,
  rows: number,
): Float32Array[] {
  using program = kernels.compile(
    (ops) => ({ x: ops.embed(weights.tokenEmbedding, ops.input('tokens', 'i32', [rows])) }),
    { segments: 0 },
  );
  return Array.from({ length: Math.floor(tokens.length / rows) }, (_, i) => {
    program.write('tokens', tokens.subarray(i * rows, (i + 1) * rows));
    program.run([]);
    const state = new Float32Array(rows * config.width);
    program.read('x', 0, state);
    return state;
  });
}

/** The projections whose inputs differ: the others share one of these. */
const tapped = ['attn_q', 'attn_output', 'ffn_gate', 'ffn_down'] as const;
type Tapped = (typeof tapped)[number];
const inputOf: Readonly<Record<Projection, Tapped>> = {
  attn_q: 'attn_q',
  attn_k: 'attn_q',
  attn_v: 'attn_q',
  attn_output: 'attn_output',
  ffn_gate: 'ffn_gate',
  ffn_up: 'ffn_gate',
  ffn_down: 'ffn_down',
};

/** Moves the states on by one block, in place. */
function throughBlock(
  input: CalibrationInput,
  block: number,
  { states, counts, share }: Passing,
): BlockMoments {
  const { config, kernels } = input;
  const rows = states[0]!.length / config.width;
  using program = kernels.compile((ops) => tappedBlock(ops, input, block, rows), { segments: 0 });
  const sums = new Map(
    tapped.map((name): [Tapped, InputMoments] => {
      const size = projectionShape(config, name).in;
      const covariance = { rows: size, columns: size, data: new Float64Array(size ** 2) };
      return [name, { covariance, mean: new Float64Array(size) }];
    }),
  );
  states.forEach((state, window) => {
    const sequences =
      input.sequences?.slice(window * rows, (window + 1) * rows) ?? new Int32Array(rows);
    program.write('positions', positionsOf(sequences, rows));
    program.write('mask', causalMask(sequences, rows));
    program.write('learnt', counts.subarray(window * rows, (window + 1) * rows));
    program.write('x', state);
    program.run([]);
    for (const [name, { covariance, mean }] of sums) {
      addOutput(program, name, covariance.data, share);
      addOutput(program, sumName(name), mean, share);
    }
    program.read('y', 0, state);
  });
  const entries = projections.map((projection) => [projection, sums.get(inputOf[projection])!]);
  return Object.fromEntries(entries) as BlockMoments;
}

function sumName(name: Projection): string {
  return `${name} sum`;
}

function addOutput(program: Program, name: string, sum: Float64Array, share: number): void {
  const products = new Float32Array(sum.length);
  program.read(name, 0, products);
  for (let i = 0; i < sum.length; i++) sum[i]! += products[i]! * share;
}

/** The block's result `y`, and the sums of x·xᵀ and of x over the rows of each input that count. */
function tappedBlock(
  ops: Ops,
  { config, weights }: CalibrationInput,
  block: number,
  rows: number,
): Record<string, Tensor> {
  const taps: Record<string, Tensor> = {};
  const norms = weights.blocks[block]!;
  const positions = ops.input('positions', 'i32', [rows]);
  const mask = ops.input('mask', 'f32', [1, rows, rows]);
  const learnt = ops.input('learnt', 'f32', [rows, 1]);
  const x = ops.input('x', 'f32', [rows, config.width]);
  const y = decoderBlock(ops, { config, norms, positions }, x, {
    project: (h, names) => {
      const every = ops.training.fill([1, h.shape[1]!], 1);
      const counted = ops.mul(h, ops.training.linearT(learnt, every)); // [rows, in]
      taps[names[0]!] = ops.training.outer(counted, h); // [in, in]
      taps[sumName(names[0]!)] = ops.training.outer(learnt, h); // [1, in]
      return names.map((name) => ops.linear(h, norms[name]));
    },
    attend: (q, k, v) => {
      const split = ops.reshape(v, [rows, config.kvHeads, config.headSize]);
      return ops.training.attendSelf(q, k, split, mask); // [rows, H·D]
    },
  });
  return { ...taps, y };
}
