// Ops that make ggml nodes. SymbolicOps has already checked every shape of the same closure, so nothing here can abort.
//
// Order: every op is put into the graph as it is called, so that writes to caches and to the shared attention result
// happen in program order although ggml sees no data dependency there.

import { GatewayError } from '../../errors.ts';
import { byteLength, elementCount, mismatch } from '../check.ts';
import {
  type AtomRouter,
  type AtomUses,
  type DType,
  type ExpandPart,
  type Ops,
  type RankRouter,
  type RopeOptions,
  ranksPerPage,
  type ShrinkPart,
  type Tensor,
} from '../kernels.ts';
import type { DeviceScheduler } from './device-scheduler.ts';
import { type GgmlLibrary, ggmlType, type Pointer, tensorLayout } from './library.ts';
import {
  type Arena,
  type Device,
  GgmlTensor,
  isTiled,
  type MemoryPlace,
  ours,
  type Scratch,
  TensorBuffer,
  toNe,
} from './memory.ts';
import type { NativeFunction, NativeKernels } from './native.ts';
import { type RecorderHost, TrainingRecorder } from './training-recorder.ts';
import { expandWhole, shrinkWhole } from './whole-low-rank.ts';

/** Rows from which a product by packed panels pays (a guess). */
const panelRows = 8;
/** Our own kernels read whole blocks of this many numbers. */
export const nativeWidth = 32;
/** Ranks that our own mix has room for (native/routing.c). */
const mixedMax = 256;
/** Heads that our own attention takes: multiples of this, up to that. */
const attendWidth = 16;
const attendHeadMax = 256;
/** A custom op is made with one argument less than a tensor has room for (GGML_MAX_SRC). */
const argumentsMax = 9;
const tasksMax = -1; // GGML_N_TASKS_MAX: as many as there are threads
const ropeNorm = 0;
const ropeNeox = 2;
/** Context length that YaRN scaling would start from; unused while its factor is 0. */
const ropeContext = 2048;

export interface ProgramHost {
  readonly library: GgmlLibrary;
  readonly device: Device;
  readonly scratch: Scratch;
  /** Where stored tensors and inputs lie. */
  readonly place: MemoryPlace;
  /** Set where programs run on a device other than the CPU: then `scratch` is unused. */
  readonly scheduler: DeviceScheduler | undefined;
  /** Our own kernels; none on a device, nor without a compiler. */
  readonly native: NativeKernels['addresses'];
  /** Whether linears over weights of any type go through them. */
  readonly f32Activations: boolean;
}

/** A value inside a recorded program. */
export interface Node extends Tensor {
  readonly pointer: Pointer;
}

/** Arena words of the views that one segment of one attend moves. */
export interface SegmentViews {
  readonly q: number;
  readonly k: number;
  readonly v: number;
  readonly result: number;
  /** What has as many rows as the segment, and what lies at its rows of the shared result. */
  readonly sized: readonly number[];
  readonly moved: readonly number[];
}

export interface MaskSlot {
  readonly word: number;
  readonly address: number;
}

export interface AttendSite {
  readonly q: Pointer;
  readonly rows: number;
  readonly rowBytes: number; // of q and of the result
  readonly k: GgmlTensor;
  readonly v: GgmlTensor;
  readonly cellBytes: number;
  readonly resultAddress: number;
  readonly views: readonly SegmentViews[];
}

/** The size of one axis of a tensor struct, counted in rows. */
export interface RowField {
  readonly word: number;
  readonly axis: number;
}

/** Pages are added in tiers that double: 0, 1, 2–3, 4–7, … so that a graph has few nodes per projection and a row still
 *  pays for at most twice its own pages (exactly for them when they are a power of two). */
export function tierStart(tier: number): number {
  return tier === 0 ? 0 : 2 ** (tier - 1);
}

/** One tier of adapter pages while it is recorded; `rowsAt` marks an axis whose size runs set to the tier's rows. */
interface Tier {
  readonly first: number;
  readonly width: number;
  rowsAt(tensor: Pointer, axis: number): Pointer;
}

interface Placed {
  readonly pointer: Pointer;
  readonly buffer: TensorBuffer;
}

export class Recorder implements Ops {
  readonly graph: Pointer;
  readonly inputs: Map<string, Node> = new Map();
  readonly sites: AttendSite[] = [];
  readonly buffers: TensorBuffer[] = [];
  /** One mask tensor per segment, shared by every attend: all of them see the same segments. */
  readonly masks: MaskSlot[] = [];
  /** Per tier of pages, the fields that hold how many rows reach it. */
  readonly tierFields: RowField[][] = [];
  /** The input that tells which rows reach which tier. */
  lowRankPages: Tensor | undefined;
  readonly #host: ProgramHost;
  readonly #arena: Arena;
  readonly #maskPointers: Pointer[] = [];
  readonly #self: RecorderHost = {
    op: (...values) => this.#op(...values),
    node: (pointer, shape) => this.#node(pointer, shape),
    rope: ropeArguments,
    native: (name) => this.#host.native.get(name),
  };
  readonly training: TrainingRecorder = new TrainingRecorder(this.#self);
  readonly #roundings: Map<Tensor, { readonly bits: number; readonly node: Node }> = new Map();
  #attendResult: Placed | undefined;
  readonly #segments: number;
  /** The segments of a run as our own attention reads them, [S, 4]; set once something attends. */
  segmentTable: Node | undefined;
  /** Rows and cells of every attend: what a run's segments must fit. */
  readonly attends: { readonly rows: number; readonly cells: number }[] = [];

  constructor(host: ProgramHost, arena: Arena, limits: { segments: number; nodes: number }) {
    this.#host = host;
    this.#arena = arena;
    this.graph = host.library.pointer('ggml_new_graph_custom', arena.context, limits.nodes, false);
    this.#segments = limits.segments;
    if (this.#ownAttend !== undefined) return;
    for (let i = 0; i < limits.segments; i++) {
      const mask = this.#tensor('f16', [1, 1]);
      this.#maskPointers.push(mask);
      this.masks.push({ word: arena.locate(mask), address: Number(mask) });
      if (host.scheduler !== undefined) host.library.call('ggml_set_input', mask);
    }
  }

  #tensor(dtype: DType, shape: readonly number[]): Pointer {
    return this.#op('ggml_new_tensor_4d', ggmlType[dtype], ...toNe(shape));
  }

  #op(name: Parameters<GgmlLibrary['pointer']>[0], ...values: unknown[]): Pointer {
    return this.#host.library.pointer(name, this.#arena.context, ...values);
  }

  /** Puts a node into the graph now, and wraps it. */
  #node(pointer: Pointer, shape: readonly number[], dtype: DType = 'f32'): Node {
    this.#host.library.call('ggml_build_forward_expand', this.graph, pointer);
    return { pointer, shape, dtype };
  }

  /** A tensor with memory of its own, outside the scratch that programs share. */
  #placed(dtype: DType, shape: readonly number[]): Placed {
    const pointer = this.#tensor(dtype, shape);
    const buffer = TensorBuffer.of(this.#host.library, this.#host.place, pointer);
    buffer.clear(); // padding rows are computed too: no leftover NaN slows them or shows in a debugger
    this.buffers.push(buffer);
    return { pointer, buffer };
  }

  input(name: string, dtype: 'f32' | 'i32' | 'i64', shape: readonly number[]): Node {
    const node: Node = { pointer: this.#placed(dtype, shape).pointer, shape, dtype };
    this.inputs.set(name, node);
    return node;
  }

  embed(table: Tensor, ids: Tensor): Node {
    if (isTiled(table)) {
      const shape = [ids.shape[0]!, table.shape[1]!];
      return this.#node(
        this.#custom(this.#own('rankgate_embed_tiles'), shape, [table, ids]),
        shape,
      );
    }
    const pointer = this.#op('ggml_get_rows', pointerOf(table), pointerOf(ids));
    return this.#node(pointer, [ids.shape[0]!, table.shape[1]!]);
  }

  rmsNorm(x: Tensor, weight: Tensor, eps: number): Node {
    const normed = this.#op('ggml_rms_norm', pointerOf(x), eps);
    return this.#node(this.#op('ggml_mul', normed, pointerOf(weight)), x.shape);
  }

  linear(x: Tensor, w: Tensor): Node {
    const shape = [x.shape[0]!, w.shape[0]!];
    if (isTiled(w)) {
      const sources = [w, this.#rounded(x, ours(w).way === 'int16' ? 16 : 8)];
      return this.#node(this.#custom(this.#own('rankgate_linear_tiles'), shape, sources), shape);
    }
    const way = (w instanceof GgmlTensor && w.way) || (this.#host.f32Activations && 'f32');
    const own = way === 'f32' ? this.#host.native.get('rankgate_linear') : undefined;
    if (own !== undefined && x.shape[1]! % nativeWidth === 0) {
      return this.#node(this.#custom(own, shape, [w, x]), shape);
    }
    if (w.dtype === 'f32' && x.shape[0]! >= panelRows) return this.training.linear(x, w);
    const pointer = this.#op('ggml_mul_mat', pointerOf(w), pointerOf(x));
    return this.#node(pointer, shape);
  }

  /** Activations as tiles are multiplied with; linears of one x share it. */
  #rounded(x: Tensor, bits: 8 | 16): Node {
    const known = this.#roundings.get(x);
    if (known?.bits === bits) return known.node;
    const words = (x.shape[1]! / nativeWidth) * (2 + bits); // scale, sum, 32 numbers
    const shape = [x.shape[0]!, words];
    const node = this.#node(this.#custom(this.#own('rankgate_round'), shape, [x]), shape);
    this.#roundings.set(x, { bits, node });
    return node;
  }

  #own(name: NativeFunction): Pointer {
    const address = this.#host.native.get(name);
    if (address === undefined) throw new GatewayError('ENGINE_FAILED', `ggml: no kernel ${name}`);
    return address;
  }

  add(a: Tensor, b: Tensor): Node {
    return this.#node(this.#op('ggml_add', pointerOf(a), pointerOf(b)), a.shape);
  }

  mul(a: Tensor, b: Tensor): Node {
    return this.#node(this.#op('ggml_mul', pointerOf(a), pointerOf(b)), a.shape);
  }

  swiglu(gate: Tensor, up: Tensor): Node {
    return this.#node(this.#op('ggml_swiglu_split', pointerOf(gate), pointerOf(up)), gate.shape);
  }

  rope(x: Tensor, positions: Tensor, options: RopeOptions): Node {
    const values = [pointerOf(x), pointerOf(positions), ...ropeArguments(options)];
    return this.#node(this.#op('ggml_rope_ext', ...values), x.shape);
  }

  reshape(x: Tensor, shape: readonly number[]): Node {
    return this.#node(this.#op('ggml_reshape_4d', pointerOf(x), ...toNe(shape)), shape, x.dtype);
  }

  slice(x: Tensor, index: number): Node {
    const [, ...shape] = x.shape;
    const [inner, outer, top] = toNe(shape);
    const rowBytes = byteLength(x.dtype, [inner]);
    const strides = [rowBytes, rowBytes * outer, rowBytes * outer * top * index];
    const pointer = this.#op('ggml_view_3d', pointerOf(x), inner, outer, top, ...strides);
    return this.#node(pointer, shape, x.dtype);
  }

  writeCells(cache: Tensor, x: Tensor, cells: Tensor): void {
    const pointer = this.#op('ggml_set_rows', ours(cache).pointer, pointerOf(x), pointerOf(cells));
    this.#host.scheduler?.accelerator.mustRun(pointer, `write ${cache.dtype} cells`);
    this.#node(pointer, cache.shape, cache.dtype);
  }

  attend(q: Tensor, k: Tensor, v: Tensor): Node {
    const [rows, heads, headSize] = q.shape as [number, number, number];
    this.attends.push({ rows, cells: k.shape[0]! });
    const own = this.#ownAttend;
    if (own !== undefined) {
      if (headSize % attendWidth !== 0 || headSize > attendHeadMax) {
        throw new GatewayError(
          'UNSUPPORTED',
          `attend: heads of ${headSize}; our own kernel takes multiples of ${attendWidth} up to ${attendHeadMax}`,
        );
      }
      const shape = [rows, heads * headSize];
      const table = [this.#segments, 4];
      this.segmentTable ??= {
        pointer: this.#placed('i32', table).pointer,
        shape: table,
        dtype: 'i32',
      };
      return this.#node(this.#custom(own, shape, [q, k, v, this.segmentTable]), shape);
    }
    const rowBytes = heads * headSize * 4;
    const cellBytes = byteLength(k.dtype, [k.shape[1]!]);
    const shape = [rows, heads * headSize] as const;
    const result = this.#sharedResult(...shape);
    const views = this.#maskPointers.map((mask) => {
      const qView = this.#op(
        'ggml_view_3d',
        pointerOf(q),
        headSize,
        1,
        heads,
        rowBytes,
        headSize * 4,
        0,
      );
      const kView = this.#cells(ours(k), headSize, cellBytes);
      const vView = this.#cells(ours(v), headSize, cellBytes);
      const scale = 1 / Math.sqrt(headSize);
      const part = this.#op('ggml_flash_attn_ext', qView, kView, vView, mask, scale, 0, 0);
      const moved = this.#putPart(part, result, q);
      const at = (tensor: Pointer): number => this.#arena.locate(tensor);
      return {
        q: at(qView),
        k: at(kView),
        v: at(vView),
        result: at(part),
        sized: [...new Set([part, ...moved])].map(at),
        moved: moved.map(at),
      };
    });
    this.sites.push({
      q: pointerOf(q),
      rows,
      rowBytes,
      k: ours(k),
      v: ours(v),
      cellBytes,
      resultAddress: Number(result.buffer.address),
      views,
    });
    // A copy: the next attend may write the shared result before this one has been read.
    return this.#node(this.#op('ggml_cont', this.#written(result, shape)), shape);
  }

  /** The result for its reader. Devices reorder nodes, but not a view before a write to what it views: there it is one. */
  #written({ pointer }: Placed, [rows, width]: readonly [number, number]): Pointer {
    if (this.#host.scheduler === undefined) return pointer;
    return this.#op('ggml_reshape_4d', pointer, width, rows, 1, 1);
  }

  /** Lets a segment's part lie in the result, and returns what runs move there: the part itself or, where the CPU may have
   *  to compute it for a device, a copy. */
  #putPart(part: Pointer, result: Placed, { shape }: Tensor): readonly Pointer[] {
    const { scheduler } = this.#host;
    if (scheduler === undefined) result.buffer.adopt(part);
    this.#node(part, shape);
    if (scheduler === undefined) return [part];
    const [, heads, headSize] = shape as [number, number, number];
    const sizes = [headSize, heads, 1, headSize * 4, heads * headSize * 4, 0];
    const target = this.#op('ggml_view_3d', result.pointer, ...sizes);
    const copy = this.#op('ggml_cpy', part, target);
    scheduler.accelerator.mustRun(copy, 'copy f32 rows');
    this.#node(copy, shape);
    return [target, copy];
  }

  /** One for every attend, except where a device may run the writes of a later attend before an earlier one's copy. */
  #sharedResult(rows: number, width: number): Placed {
    if (this.#host.scheduler !== undefined) return this.#placed('f32', [rows, width]);
    this.#attendResult ??= this.#placed('f32', [rows, width]);
    return this.#attendResult;
  }

  /** One cell of a cache as [Hkv, 1, D]; runs move it and stretch it over a sequence's cells. */
  #cells(cache: GgmlTensor, headSize: number, cellBytes: number): Pointer {
    const kvHeads = cache.shape[1]! / headSize;
    const headBytes = cellBytes / kvHeads;
    return this.#op('ggml_view_3d', cache.pointer, headSize, 1, kvHeads, cellBytes, headBytes, 0);
  }

  shrink(x: Tensor, pages: Tensor, parts: readonly ShrinkPart[], uses: Tensor): Node[] {
    if (this.#host.scheduler !== undefined) {
      return shrinkWhole(this.#self, { x, pages, uses }, parts);
    }
    const own = this.#host.native.get('rankgate_shrink');
    const [rows, count] = pages.shape as [number, number];
    if (own !== undefined && x.shape[1]! % nativeWidth === 0) {
      const shape = [parts.length, rows, count * ranksPerPage];
      const sources = [x, pages, uses, ...parts.flatMap(({ a, gate }) => [a, gate])];
      const all = this.#custom(own, shape, sources);
      this.#node(all, shape);
      return parts.map((_, i) => {
        const rowBytes = count * ranksPerPage * 4;
        const sizes = [count * ranksPerPage, rows, rowBytes, i * rows * rowBytes];
        return this.#node(this.#op('ggml_view_2d', all, ...sizes), shape.slice(1));
      });
    }
    this.#tellsTiers(pages);
    return parts.map(({ a, gate }) => {
      const shape = [rows, count * ranksPerPage];
      const scale = this.#node(this.#op('ggml_get_rows', pointerOf(gate), pointerOf(uses)), shape);
      const h = this.#node(this.#op('ggml_fill', scale.pointer, 0), shape);
      for (const tier of this.#tiers(pages))
        this.#shrinkTier(h, tier, { x, pages, a, gate: scale });
      return h;
    });
  }

  /** Runs read this input to learn which rows reach which tier. */
  #tellsTiers(pages: Tensor): void {
    this.lowRankPages ??= pages;
    if (this.lowRankPages !== pages) throw mismatch('shrink', 'one pages input per program');
  }

  *#tiers(pages: Tensor): Generator<Tier> {
    const count = pages.shape[1]!;
    for (let tier = 0; tierStart(tier) < count; tier++) {
      const first = tierStart(tier);
      const fields: RowField[] = this.tierFields[tier] ?? [];
      this.tierFields[tier] = fields;
      yield {
        first,
        width: Math.min(tierStart(tier + 1), count) - first,
        rowsAt: (tensor, axis) => {
          fields.push({ word: this.#arena.locate(tensor), axis });
          return tensor;
        },
      };
    }
  }

  /** Ranks of one tier of pages as [T, width, 8] of a [T,8P] tensor. */
  #ranks(h: Tensor, { first, width, rowsAt }: Tier): Pointer {
    const [rows, ranks] = [h.shape[0]!, elementCount(h.shape.slice(1))];
    const [pageBytes, offset] = [ranksPerPage * 4, first * ranksPerPage * 4];
    const sizes = [ranksPerPage, width, rows, pageBytes, ranks * 4, offset];
    return rowsAt(this.#op('ggml_view_3d', pointerOf(h), ...sizes), 2);
  }

  #ids(pages: Tensor, { first, width, rowsAt }: Tier): Pointer {
    const [rows, count] = pages.shape as [number, number];
    return rowsAt(this.#op('ggml_view_2d', pointerOf(pages), width, rows, count * 4, first * 4), 1);
  }

  #shrinkTier(
    h: Node,
    tier: Tier,
    { x, pages, a, gate }: ShrinkPart & { readonly x: Tensor; readonly pages: Tensor },
  ): void {
    const [rows, inner] = x.shape as [number, number];
    const { rowsAt } = tier;
    const sizes = [inner, 1, rows, inner * 4, inner * 4, 0];
    const xView = rowsAt(this.#op('ggml_view_3d', pointerOf(x), ...sizes), 2);
    const product = this.#op('ggml_mul_mat_id', pointerOf(a), xView, this.#ids(pages, tier));
    const scaled = this.#op('ggml_mul', rowsAt(product, 2), this.#ranks(gate, tier)); // [T, w, 8]
    const placed = this.#op('ggml_cpy', rowsAt(scaled, 2), this.#ranks(h, tier));
    this.#node(rowsAt(placed, 2), h.shape);
  }

  routeRanks(x: Tensor, hs: readonly Tensor[], router: RankRouter): Node[] {
    const { uses, groups, temperatures, biases } = router;
    const own = this.#only('rankgate_route_ranks', 'routeRanks');
    return hs.map((h, i) => {
      const sources = [x, h, uses, groups, temperatures, biases[i]!];
      return this.#node(this.#custom(own, h.shape, sources), h.shape);
    });
  }

  routeAtoms(h: Tensor, earlier: readonly Tensor[], router: AtomRouter, of: AtomUses): Node {
    const own = this.#only('rankgate_route_atoms', 'routeAtoms');
    const rows = h.shape[0]!;
    const sources = [h, router.query, of.uses, of.keys, of.bias, of.topK];
    if (earlier.length > 0) {
      const shape = [rows, router.query.shape[0]!];
      const past = [h, router.summary, router.context, ...earlier];
      sources.push(
        this.#node(this.#custom(this.#own('rankgate_atom_context'), shape, past), shape),
      );
    }
    const shape = [rows, 1 + of.bias.shape[1]!];
    return this.#node(this.#custom(own, shape, sources), shape);
  }

  #only(name: NativeFunction, op: string): Pointer {
    const own = this.#host.native.get(name);
    if (own === undefined) throw new GatewayError('UNSUPPORTED', `${op} needs the native kernels`);
    return own;
  }

  mixRanks(h: Tensor, atoms: Tensor, weights: Tensor): Node {
    const own = this.#host.native.get('rankgate_mix_ranks');
    if (own !== undefined && atoms.shape[1]! <= mixedMax) {
      return this.#node(this.#custom(own, h.shape, [h, atoms, weights]), h.shape);
    }
    const [rows, ranks] = h.shape as [number, number];
    const [mixes, mixed] = atoms.shape as [number, number];
    const part = (width: number, from: number): Pointer =>
      this.#op(
        'ggml_cont',
        this.#op('ggml_view_2d', pointerOf(h), width, rows, ranks * 4, from * 4),
      );
    const state = part(mixed, 0); // [T, r]
    const flat = this.#op('ggml_reshape_4d', pointerOf(atoms), mixed, mixed * mixes, 1, 1);
    const mapped = this.#op('ggml_mul_mat', flat, state); // [T, J·r]
    const share = (j: number): Pointer =>
      this.#op('ggml_view_2d', pointerOf(weights), 1, rows, (1 + mixes) * 4, j * 4);
    let sum = this.#op('ggml_mul', state, share(0));
    for (let j = 0; j < mixes; j++) {
      const rowBytes = mixed * mixes * 4;
      const map = this.#op('ggml_view_2d', mapped, mixed, rows, rowBytes, j * mixed * 4);
      sum = this.#op('ggml_add', sum, this.#op('ggml_mul', map, share(1 + j)));
    }
    if (mixed < ranks) sum = this.#op('ggml_concat', sum, part(ranks - mixed, mixed), 0);
    return this.#node(sum, h.shape);
  }

  expand(pages: Tensor, parts: readonly ExpandPart[]): Node[] {
    if (this.#host.scheduler !== undefined) {
      return parts.map((part) => expandWhole(this.#self, pages, part));
    }
    const [composed, own] = [true, false].map((transposed) =>
      parts.filter(({ b }) => ours(b).transposedPages === transposed),
    ) as [ExpandPart[], ExpandPart[]];
    if (own.length > 0) this.#expandOwn(pages, own);
    for (const part of composed) this.#expandTiers(pages, part);
    return parts.map(({ y }) => ({ pointer: pointerOf(y), shape: y.shape, dtype: 'f32' }));
  }

  #expandOwn(pages: Tensor, parts: readonly ExpandPart[]): void {
    const sources = [pages, ...parts.flatMap(({ y, h, b }) => [y, h, b])];
    const shape = [parts.length];
    const sum = this.#custom(this.#own('rankgate_expand'), shape, sources.slice(0, argumentsMax));
    for (const [i, source] of sources.slice(argumentsMax).entries()) {
      const offset = tensorLayout.src + 8 * (argumentsMax + i);
      this.#arena.patch(this.#arena.locate(sum), offset, Number(pointerOf(source)));
    }
    this.#node(sum, shape);
  }

  #expandTiers(pages: Tensor, { y, h, b }: ExpandPart): void {
    this.#tellsTiers(pages);
    const [rows, outer] = y.shape as [number, number];
    const rowBytes = outer * 4;
    for (const tier of this.#tiers(pages)) {
      const { width, rowsAt } = tier;
      const ids = this.#ids(pages, tier);
      const product = this.#op('ggml_mul_mat_id', pointerOf(b), this.#ranks(h, tier), ids);
      const parts = rowsAt(product, 2); // [T, w, N]
      for (let page = 0; page < width; page++) {
        const sizes = [outer, rows, width * rowBytes, page * rowBytes];
        const part = rowsAt(this.#op('ggml_view_2d', parts, ...sizes), 1);
        const target = rowsAt(this.#op('ggml_view_2d', pointerOf(y), outer, rows, rowBytes, 0), 1);
        this.#node(rowsAt(this.#op('ggml_add_inplace', target, part), 1), y.shape);
      }
    }
  }

  /** In f32 as the linears: what is token-equal to llama.cpp uses ggml's, which rounds to f16 on the way. */
  get #ownAttend(): Pointer | undefined {
    return this.#host.f32Activations ? this.#host.native.get('rankgate_attend') : undefined;
  }

  #custom(own: Pointer, shape: readonly number[], sources: readonly Tensor[]): Pointer {
    const args = addressesOf(sources);
    const sizes = [ggmlType.f32, ...toNe(shape)];
    return this.#op('ggml_custom_4d', ...sizes, args, args.length, own, tasksMax, null);
  }

  gatherRows(x: Tensor, rows: Tensor): Node {
    const pointer = this.#op('ggml_get_rows', pointerOf(x), pointerOf(rows));
    return this.#node(pointer, [rows.shape[0]!, x.shape[1]!]);
  }
}

/** What ggml's rope takes after x and the positions. */
function ropeArguments({ size, base, style }: RopeOptions): readonly unknown[] {
  const mode = style === 'norm' ? ropeNorm : ropeNeox;
  const scaling = [base, 1, 0, 1, 32, 1]; // base, scale; no YaRN: extrapolation 0, attention 1, betas unused
  return [null, size, mode, ropeContext, ...scaling];
}

function addressesOf(tensors: readonly Tensor[]): BigUint64Array {
  return BigUint64Array.from(tensors, pointerOf);
}

export function pointerOf(tensor: Tensor): Pointer {
  return (tensor as Node | GgmlTensor).pointer;
}
