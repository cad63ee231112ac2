// What training needs beyond Ops: whole-sequence attention, the loss, and the gradient of every op that the tape
// (autodiff.ts) differentiates. Also what every backend asks of their arguments. `dy` is the gradient of an op's result.
//
// Sizes: T rows, K in, N out, R ranks, P pages a row, H heads of D channels, Hkv key heads, V words; a batch is B windows
// of L rows each, T = B·L.

import {
  checkExpand,
  checkMixRanks,
  checkRope,
  checkShrink,
  elementCount,
  mismatch,
  want,
} from './check.ts';
import type { DType, RopeOptions, ShrinkPart, Tensor } from './kernels.ts';

export interface TrainingOps {
  /** f32, every number `value`. */
  fill(shape: readonly number[], value: number): Tensor;
  /** `y[T,N] = x[T,K] · w[K,N]`, all f32: linear by a weight that lies the other way round. */
  linearT(x: Tensor, w: Tensor): Tensor;
  /** `y[N,K] = Σ_t a[t] ⊗ b[t]`: a [T,N], b [T,K]; the gradient of a weight. */
  outer(a: Tensor, b: Tensor): Tensor;
  /** −1, 0 or 1. No gradient passes: |x| is x · sign(x). */
  sign(x: Tensor): Tensor;
  /** Of each row's k largest numbers, of equals the lower index, softmax(scale·x); the others are 0. x [T,N], N up to 256. At
   *  scale 0 each of the k is 1/k, and no gradient passes. */
  softmaxTop(x: Tensor, k: number, scale: number): Tensor;
  /** With respect to x, from the result y. */
  softmaxTopBack(dy: Tensor, y: Tensor, scale: number): Tensor;
  /** Of rmsNorm with respect to x, and to its weight. */
  rmsNormBack(dy: Tensor, x: Tensor, weight: Tensor, eps: number): Tensor;
  rmsNormBackWeight(dy: Tensor, x: Tensor, eps: number): Tensor;
  swigluBack(dy: Tensor, gate: Tensor, up: Tensor): readonly [dGate: Tensor, dUp: Tensor];
  ropeBack(dy: Tensor, positions: Tensor, options: RopeOptions): Tensor;
  /** `y[rows[i]] += x[i]` from zero: x [R,N], rows an input [R] i32 below `count`, y [count,N]. */
  scatterRows(x: Tensor, rows: Tensor, count: number): Tensor;
  /** Grouped-query attention inside each window: q [B·L,H,D], k and v [B·L,Hkv,D], mask [B,L,L] f32 added to the scores of
   *  (row, row it looks at): 0 where seen, -Infinity where not (every row sees one). Scale 1/sqrt(D). y [B·L,H·D]. */
  attendSelf(q: Tensor, k: Tensor, v: Tensor, mask: Tensor): Tensor;
  attendSelfBack(dy: Tensor, ...qkvMask: AttendSelfArguments): readonly [Tensor, Tensor, Tensor];
  /** `Σ_t weights[t] · (ln Σ_v exp logits[t,v] − logits[t,targets[t]])`, shape [1]: logits [T,V], targets an input [T] i32,
   *  weights [T] f32 (0 for rows without a target, 1 / their number for a mean). Finite for any finite logits. */
  crossEntropy(logits: Tensor, targets: Tensor, weights: Tensor): Tensor;
  /** With respect to the logits; `dy` [1]. */
  crossEntropyBack(dy: Tensor, logits: Tensor, targets: Tensor, weights: Tensor): Tensor;
  /** `dHs[i]` belongs to `parts[i]`. Page 0 has no gradient; a use's gates have the sum of its rows'. Costs as much as the
   *  whole pool: train with small pools. */
  shrinkBack(
    dHs: readonly Tensor[],
    x: Tensor,
    rows: LowRankRows,
    parts: readonly ShrinkPart[],
  ): ShrinkGradients;
  mixRanksBack(dy: Tensor, h: Tensor, atoms: Tensor, weights: Tensor): MixGradients;
  /** y's own gradient is `dy`. */
  expandBack(dy: Tensor, h: Tensor, pages: Tensor, b: Tensor): ExpandGradients;
}

/** What native/routing.c has room for. */
const rankedMax = 256;

/** What tells the rows' adapters: pages [T,P] and uses [T], inputs of i32. */
export interface LowRankRows {
  readonly pages: Tensor;
  readonly uses: Tensor;
}

type AttendSelfArguments = readonly [q: Tensor, k: Tensor, v: Tensor, mask: Tensor];

export interface ShrinkGradients {
  readonly x: Tensor;
  readonly parts: readonly ShrinkPart[];
}

export interface MixGradients {
  readonly h: Tensor;
  readonly atoms: Tensor;
  readonly weights: Tensor;
}

export interface ExpandGradients {
  readonly h: Tensor;
  readonly b: Tensor;
}

/** What SymbolicOps does for its own ops, handed to its training part. */
export interface SymbolicHost {
  /** A checked result; `tensors` bounds the native tensor structs that it takes, views included. */
  result(dtype: DType, shape: readonly number[], tensors: number): Tensor;
  limit(indices: Tensor, limit: number): void;
}

/** Checks only: the training part of a program's first pass. */
export class SymbolicTraining implements TrainingOps {
  readonly #host: SymbolicHost;

  constructor(host: SymbolicHost) {
    this.#host = host;
  }

  #result(shape: readonly number[], tensors = 8): Tensor {
    return this.#host.result('f32', shape, tensors);
  }

  fill(shape: readonly number[], _value: number): Tensor {
    return this.#result(shape);
  }

  linearT(x: Tensor, w: Tensor): Tensor {
    want('linearT x', x, [undefined, w.shape[0]]);
    want('linearT w', w, [undefined, undefined]);
    return this.#result([x.shape[0]!, w.shape[1]!]);
  }

  outer(a: Tensor, b: Tensor): Tensor {
    want('outer a', a, [b.shape[0], undefined]);
    want('outer b', b, [undefined, undefined]);
    return this.#result([a.shape[1]!, b.shape[1]!]);
  }

  sign(x: Tensor): Tensor {
    want('sign x', x, x.shape);
    return this.#result(x.shape);
  }

  softmaxTop(x: Tensor, k: number, _scale: number): Tensor {
    want('softmaxTop x', x, [undefined, undefined]);
    if (!Number.isSafeInteger(k) || k < 1 || x.shape[1]! > rankedMax) {
      throw mismatch('softmaxTop', `k from 1, of up to ${rankedMax}; got ${k} of ${x.shape[1]}`);
    }
    return this.#result(x.shape);
  }

  softmaxTopBack(dy: Tensor, y: Tensor, _scale: number): Tensor {
    want('softmaxTopBack dy', dy, y.shape);
    return this.#result(y.shape);
  }

  rmsNormBack(dy: Tensor, x: Tensor, weight: Tensor, _eps: number): Tensor {
    want('rmsNormBack dy', dy, x.shape);
    want('rmsNormBack weight', weight, [x.shape.at(-1)]);
    return this.#result(x.shape);
  }

  rmsNormBackWeight(dy: Tensor, x: Tensor, _eps: number): Tensor {
    want('rmsNormBackWeight dy', dy, x.shape);
    return this.#result([x.shape.at(-1)!]);
  }

  swigluBack(dy: Tensor, gate: Tensor, up: Tensor): readonly [Tensor, Tensor] {
    want('swigluBack gate', gate, dy.shape);
    want('swigluBack up', up, dy.shape);
    return [this.#result(dy.shape), this.#result(dy.shape)];
  }

  ropeBack(dy: Tensor, positions: Tensor, options: RopeOptions): Tensor {
    return this.#result(checkRope(dy, positions, options));
  }

  scatterRows(x: Tensor, rows: Tensor, count: number): Tensor {
    want('scatterRows rows', rows, [x.shape[0]], 'i32');
    want('scatterRows x', x, [undefined, undefined]);
    this.#host.limit(rows, count);
    return this.#result([count, x.shape[1]!]);
  }

  attendSelf(q: Tensor, k: Tensor, v: Tensor, mask: Tensor): Tensor {
    const [windows, rows] = mask.shape;
    want('attendSelf mask', mask, [undefined, rows, rows]);
    want('attendSelf q', q, [windows! * rows!, undefined, undefined]);
    want('attendSelf k', k, [windows! * rows!, undefined, q.shape[2]]);
    want('attendSelf v', v, k.shape);
    const [heads, kvHeads] = [q.shape[1]!, k.shape[1]!];
    if (heads % kvHeads !== 0) {
      throw mismatch('attendSelf', `${heads} heads are not a multiple of ${kvHeads} key heads`);
    }
    return this.#result([q.shape[0]!, heads * q.shape[2]!], 32);
  }

  attendSelfBack(dy: Tensor, ...[q, k, v, mask]: AttendSelfArguments): [Tensor, Tensor, Tensor] {
    want('attendSelfBack dy', dy, this.attendSelf(q, k, v, mask).shape);
    return [this.#result(q.shape, 64), this.#result(k.shape), this.#result(v.shape)];
  }

  crossEntropy(logits: Tensor, targets: Tensor, weights: Tensor): Tensor {
    want('crossEntropy logits', logits, [undefined, undefined]);
    want('crossEntropy targets', targets, [logits.shape[0]], 'i32');
    want('crossEntropy weights', weights, [logits.shape[0]]);
    this.#host.limit(targets, logits.shape[1]!);
    return this.#result([1], 32);
  }

  crossEntropyBack(dy: Tensor, logits: Tensor, targets: Tensor, weights: Tensor): Tensor {
    want('crossEntropyBack dy', dy, [1]);
    this.crossEntropy(logits, targets, weights);
    return this.#result(logits.shape, 32);
  }

  shrinkBack(
    dHs: readonly Tensor[],
    x: Tensor,
    { pages, uses }: LowRankRows,
    parts: readonly ShrinkPart[],
  ): ShrinkGradients {
    const shape = checkShrink(x, pages, parts, uses);
    if (dHs.length !== parts.length) throw mismatch('shrinkBack', 'one gradient per part wanted');
    for (const dH of dHs) want('shrinkBack dH', dH, shape);
    for (const { a } of parts) want('shrinkBack a', a, a.shape); // f32
    this.#host.limit(pages, parts[0]!.a.shape[0]!);
    this.#host.limit(uses, parts[0]!.gate.shape[0]!);
    return {
      x: this.#result(x.shape),
      parts: parts.map(({ a, gate }) => ({
        a: this.#result(a.shape, 32),
        gate: this.#result(gate.shape),
      })),
    };
  }

  mixRanksBack(dy: Tensor, h: Tensor, atoms: Tensor, weights: Tensor): MixGradients {
    want('mixRanksBack dy', dy, checkMixRanks(h, atoms, weights));
    want('mixRanksBack atoms', atoms, [undefined, h.shape[1], h.shape[1]]); // all ranks are mixed
    return {
      h: this.#result(h.shape, 16),
      atoms: this.#result(atoms.shape, 16),
      weights: this.#result(weights.shape, 16),
    };
  }

  expandBack(dy: Tensor, h: Tensor, pages: Tensor, b: Tensor): ExpandGradients {
    checkExpand(pages, { y: dy, h, b });
    want('expandBack b', b, b.shape); // f32
    this.#host.limit(pages, b.shape[0]!);
    return { h: this.#result(h.shape, 16), b: this.#result(b.shape, 16) };
  }
}

/** The additive mask of attendSelf: windows [B, L] of sequence numbers → [B, L, L], causal within each sequence. Rows with
 *  the same number, one after the other, are one sequence; so short sequences share a window. */
export function causalMask(sequences: Int32Array, windowRows: number): Float32Array {
  const windows = sequences.length / windowRows;
  if (!Number.isInteger(windows)) throw mismatch('causalMask', 'whole windows wanted');
  const mask = new Float32Array(elementCount([windows, windowRows, windowRows])).fill(-Infinity);
  for (let row = 0; row < sequences.length; row++) {
    const start = row - (row % windowRows);
    for (let other = row; other >= start && sequences[other] === sequences[row]; other--) {
      mask[row * windowRows + (other - start)] = 0;
    }
  }
  return mask;
}
