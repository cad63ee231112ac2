// The kernels contract: stored tensors, and programs recorded once per shape and replayed with new inputs. The model is
// written once over Ops and knows no backend. Shapes are outermost first: [T, N] is T rows of N contiguous numbers.
//
// Ownership: a backend owns every tensor it stores and every program it compiles; disposing the backend frees them all.
// A program borrows the stored tensors that it was recorded over. One caller at a time: nothing here is thread-safe.
// Errors: SHAPE_MISMATCH from every op and every call, thrown before native code sees the shapes (ggml aborts the
// process on a wrong one), UNSUPPORTED for a type that the backend lacks.
//
// Not here yet: softmax, topK, argmax (the steps that need them add them with their conformance cases).

import type { TrainingOps } from './training-ops.ts';

/** Types of linear weights as GGUF files store them. */
export type WeightType =
  | 'f32'
  | 'f16'
  | 'bf16'
  | 'q4_0'
  | 'q4_1'
  | 'q5_0'
  | 'q5_1'
  | 'q8_0'
  | 'q4_k'
  | 'q5_k'
  | 'q6_k';
export type DType = WeightType | 'i32' | 'i64';

/** A value: stored in the backend, or computed inside a program. */
export interface Tensor {
  readonly dtype: DType;
  readonly shape: readonly number[];
}

/** A tensor that outlives programs: a weight, a cache, an adapter page pool. */
export interface StoredTensor extends Tensor {
  readonly bytes: number;
}

/** Rows of a program that belong to one sequence, and the run of cells that they attend to. */
export interface AttentionSegment {
  /** First row of the program's T rows, and how many. */
  readonly rowStart: number;
  readonly rowCount: number;
  /** The sequence's cells are [cellBase, cellBase + cells); the last row sees all of them, row i of the segment sees
   *  cells - rowCount + i + 1 (causal). */
  readonly cellBase: number;
  readonly cells: number;
}

export interface RopeOptions {
  /** Channels rotated per head, even; the rest pass through. */
  readonly size: number;
  readonly base: number;
  readonly style: 'norm' | 'neox';
}

/** One of the projections that share a shrink's input. */
export interface ShrinkPart {
  /** Pool [pages,8,K]. */
  readonly a: Tensor;
  /** [G,8P] f32: scale of every rank of every use, 0 for ranks that it does not use. */
  readonly gate: Tensor;
}

/** Which ranks of a row stay, by its use's page p of P (algorithms.md 28 and 18). */
export interface RankRouter {
  readonly uses: Tensor; // [T] i32, an input
  /** [G,P] i32. 0: h stays as it is. k > 0: first page of a group of which k ranks stay, all if it has no more. -1: continues
   *  the group before it. */
  readonly groups: Tensor;
  /** [G,P] f32 at the group's first page. 0, fly: the k ranks with the largest |h| + bias keep their value, the others are 0.
   *  τ > 0, mora: the score is |h|·bias/‖x‖, 0 for x = 0; the k best are multiplied by softmax(score/τ) over those k, the
   *  others are 0. Of equals the lower index. */
  readonly temperatures: Tensor;
  /** [G,8P] f32 per h, in the unit of h, whose gate has multiplied it already: mora's is 1/‖gate·a‖ and finite. */
  readonly biases: readonly Tensor[];
}

/** Stored f32 (algorithms.md 6). */
export interface AtomRouter {
  readonly query: Tensor; // [dq,r], W_q
  readonly summary: Tensor; // [r,r], W_s
  readonly context: Tensor; // [dq,r], W_c
}

/** What each use asks the K atoms. */
export interface AtomUses {
  readonly uses: Tensor; // [T] i32, an input
  readonly keys: Tensor; // [G,K,dq] f32
  readonly bias: Tensor; // [G,K] f32, added to the logits
  readonly topK: Tensor; // [G] i32; 0: no atoms
}

/** One of the projections that rows' deltas are added to together. */
export interface ExpandPart {
  /** [T,N] f32, computed by the program; consumed. */
  readonly y: Tensor;
  /** [T,8P] f32. */
  readonly h: Tensor;
  /** Pool [pages,8,N]. */
  readonly b: Tensor;
}

export interface Ops {
  /** What training needs on top: the loss, and the gradients that the tape of autodiff.ts puts together. */
  readonly training: TrainingOps;
  /** A value given at each run; `write` it before `run`. */
  input(name: string, dtype: 'f32' | 'i32' | 'i64', shape: readonly number[]): Tensor;
  /** `y[T,E] = table[ids[T]]`; table [V,E] of any weight type. */
  embed(table: Tensor, ids: Tensor): Tensor;
  /** `y = x / sqrt(mean(x²) + eps) ⊙ weight` over the last axis; x [T,E], weight [E] f32. */
  rmsNorm(x: Tensor, weight: Tensor, eps: number): Tensor;
  /** `y[T,N] = x[T,K] · w[N,K]ᵀ`; w of any weight type, or computed in f32; x and y f32. */
  linear(x: Tensor, w: Tensor): Tensor;
  /** Elementwise, equal shapes, f32. */
  add(a: Tensor, b: Tensor): Tensor;
  mul(a: Tensor, b: Tensor): Tensor;
  /** `silu(gate) ⊙ up`, equal shapes. */
  swiglu(gate: Tensor, up: Tensor): Tensor;
  /** Rotary position embedding of x [T,H,D] at positions [T] i32. */
  rope(x: Tensor, positions: Tensor, options: RopeOptions): Tensor;
  /** Same numbers, another shape. */
  reshape(x: Tensor, shape: readonly number[]): Tensor;
  /** `x[index]` of an input or a computed x [M,…], which a backend may let lie where it is. */
  slice(x: Tensor, index: number): Tensor;
  /** `cache[cells[i]] = x[i]`: x [T,C] f32, cells [T] i64, cache [cells,C] f16 or f32, stored. Ordered before every later op. */
  writeCells(cache: Tensor, x: Tensor, cells: Tensor): void;
  /** Grouped-query attention of q [T,H,D] over the run of cells of each row's segment: `y[T,H·D]`. k, v stored
   *  [cells,Hkv·D]. The segments are given at each run; rows in no segment are undefined. Scale 1/sqrt(D). */
  attend(q: Tensor, k: Tensor, v: Tensor): Tensor;
  /** Into the bottleneck, per part: `h[t,8p+r] = gate[uses[t],8p+r] · (a[pages[t,p],r] · x[t])`, 0 for page 0. x [T,K] f32,
   *  pages [T,P] and uses [T] inputs of i32, h [T,8P]: rows that use their pages alike share a row of the gate. Parts share x,
   *  so projections of one input are one call. A row costs what its own pages cost when rows are ordered by falling page
   *  count and unused pages are 0; the result does not depend on the order. */
  shrink(x: Tensor, pages: Tensor, parts: readonly ShrinkPart[], uses: Tensor): Tensor[];
  /** Ranks that a row chooses by its own h: x [T,K], each h [T,8P] of one shrink → [T,8P] each. Groups and temperatures are not
   *  checked: whatever they are, only a row's own h is read. */
  routeRanks(x: Tensor, hs: readonly Tensor[], router: RankRouter): Tensor[];
  /** How rows mix the atoms (algorithms.md 6): h [T,R], of which the first r ≤ R count, and the mixed states [T,R] of earlier blocks →
   *  weights [T,1+K] for mixRanks; (1, 0, …) where topK is 0. Else 0 and the softmax of the topK largest logits
   *  `keys·q/√dq + bias`, of `q = W_q·h + W_c·c`, c the softmax(s_j·W_s·h/√dq)-weighted sum of the earlier s_j. */
  routeAtoms(h: Tensor, earlier: readonly Tensor[], router: AtomRouter, uses: AtomUses): Tensor;
  /** A mix of shared rank-by-rank maps: `y[t] = weights[t,0]·h[t] + Σ_j weights[t,1+j]·(atoms[j]·h[t])` of the first r ranks, the
   *  others as they are; h [T,R] f32, atoms stored [J,r,r] f32, weights [T,1+J] f32: a row with (1, 0, …) keeps its h. */
  mixRanks(h: Tensor, atoms: Tensor, weights: Tensor): Tensor;
  /** Out of the bottleneck, per part: `y[t] += Σ_p Σ_r h[t,8p+r] · b[pages[t,p],r]`; pages an input [T,P] i32. Returns the sums;
   *  no two parts have the same y. */
  expand(pages: Tensor, parts: readonly ExpandPart[]): Tensor[];
  /** `y[i] = x[rows[i]]`: x [T,N] f32, rows [R] i32. */
  gatherRows(x: Tensor, rows: Tensor): Tensor;
}

/** What a forward pass may use, so that it runs as it is and on a tape (autodiff.ts). */
export type ForwardOps = Omit<Ops, 'training'> & {
  readonly training: Pick<
    TrainingOps,
    'fill' | 'sign' | 'softmaxTop' | 'linearT' | 'attendSelf' | 'crossEntropy'
  >;
};

export interface ProgramShape {
  /** Most segments of attention in one run; 0 when the program has no attend. */
  readonly segments: number;
}

export interface Program extends Disposable {
  /** Copies `data` into an input: the whole of it, in the input's layout and type. It stays until it is written again. */
  write(name: string, data: Float32Array | Int32Array | BigInt64Array): void;
  /** Computes the outputs. Segments must not overlap in rows and must lie in the caches. */
  run(segments: readonly AttentionSegment[]): void;
  /** Copies `out.length` numbers of an output, from flat index `start`. Valid until any program of the backend runs. */
  read(name: string, start: number, out: Float32Array | Int32Array): void;
}

export interface Kernels extends Disposable {
  readonly name: string;
  /** One line for doctor and logs: library, version, device, threads. */
  readonly description: string;
  /** Whether linears over quantised weights multiply f32 activations: weights then need no other form to be faithful. */
  readonly f32Activations: boolean;
  /** `undefined` contents cost no memory until they are written: for caches that are never read before. */
  store(dtype: DType, shape: readonly number[], contents?: 'zero' | 'undefined'): StoredTensor;
  /** Room for a weight [N,K] of `linear` and `embed` that is multiplied in a certain way: written once as a whole, in the
   *  type's own layout, and never read. Null where the way is not to be had for this type and shape. */
  storeWeight?(dtype: WeightType, shape: readonly number[], way: LinearWay): StoredTensor | null;
  /** Pools of adapter pages, [pages,8,width] each: page 0 is zero, the others are undefined and cost no memory until they are
   *  written. What a step reads of an adapter, a page of every pool, may lie together. Written and read by whole pages, and
   *  not for copyWithin: a backend may lay them out as it likes. */
  storePages(pages: number, pools: readonly PagePool[]): StoredTensor[];
  /** Page `page` ≥ 1 of a pool from f16 bits [8,width], rounded to the pool's type; null: zeros. q8_0 keeps each number within
   *  a 254th of the largest magnitude of its 32, where that is at least 1e-4; below, its f16 scale has fewer bits. */
  writePage(pool: StoredTensor, page: number, halves: Uint16Array | null): void;
  /** Bytes in the type's own layout (GGUF's for quantised types). */
  write(tensor: StoredTensor, bytes: Uint8Array, byteOffset: number): void;
  read(tensor: StoredTensor, out: Uint8Array, byteOffset: number): void;
  /** Moves bytes inside one stored tensor; the ranges do not overlap. */
  copyWithin(tensor: StoredTensor, range: ByteMove): void;
  /** How many threads runs use from now on, at most as many as the kernels were made with; absent where a backend cannot. */
  setThreads?(threads: number): void;
  /** Records a program. `build` returns its named outputs; it is pure and may be called more than once. */
  compile(build: (ops: Ops) => Readonly<Record<string, Tensor>>, shape: ProgramShape): Program;
}

/** How a linear multiplies. `library`: the backend's library, over the bytes as they are. Our own kernels, over the bytes as
 *  they are: `f32`, activations as they are. Over weights laid out anew, the same numbers: `int16` and `int8`, activations
 *  rounded to so many bits per block of 32. */
export const linearWays = ['library', 'f32', 'int16', 'int8'] as const;
export type LinearWay = (typeof linearWays)[number];

export interface PagePool {
  readonly use: 'shrink' | 'expand';
  /** f32, f16, bf16 or q8_0. */
  readonly dtype: DType;
  readonly width: number;
}

export interface ByteMove {
  readonly from: number;
  readonly to: number;
  readonly bytes: number;
}

/** Ranks per adapter page as shrink and expand see them. */
export const ranksPerPage = 8;

/** Block length in numbers and block size in bytes of each type. */
export const dtypeLayout: Readonly<
  Record<DType, { readonly block: number; readonly bytes: number }>
> = {
  f32: { block: 1, bytes: 4 },
  f16: { block: 1, bytes: 2 },
  bf16: { block: 1, bytes: 2 },
  q4_0: { block: 32, bytes: 18 },
  q4_1: { block: 32, bytes: 20 },
  q5_0: { block: 32, bytes: 22 },
  q5_1: { block: 32, bytes: 24 },
  q8_0: { block: 32, bytes: 34 },
  q4_k: { block: 256, bytes: 144 },
  q5_k: { block: 256, bytes: 176 },
  q6_k: { block: 256, bytes: 210 },
  i32: { block: 1, bytes: 4 },
  i64: { block: 1, bytes: 8 },
};
