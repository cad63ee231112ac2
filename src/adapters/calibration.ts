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
import type { Columns } from './orthogonal.ts';

export interface CalibrationInput {
  readonly config: DecoderConfig;
  readonly weights: DecoderWeights;
  /** With training ops: attention inside a window, and sums of products over rows. */
  readonly kernels: Kernels;
  /** Cut into windows of 512, a rest left out; of a shorter text all. */
  readonly tokens: Int32Array;
}

/** Symmetric, [in, in] each; projections of one input share one. */
export type BlockCovariances = Readonly<Record<Projection, Columns>>;

const windowRowsMax = 512;
/** States of a text: 600 MB where a row has 2048 numbers. */
export const calibrationTokensMax = 65_536;
/** A covariance of this width is 32 MB. */
const widthMax = 2048;

/** The covariances of block 0, 1, …; each is the caller's. Throws UNSUPPORTED for a wide model, INVALID_REQUEST without tokens. */
export function* calibrate(input: CalibrationInput): Generator<BlockCovariances, void> {
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
  const rows = Math.min(windowRowsMax, tokens.length);
  const states = embedded(input, rows);
  for (let block = 0; block < config.blocks; block++) yield throughBlock(input, block, states);
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
  states: readonly Float32Array[],
): BlockCovariances {
  const { config, kernels } = input;
  const rows = states[0]!.length / config.width;
  using program = kernels.compile((ops) => tappedBlock(ops, input, block, rows), { segments: 0 });
  program.write(
    'positions',
    Int32Array.from({ length: rows }, (_, i) => i),
  );
  program.write('mask', causalMask(new Int32Array(rows), rows));
  const sums = new Map(
    tapped.map((name) => [name, new Float64Array(projectionShape(config, name).in ** 2)]),
  );
  for (const state of states) {
    program.write('x', state);
    program.run([]);
    for (const [name, sum] of sums) addOutput(program, name, sum, rows * states.length);
    program.read('y', 0, state);
  }
  const entries = projections.map((projection) => {
    const size = projectionShape(config, projection).in;
    return [projection, { rows: size, columns: size, data: sums.get(inputOf[projection])! }];
  });
  return Object.fromEntries(entries) as BlockCovariances;
}

function addOutput(program: Program, name: Tapped, sum: Float64Array, tokens: number): void {
  const products = new Float32Array(sum.length);
  program.read(name, 0, products);
  for (let i = 0; i < sum.length; i++) sum[i]! += products[i]! / tokens;
}

/** The block's result `y`, and the sum of x·xᵀ over the rows of each input. */
function tappedBlock(
  ops: Ops,
  { config, weights }: CalibrationInput,
  block: number,
  rows: number,
): Record<string, Tensor> {
  const taps: Partial<Record<Projection, Tensor>> = {};
  const norms = weights.blocks[block]!;
  const positions = ops.input('positions', 'i32', [rows]);
  const mask = ops.input('mask', 'f32', [1, rows, rows]);
  const x = ops.input('x', 'f32', [rows, config.width]);
  const y = decoderBlock(ops, { config, norms, positions }, x, {
    project: (h, names) => {
      taps[names[0]!] = ops.training.outer(h, h); // [in, in]
      return names.map((name) => ops.linear(h, norms[name]));
    },
    attend: (q, k, v) => {
      const split = ops.reshape(v, [rows, config.kvHeads, config.headSize]);
      return ops.training.attendSelf(q, k, split, mask); // [rows, H·D]
    },
  });
  return { ...taps, y };
}
