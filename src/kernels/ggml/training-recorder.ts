// The training ops as ggml nodes. Sizes in comments are in the contract's order; ggml's is the reverse.
//
// Results of ops that have several enter the graph only when something needs them (ggml adds what a node is made of), so
// an unwanted gradient costs nothing.

import { GatewayError } from '../../errors.ts';
import { type RopeOptions, ranksPerPage, type ShrinkPart, type Tensor } from '../kernels.ts';
import type {
  ExpandGradients,
  LowRankRows,
  MixGradients,
  ShrinkGradients,
  TrainingOps,
} from '../training-ops.ts';
import type { GgmlLibrary, Pointer } from './library.ts';
import { GgmlTensor, toNe } from './memory.ts';
import type { NativeFunction } from './native.ts';
import type { Node } from './recorder.ts';

type OpName = Parameters<GgmlLibrary['pointer']>[0];

export interface RecorderHost {
  op(name: OpName, ...values: unknown[]): Pointer;
  /** Puts a node into the graph now, and wraps it. */
  node(pointer: Pointer, shape: readonly number[]): Node;
  /** What ggml's rope takes after x and the positions. */
  rope(options: RopeOptions): readonly unknown[];
  /** Address of one of our own functions (native/), undefined where they were not built. */
  native(name: NativeFunction): Pointer | undefined;
}

/** Products of f32 matrices C[M,N]: `linear` x[M,K] · w[N,K]ᵀ, `linear_t` x[M,K] · w[K,N], `outer` a[K,M]ᵀ · b[K,N]. */
type Form = 'linear' | 'linear_t' | 'outer';
const tasksMax = -1; // as many as ggml has threads

function pointerOf(tensor: Tensor): Pointer {
  return (tensor as Node | GgmlTensor).pointer;
}

interface Windows {
  readonly windows: number; // B
  readonly rows: number; // L
  readonly headSize: number; // D
  readonly kvHeads: number; // Hkv
  /** Query heads that share a key head, stacked as rows: their gradients of k and v add up by themselves. */
  readonly group: number; // G
}

export class TrainingRecorder implements TrainingOps {
  readonly #host: RecorderHost;

  constructor(host: RecorderHost) {
    this.#host = host;
  }

  #op(name: OpName, ...values: unknown[]): Pointer {
    return this.#host.op(name, ...values);
  }

  #reshape(x: Pointer, shape: readonly number[]): Pointer {
    return this.#op('ggml_reshape_4d', x, ...toNe(shape));
  }

  /** Contiguous, with ggml's axis i (innermost first) moved to `axes[i]`. */
  #permute(x: Pointer, ...axes: readonly [number, number, number, number]): Pointer {
    return this.#op('ggml_cont', this.#op('ggml_permute', x, ...axes));
  }

  #later(pointer: Pointer, shape: readonly number[]): Node {
    return { pointer, shape, dtype: 'f32' };
  }

  /** A tensor that only tells a size. */
  #like(shape: readonly number[]): Pointer {
    return this.#op('ggml_new_tensor_4d', 0, ...toNe(shape)); // 0: f32
  }

  fill(shape: readonly number[], value: number): Node {
    return this.#host.node(this.#op('ggml_fill', this.#like(shape), value), shape);
  }

  /** Ops.linear by an f32 weight. */
  linear(x: Tensor, w: Tensor): Node {
    const shape = [x.shape[0]!, w.shape[0]!];
    return this.#host.node(this.#product('linear', pointerOf(x), pointerOf(w), shape), shape);
  }

  linearT(x: Tensor, w: Tensor): Node {
    const shape = [x.shape[0]!, w.shape[1]!];
    return this.#host.node(this.#product('linear_t', pointerOf(x), pointerOf(w), shape), shape);
  }

  outer(a: Tensor, b: Tensor): Node {
    const shape = [a.shape[1]!, b.shape[1]!];
    return this.#host.node(this.#product('outer', pointerOf(a), pointerOf(b), shape), shape);
  }

  /** `shape` of the result; its leading axes are a batch. Our own kernel (native/training.c) runs at 100 GFLOPS a thread where
   *  ggml's f32 product runs at 36 (measured, Zen 4); without it, ggml's. */
  #product(form: Form, left: Pointer, right: Pointer, shape: readonly number[]): Pointer {
    const address = this.#host.native(`rankgate_${form}_f32`);
    if (address !== undefined) {
      const args = BigUint64Array.of(left, right);
      return this.#op('ggml_custom_4d', 0, ...toNe(shape), args, 2, address, tasksMax, null);
    }
    switch (form) {
      case 'linear':
        return this.#op('ggml_mul_mat', right, left);
      case 'linear_t':
        return this.#op('ggml_mul_mat', this.#permute(right, 1, 0, 2, 3), left);
      case 'outer':
        return this.#op('ggml_out_prod', right, left);
    }
  }

  sign(x: Tensor): Node {
    return this.#host.node(this.#op('ggml_sgn', pointerOf(x)), x.shape);
  }

  softmaxTop(x: Tensor, k: number, scale: number): Node {
    if (k >= x.shape[1]!) {
      const all = this.#op('ggml_soft_max_ext', pointerOf(x), null, scale, 0);
      return this.#host.node(all, x.shape);
    }
    const address = this.#host.native('rankgate_softmax_top');
    if (address === undefined) {
      throw new GatewayError('UNSUPPORTED', 'softmaxTop needs the native kernels');
    }
    const numbers = [k, scale].map((value) => this.#op('ggml_fill', this.#like([1]), value));
    const args = BigUint64Array.of(pointerOf(x), ...numbers);
    const top = [0, ...toNe(x.shape), args, args.length, address, tasksMax, null];
    return this.#host.node(this.#op('ggml_custom_4d', ...top), x.shape);
  }

  softmaxTopBack(dy: Tensor, y: Tensor, scale: number): Node {
    // Computed in place of its first argument and never of the second: see attendSelfBack.
    const above = this.#op('ggml_cont', pointerOf(dy));
    const shares = this.#reshape(pointerOf(y), y.shape);
    const dx = this.#op('ggml_soft_max_ext_back', above, shares, scale, 0);
    return this.#host.node(dx, y.shape);
  }

  rmsNormBack(dy: Tensor, x: Tensor, weight: Tensor, eps: number): Node {
    const scaled = this.#op('ggml_mul', pointerOf(dy), pointerOf(weight));
    return this.#host.node(this.#op('ggml_rms_norm_back', scaled, pointerOf(x), eps), x.shape);
  }

  rmsNormBackWeight(dy: Tensor, x: Tensor, eps: number): Node {
    const shape = [x.shape.at(-1)!];
    const normed = this.#op('ggml_rms_norm', pointerOf(x), eps);
    const product = this.#op('ggml_mul', normed, pointerOf(dy));
    return this.#host.node(this.#op('ggml_repeat_back', product, this.#like(shape)), shape);
  }

  swigluBack(dy: Tensor, gate: Tensor, up: Tensor): readonly [Node, Node] {
    const dSilu = this.#op('ggml_mul', pointerOf(dy), pointerOf(up));
    const dGate = this.#op('ggml_silu_back', dSilu, pointerOf(gate));
    const dUp = this.#op('ggml_swiglu_split', pointerOf(gate), pointerOf(dy));
    return [this.#later(dGate, dy.shape), this.#later(dUp, dy.shape)];
  }

  ropeBack(dy: Tensor, positions: Tensor, options: RopeOptions): Node {
    const values = [pointerOf(dy), pointerOf(positions), ...this.#host.rope(options)];
    return this.#host.node(this.#op('ggml_rope_ext_back', ...values), dy.shape);
  }

  scatterRows(x: Tensor, rows: Tensor, count: number): Node {
    const shape = [count, x.shape[1]!];
    const values = [pointerOf(x), pointerOf(rows), this.#like(shape)];
    return this.#host.node(this.#op('ggml_get_rows_back', ...values), shape);
  }

  /** [B·L,Hkv·G,D] → [B,Hkv,G·L,D]. */
  #byHead(x: Tensor, { windows, rows, headSize, kvHeads, group }: Windows): Pointer {
    const split = this.#reshape(pointerOf(x), [windows, rows, kvHeads * group, headSize]);
    return this.#reshape(this.#permute(split, 0, 2, 1, 3), [
      windows,
      kvHeads,
      group * rows,
      headSize,
    ]);
  }

  /** [B,Hkv,G·L,D] → [B·L,Hkv·G,D]. */
  #byRow(x: Pointer, { windows, rows, headSize, kvHeads, group }: Windows): Pointer {
    const split = this.#reshape(x, [windows, kvHeads * group, rows, headSize]);
    const moved = this.#permute(split, 0, 2, 1, 3);
    return this.#reshape(moved, [windows * rows, kvHeads * group, headSize]);
  }

  #windows(q: Tensor, k: Tensor, mask: Tensor): { readonly own: Windows; readonly kv: Windows } {
    const [windows, rows] = mask.shape as [number, number];
    const [kvHeads, headSize] = [k.shape[1]!, k.shape[2]!];
    const own = { windows, rows, headSize, kvHeads, group: q.shape[1]! / kvHeads };
    return { own, kv: { ...own, group: 1 } };
  }

  /** Shares [B,H,L,L] of the values that each row sees, from q and k by head. */
  #shares(
    q: Pointer,
    k: Pointer,
    mask: Tensor,
    { windows, rows, kvHeads, ...sizes }: Windows,
  ): Pointer {
    const stacked = [windows, kvHeads, sizes.group * rows, rows];
    const scores = this.#reshape(this.#product('linear', q, k, stacked), [
      windows,
      kvHeads * sizes.group,
      rows,
      rows,
    ]);
    const hidden = this.#reshape(pointerOf(mask), [windows, 1, rows, rows]);
    return this.#op('ggml_soft_max_ext', scores, hidden, 1 / Math.sqrt(sizes.headSize), 0);
  }

  attendSelf(q: Tensor, k: Tensor, v: Tensor, mask: Tensor): Node {
    const { own, kv } = this.#windows(q, k, mask);
    const { windows, rows, kvHeads, group } = own;
    const shares = this.#shares(this.#byHead(q, own), this.#byHead(k, kv), mask, own);
    const stacked = this.#reshape(shares, [windows, kvHeads, group * rows, rows]);
    const mixed = this.#product('linear_t', stacked, this.#byHead(v, kv), [
      windows,
      kvHeads,
      group * rows,
      own.headSize,
    ]);
    const y = this.#byRow(mixed, own); // [B·L, H, D]
    const shape = [q.shape[0]!, q.shape[1]! * q.shape[2]!];
    return this.#host.node(this.#reshape(y, shape), shape);
  }

  attendSelfBack(
    dy: Tensor,
    ...[q, k, v, mask]: readonly [Tensor, Tensor, Tensor, Tensor]
  ): readonly [Node, Node, Node] {
    const { own, kv } = this.#windows(q, k, mask);
    const { windows, rows, headSize, kvHeads, group } = own;
    const [queries, keys] = [this.#byHead(q, own), this.#byHead(k, kv)];
    const above = this.#byHead(dy, own); // [B, Hkv, G·L, D]
    const square = [windows, kvHeads, group * rows, rows];
    const shares = this.#reshape(this.#shares(queries, keys, mask, own), square);
    const dShares = this.#product('linear', above, this.#byHead(v, kv), square);
    const scale = 1 / Math.sqrt(headSize);
    // ggml's allocator may compute this in place of either argument, but the kernel bears only the first. It takes the
    // first unless that is a view, and never a view: so dShares is none and shares is one.
    const dScores = this.#op('ggml_soft_max_ext_back', dShares, shares, scale, 0);
    const kvShape = [windows, kvHeads, rows, headSize];
    const dq = this.#product('linear_t', dScores, keys, [windows, kvHeads, group * rows, headSize]);
    const dk = this.#product('outer', dScores, queries, kvShape);
    const dv = this.#product('outer', shares, above, kvShape);
    return [
      this.#later(this.#byRow(dq, own), q.shape),
      this.#later(this.#byRow(dk, kv), k.shape),
      this.#later(this.#byRow(dv, kv), v.shape),
    ];
  }

  /** x [T,V] → `x[t, ids[t]]`, [T,1,1]. */
  #pick(x: Pointer, [rows, words]: readonly number[], ids: Pointer): Pointer {
    const columns = this.#reshape(x, [rows!, words!, 1]);
    return this.#op('ggml_get_rows', columns, this.#reshape(ids, [rows!, 1]));
  }

  crossEntropy(logits: Tensor, targets: Tensor, weights: Tensor): Node {
    const [scores, { shape }] = [pointerOf(logits), logits];
    // ln share(target) = score(target) − score(top) + ln share(top): the top share is at least 1/V, so its ln is finite.
    const top = this.#op('ggml_argmax', scores);
    const shares = this.#op('ggml_soft_max_ext', scores, null, 1, 0);
    const topShare = this.#op('ggml_log', this.#pick(shares, shape, top));
    const below = this.#op(
      'ggml_sub',
      this.#pick(scores, shape, top),
      this.#pick(scores, shape, pointerOf(targets)),
    );
    const losses = this.#reshape(this.#op('ggml_sub', below, topShare), [shape[0]!]);
    const weighted = this.#op('ggml_mul', losses, pointerOf(weights)); // [T]
    return this.#host.node(this.#op('ggml_sum', weighted), [1]);
  }

  crossEntropyBack(dy: Tensor, logits: Tensor, targets: Tensor, weights: Tensor): Node {
    const { shape } = logits;
    const [rows, words] = shape as [number, number];
    const scale = this.#op('ggml_mul', pointerOf(weights), pointerOf(dy)); // [T]
    const shares = this.#op('ggml_soft_max_ext', pointerOf(logits), null, 1, 0);
    const own = this.#op('ggml_scale_bias', this.#pick(shares, shape, pointerOf(targets)), 1, -1);
    const atTarget = this.#op('ggml_mul', own, this.#reshape(scale, [rows, 1, 1])); // [T, 1, 1]
    const scaled = this.#op('ggml_mul', shares, this.#reshape(scale, [rows, 1])); // [T, V]
    const columns = this.#reshape(scaled, [rows, words, 1]);
    const ids = this.#reshape(pointerOf(targets), [rows, 1]);
    const placed = this.#op('ggml_set_rows', columns, atTarget, ids);
    return this.#host.node(this.#reshape(placed, shape), shape);
  }

  /** A pool [pages,8,N] as the weight [8·pages,N] of a product with all of it. */
  #flat(pool: Tensor): Pointer {
    const [pages, , width] = pool.shape as [number, number, number];
    const turned = pool instanceof GgmlTensor && pool.transposedPages;
    const numbers = turned
      ? this.#permute(this.#reshape(pointerOf(pool), [pages, width, ranksPerPage]), 1, 0, 2, 3)
      : pointerOf(pool);
    return this.#reshape(numbers, [pages * ranksPerPage, width]);
  }

  /** h [T,8P] by page → [T,8·pages]: each page's ranks added up in its own place, page 0's dropped. */
  #byPage(h: Pointer, pages: Tensor, count: number): Pointer {
    const [rows, slots] = pages.shape as [number, number];
    const notZero = this.#op('ggml_clamp', this.#op('ggml_arange', 0, count, 1), 0, 1);
    const ids = this.#reshape(pointerOf(pages), [rows * slots]);
    const chosen = this.#op('ggml_get_rows', this.#op('ggml_diag', notZero), ids); // [T·P, pages]
    const ranks = this.#reshape(h, [rows, slots, ranksPerPage]);
    const byPage = this.#op('ggml_out_prod', ranks, this.#reshape(chosen, [rows, slots, count]));
    return this.#reshape(byPage, [rows, count * ranksPerPage]);
  }

  /** x [T,K] · pool [pages,8,K]ᵀ, the pages of each row: [T,8P]. Page 0 is zero. */
  #ofPages(x: Tensor, pool: Tensor, pages: Tensor): Pointer {
    const [rows, slots] = pages.shape as [number, number];
    const all = this.#op('ggml_mul_mat', this.#flat(pool), pointerOf(x));
    const split = this.#reshape(all, [rows, pool.shape[0]!, ranksPerPage]);
    return this.#reshape(this.#op('ggml_get_rows', split, pointerOf(pages)), [
      rows,
      slots * ranksPerPage,
    ]);
  }

  shrinkBack(
    dHs: readonly Tensor[],
    x: Tensor,
    { pages, uses }: LowRankRows,
    parts: readonly ShrinkPart[],
  ): ShrinkGradients {
    let dx: Pointer | undefined;
    const gradients = parts.map(({ a, gate }, i) => {
      const dH = pointerOf(dHs[i]!);
      const scale = this.#op('ggml_get_rows', pointerOf(gate), pointerOf(uses)); // [T, 8P]
      const byPage = this.#byPage(this.#op('ggml_mul', dH, scale), pages, a.shape[0]!);
      const share = this.#product('linear_t', byPage, this.#flat(a), x.shape); // [T, K]
      dx = dx === undefined ? share : this.#op('ggml_add', dx, share);
      const flat = [a.shape[0]! * ranksPerPage, a.shape[2]!];
      const dA = this.#product('outer', byPage, pointerOf(x), flat);
      const perRow = this.#op('ggml_mul', this.#ofPages(x, a, pages), dH); // [T, 8P]
      const dGate = [perRow, pointerOf(uses), this.#like(gate.shape)];
      return {
        a: this.#later(this.#reshape(dA, a.shape), a.shape),
        gate: this.#later(this.#op('ggml_get_rows_back', ...dGate), gate.shape),
      };
    });
    return { x: this.#later(dx!, x.shape), parts: gradients };
  }

  mixRanksBack(dy: Tensor, h: Tensor, atoms: Tensor, weights: Tensor): MixGradients {
    const [rows, ranks] = h.shape as [number, number];
    const mixes = atoms.shape[0]!;
    const flat = this.#reshape(pointerOf(atoms), [mixes * ranks, ranks]);
    const sizes = [rows, (1 + mixes) * 4]; // rows and bytes of a row of weights
    const keep = this.#op('ggml_view_2d', pointerOf(weights), 1, ...sizes, 0); // [T, 1]
    const shares = this.#op(
      'ggml_cont',
      this.#op('ggml_view_2d', pointerOf(weights), mixes, ...sizes, 4),
    );
    const above = this.#reshape(pointerOf(dy), [rows, 1, ranks]);
    const shared = this.#op('ggml_out_prod', above, this.#reshape(shares, [rows, 1, mixes]));
    const dMapped = this.#reshape(shared, [rows, mixes * ranks]); // weights ⊗ dy
    const kept = this.#op('ggml_mul', pointerOf(dy), keep);
    const dH = this.#op('ggml_add', kept, this.#product('linear_t', dMapped, flat, h.shape));
    const dAtoms = this.#op('ggml_out_prod', pointerOf(h), dMapped); // [J·R, R]
    const mapped = this.#reshape(this.#op('ggml_mul_mat', flat, pointerOf(h)), [
      rows,
      mixes,
      ranks,
    ]);
    const all = this.#op('ggml_concat', this.#reshape(pointerOf(h), [rows, 1, ranks]), mapped, 1);
    const dWeights = this.#op('ggml_mul_mat', all, above); // [T, 1, 1+J]
    return {
      h: this.#later(dH, h.shape),
      atoms: this.#later(this.#reshape(dAtoms, atoms.shape), atoms.shape),
      weights: this.#later(this.#reshape(dWeights, weights.shape), weights.shape),
    };
  }

  expandBack(dy: Tensor, h: Tensor, pages: Tensor, b: Tensor): ExpandGradients {
    const byPage = this.#byPage(pointerOf(h), pages, b.shape[0]!);
    const flat = [b.shape[0]! * ranksPerPage, b.shape[2]!];
    const dB = this.#product('outer', byPage, pointerOf(dy), flat);
    return {
      h: this.#later(this.#ofPages(dy, b, pages), h.shape),
      b: this.#later(this.#reshape(dB, b.shape), b.shape),
    };
  }
}
