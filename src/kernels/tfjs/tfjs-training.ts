// The training ops over TensorFlow.js, by their formulas: the tape is ours (autodiff.ts), so TensorFlow.js's own is not
// used. B windows of L rows, G query heads a key head; other sizes as in tfjs-ops.ts.

import type { RopeOptions, ShrinkPart, Tensor } from '../kernels.ts';
import { softmaxTop } from '../rank-routing.ts';
import type {
  ExpandGradients,
  LowRankRows,
  MixGradients,
  ShrinkGradients,
  TrainingOps,
} from '../training-ops.ts';
import type { TensorFlow, TfTensor } from './tensorflow.ts';
import { numbersOf, type TfjsRun, tensorOf } from './tfjs-run.ts';

interface Attended {
  readonly q: TfTensor; // [B, Hkv, G·L, D], scaled
  readonly k: TfTensor; // [B, Hkv, L, D]
  readonly v: TfTensor; // [B, Hkv, L, D]
  readonly shares: TfTensor; // [B, Hkv, G·L, L]
}

export class TfjsTraining implements TrainingOps {
  readonly #run: TfjsRun;
  readonly #tf: TensorFlow;

  constructor(run: TfjsRun) {
    this.#run = run;
    this.#tf = run.tf;
  }

  fill(shape: readonly number[], value: number): Tensor {
    return this.#run.value(this.#tf.fill(shape, value));
  }

  linearT(x: Tensor, w: Tensor): Tensor {
    return this.#run.value(this.#tf.matMul(tensorOf(x), tensorOf(w)));
  }

  outer(a: Tensor, b: Tensor): Tensor {
    return this.#run.value(this.#tf.matMul(tensorOf(a), tensorOf(b), true));
  }

  sign(x: Tensor): Tensor {
    return this.#run.value(this.#tf.sign(tensorOf(x)));
  }

  softmaxTop(x: Tensor, k: number, scale: number): Tensor {
    const numbers = Float32Array.from(this.#run.onHost(x));
    const shares = softmaxTop(numbers, x.shape[1]!, { k, scale });
    return this.#run.value(this.#run.floats(shares, x.shape));
  }

  softmaxTopBack(dy: Tensor, y: Tensor, scale: number): Tensor {
    const tf = this.#tf;
    const [d, shares] = [tensorOf(dy), tensorOf(y)];
    const mean = tf.sum(tf.mul(d, shares), 1, true);
    const slope = tf.mul(shares, tf.sub(d, mean));
    return this.#run.value(tf.mul(slope, this.#run.scalar(scale)));
  }

  rmsNormBack(dy: Tensor, x: Tensor, weight: Tensor, eps: number): Tensor {
    const tf = this.#tf;
    const from = tensorOf(x);
    const inverse = this.#run.inverseNorm(from, eps);
    const scaled = tf.mul(tensorOf(dy), tensorOf(weight));
    const along = tf.mean(tf.mul(from, scaled), from.shape.length - 1, true);
    const back = tf.mul(tf.mul(from, along), tf.square(inverse));
    return this.#run.value(tf.mul(tf.sub(scaled, back), inverse));
  }

  rmsNormBackWeight(dy: Tensor, x: Tensor, eps: number): Tensor {
    const tf = this.#tf;
    const from = tensorOf(x);
    const normed = tf.mul(from, this.#run.inverseNorm(from, eps));
    const rows = tf.reshape(tf.mul(tensorOf(dy), normed), [-1, x.shape.at(-1)!]);
    return this.#run.value(tf.sum(rows, 0));
  }

  swigluBack(dy: Tensor, gate: Tensor, up: Tensor): readonly [Tensor, Tensor] {
    const tf = this.#tf;
    const [d, g] = [tensorOf(dy), tensorOf(gate)];
    const sigmoid = tf.sigmoid(g);
    const silu = tf.mul(g, sigmoid);
    const slope = tf.add(sigmoid, tf.mul(silu, tf.sub(this.#run.scalar(1), sigmoid)));
    const dGate = tf.mul(tf.mul(d, tensorOf(up)), slope);
    return [this.#run.value(dGate), this.#run.value(tf.mul(d, silu))];
  }

  ropeBack(dy: Tensor, positions: Tensor, options: RopeOptions): Tensor {
    const tf = this.#tf;
    const { cos, sin, partner } = this.#run.rotation(positions, dy.shape[2]!, options);
    const d = tensorOf(dy);
    return this.#run.value(tf.sub(tf.mul(d, cos), tf.mul(tf.gather(d, partner, 2), sin)));
  }

  scatterRows(x: Tensor, rows: Tensor, count: number): Tensor {
    const at = this.#tf.reshape(tensorOf(rows), [x.shape[0]!, 1]);
    return this.#run.value(this.#tf.scatterND(at, tensorOf(x), [count, x.shape[1]!]));
  }

  attendSelf(q: Tensor, k: Tensor, v: Tensor, mask: Tensor): Tensor {
    const own = this.#attend(q, k, v, mask);
    const y = this.#toRows(this.#tf.matMul(own.shares, own.v), q.shape, mask);
    return this.#run.value(this.#tf.reshape(y, [q.shape[0]!, q.shape[1]! * q.shape[2]!]));
  }

  attendSelfBack(
    dy: Tensor,
    ...[q, k, v, mask]: readonly [Tensor, Tensor, Tensor, Tensor]
  ): readonly [Tensor, Tensor, Tensor] {
    const tf = this.#tf;
    const own = this.#attend(q, k, v, mask);
    const d = this.#toHeads(tf.reshape(tensorOf(dy), q.shape), k.shape[1]!, mask);
    const dShares = tf.matMul(d, own.v, false, true); // [B, Hkv, G·L, L]
    const mean = tf.sum(tf.mul(dShares, own.shares), 3, true);
    const dScores = tf.mul(own.shares, tf.sub(dShares, mean));
    const scale = this.#run.scalar(1 / Math.sqrt(q.shape[2]!));
    const dQ = tf.mul(tf.matMul(dScores, own.k), scale);
    const dK = tf.matMul(dScores, own.q, true); // q is scaled
    const dV = tf.matMul(own.shares, d, true);
    return [
      this.#run.value(this.#toRows(dQ, q.shape, mask)),
      this.#run.value(this.#toRows(dK, k.shape, mask)),
      this.#run.value(this.#toRows(dV, v.shape, mask)),
    ];
  }

  #attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor): Attended {
    const tf = this.#tf;
    const [windows, rows] = mask.shape as [number, number];
    const [heads, kvHeads] = [q.shape[1]!, k.shape[1]!];
    const scale = this.#run.scalar(1 / Math.sqrt(q.shape[2]!));
    const queries = tf.mul(this.#toHeads(tensorOf(q), kvHeads, mask), scale);
    const keys = this.#toHeads(tensorOf(k), kvHeads, mask);
    const scores = tf.matMul(queries, keys, false, true); // [B, Hkv, G·L, L]
    const hidden = tf.reshape(tensorOf(mask), [windows, 1, rows, rows]);
    const perHead = tf.add(tf.reshape(scores, [windows, heads, rows, rows]), hidden);
    return {
      q: queries,
      k: keys,
      v: this.#toHeads(tensorOf(v), kvHeads, mask),
      shares: tf.softmax(tf.reshape(perHead, scores.shape)),
    };
  }

  /** [B·L, H, D] → [B, Hkv, G·L, D]. */
  #toHeads(x: TfTensor, kvHeads: number, mask: Tensor): TfTensor {
    const tf = this.#tf;
    const [windows, rows] = mask.shape as [number, number];
    const [, heads, size] = x.shape as [number, number, number];
    const perHead = tf.transpose(tf.reshape(x, [windows, rows, heads, size]), [0, 2, 1, 3]);
    return tf.reshape(perHead, [windows, kvHeads, (heads / kvHeads) * rows, size]);
  }

  /** [B, Hkv, G·L, D] → `shape` [B·L, H, D]. */
  #toRows(x: TfTensor, shape: readonly number[], mask: Tensor): TfTensor {
    const tf = this.#tf;
    const [windows, rows] = mask.shape as [number, number];
    const perHead = tf.reshape(x, [windows, shape[1]!, rows, shape[2]!]);
    return tf.reshape(tf.transpose(perHead, [0, 2, 1, 3]), shape);
  }

  /** Each row's target among all logits laid end to end, [T]. */
  #targetsAt(logits: Tensor, targets: Tensor): TfTensor {
    const words = logits.shape[1]!;
    return this.#run.once(targets, `of ${words}`, () =>
      this.#run.ints(
        Int32Array.from(numbersOf(targets), (target, t) => t * words + target),
        targets.shape,
      ),
    );
  }

  crossEntropy(logits: Tensor, targets: Tensor, weights: Tensor): Tensor {
    const tf = this.#tf;
    const all = tensorOf(logits);
    const picked = tf.gather(tf.reshape(all, [-1]), this.#targetsAt(logits, targets));
    const losses = tf.mul(tf.sub(tf.logSumExp(all, 1), picked), tensorOf(weights));
    return this.#run.value(tf.reshape(tf.sum(losses), [1]));
  }

  crossEntropyBack(dy: Tensor, logits: Tensor, targets: Tensor, weights: Tensor): Tensor {
    const tf = this.#tf;
    const [rows, words] = logits.shape as [number, number];
    const at = tf.reshape(this.#targetsAt(logits, targets), [rows, 1]);
    const ones = tf.fill([rows], 1);
    const wanted = tf.reshape(tf.scatterND(at, ones, [rows * words]), [rows, words]);
    const scale = tf.reshape(tf.mul(tensorOf(weights), tensorOf(dy)), [rows, 1]);
    return this.#run.value(tf.mul(tf.sub(tf.softmax(tensorOf(logits)), wanted), scale));
  }

  shrinkBack(
    dHs: readonly Tensor[],
    x: Tensor,
    { pages, uses }: LowRankRows,
    parts: readonly ShrinkPart[],
  ): ShrinkGradients {
    const tf = this.#tf;
    const run = this.#run;
    const plan = run.pagePlan(pages);
    const from = tensorOf(x);
    let dX: TfTensor | null = null;
    const gradients = parts.map(({ a, gate }, i) => {
      const dH = tensorOf(dHs[i]!); // [T, 8P]
      const scale = tf.gather(tensorOf(gate), tensorOf(uses)); // [T, 8P]
      const all = run.pagesOf(a, plan); // [8U, K]
      const dAll = run.spread(tf.mul(dH, scale), plan); // [T, 8U]
      const part = tf.matMul(dAll, all); // [T, K]
      dX = dX === null ? part : tf.add(dX, part);
      const ungated = run.own(tf.matMul(from, all, false, true), plan); // [T, 8P]
      const at = tf.reshape(tensorOf(uses), [x.shape[0]!, 1]);
      const dGate = tf.scatterND(at, tf.mul(dH, ungated), gate.shape);
      const dA = run.pool(tf.matMul(dAll, from, true), plan, a.shape);
      return { a: run.value(dA), gate: run.value(dGate) };
    });
    return { x: run.value(dX!), parts: gradients };
  }

  mixRanksBack(dy: Tensor, h: Tensor, atoms: Tensor, weights: Tensor): MixGradients {
    const tf = this.#tf;
    const [rows, ranks] = h.shape as [number, number];
    const mixes = atoms.shape[0]!;
    const [d, from, weight] = [tensorOf(dy), tensorOf(h), tensorOf(weights)];
    const shares = tf.reshape(tf.slice(weight, [0, 1], [rows, mixes]), [rows, mixes, 1]);
    const maps = tf.reshape(tf.transpose(tensorOf(atoms), [1, 0, 2]), [ranks, mixes * ranks]);
    const back = tf.reshape(tf.matMul(d, maps), [rows, mixes, ranks]); // dy through each atom
    const kept = tf.mul(d, tf.slice(weight, [0, 0], [rows, 1]));
    const dShares = tf.sum(tf.mul(back, tf.reshape(from, [rows, 1, ranks])), 2); // [T, J]
    const dKept = tf.sum(tf.mul(d, from), 1, true); // [T, 1]
    const shared = tf.reshape(tf.mul(shares, tf.reshape(d, [rows, 1, ranks])), [rows, -1]);
    const dAtoms = tf.reshape(tf.matMul(shared, from, true), atoms.shape); // [T, J·R]ᵀ · [T, R]
    return {
      h: this.#run.value(tf.add(kept, tf.sum(tf.mul(back, shares), 1))),
      atoms: this.#run.value(dAtoms),
      weights: this.#run.value(tf.concat([dKept, dShares], 1)),
    };
  }

  expandBack(dy: Tensor, h: Tensor, pages: Tensor, b: Tensor): ExpandGradients {
    const tf = this.#tf;
    const run = this.#run;
    const plan = run.pagePlan(pages);
    const d = tensorOf(dy);
    const dH = run.own(tf.matMul(d, run.pagesOf(b, plan), false, true), plan);
    const dB = run.pool(tf.matMul(run.spread(tensorOf(h), plan), d, true), plan, b.shape);
    return { h: run.value(dH), b: run.value(dB) };
  }
}
