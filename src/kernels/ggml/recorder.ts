// Ops that make ggml nodes. SymbolicOps has already checked every shape of the same closure, so nothing here can abort.
//
// Order: every op is put into the graph as it is called, so that writes to caches and to the shared attention result
// happen in program order although ggml sees no data dependency there.

import { byteLength, mismatch } from '../check.ts';
import type { DType, LowRank, Ops, RopeOptions, Tensor } from '../kernels.ts';
import { type GgmlLibrary, ggmlType, type Pointer } from './library.ts';
import {
  type Arena,
  type Device,
  type GgmlTensor,
  ours,
  type Scratch,
  TensorBuffer,
  toNe,
} from './memory.ts';

const ropeNorm = 0;
const ropeNeox = 2;
/** Context length that YaRN scaling would start from; unused while its factor is 0. */
const ropeContext = 2048;

export interface ProgramHost {
  readonly library: GgmlLibrary;
  readonly device: Device;
  readonly scratch: Scratch;
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
  #attendResult: Placed | undefined;

  constructor(host: ProgramHost, arena: Arena, limits: { segments: number; nodes: number }) {
    this.#host = host;
    this.#arena = arena;
    this.graph = host.library.pointer('ggml_new_graph_custom', arena.context, limits.nodes, false);
    for (let i = 0; i < limits.segments; i++) {
      const mask = this.#tensor('f16', [1, 1]);
      this.#maskPointers.push(mask);
      this.masks.push({ word: arena.locate(mask), address: Number(mask) });
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
    const buffer = new TensorBuffer(this.#host.library, this.#host.device, pointer);
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
    const pointer = this.#op('ggml_get_rows', pointerOf(table), pointerOf(ids));
    return this.#node(pointer, [ids.shape[0]!, table.shape[1]!]);
  }

  rmsNorm(x: Tensor, weight: Tensor, eps: number): Node {
    const normed = this.#op('ggml_rms_norm', pointerOf(x), eps);
    return this.#node(this.#op('ggml_mul', normed, pointerOf(weight)), x.shape);
  }

  linear(x: Tensor, w: Tensor): Node {
    const pointer = this.#op('ggml_mul_mat', pointerOf(w), pointerOf(x));
    return this.#node(pointer, [x.shape[0]!, w.shape[0]!]);
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

  rope(x: Tensor, positions: Tensor, { size, base, style }: RopeOptions): Node {
    const mode = style === 'norm' ? ropeNorm : ropeNeox;
    const scaling = [base, 1, 0, 1, 32, 1]; // base, scale; no YaRN: extrapolation 0, attention 1, betas unused
    const [values, at] = [pointerOf(x), pointerOf(positions)];
    const pointer = this.#op(
      'ggml_rope_ext',
      values,
      at,
      null,
      size,
      mode,
      ropeContext,
      ...scaling,
    );
    return this.#node(pointer, x.shape);
  }

  reshape(x: Tensor, shape: readonly number[]): Node {
    return this.#node(this.#op('ggml_reshape_4d', pointerOf(x), ...toNe(shape)), shape, x.dtype);
  }

  writeCells(cache: Tensor, x: Tensor, cells: Tensor): void {
    const pointer = this.#op('ggml_set_rows', ours(cache).pointer, pointerOf(x), pointerOf(cells));
    this.#node(pointer, cache.shape, cache.dtype);
  }

  attend(q: Tensor, k: Tensor, v: Tensor): Node {
    const [rows, heads, headSize] = q.shape as [number, number, number];
    const rowBytes = heads * headSize * 4;
    const cellBytes = byteLength(k.dtype, [k.shape[1]!]);
    const result = this.#sharedResult(rows, heads * headSize);
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
      result.buffer.adopt(part);
      this.#node(part, [1, heads, headSize]);
      return {
        q: this.#arena.locate(qView),
        k: this.#arena.locate(kView),
        v: this.#arena.locate(vView),
        result: this.#arena.locate(part),
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
    return this.#node(this.#op('ggml_cont', result.pointer), [rows, heads * headSize]);
  }

  #sharedResult(rows: number, width: number): Placed {
    this.#attendResult ??= this.#placed('f32', [rows, width]);
    return this.#attendResult;
  }

  /** One cell of a cache as [Hkv, 1, D]; runs move it and stretch it over a sequence's cells. */
  #cells(cache: GgmlTensor, headSize: number, cellBytes: number): Pointer {
    const kvHeads = cache.shape[1]! / headSize;
    const headBytes = cellBytes / kvHeads;
    return this.#op('ggml_view_3d', cache.pointer, headSize, 1, kvHeads, cellBytes, headBytes, 0);
  }

  addLowRank(y: Tensor, x: Tensor, delta: LowRank): Node {
    const count = delta.pages.shape[1]!;
    this.lowRankPages ??= delta.pages;
    if (this.lowRankPages !== delta.pages)
      throw mismatch('addLowRank', 'one pages input per program');
    for (let tier = 0; tierStart(tier) < count; tier++) this.#addTier(y, x, { ...delta, tier });
    return { pointer: pointerOf(y), shape: y.shape, dtype: 'f32' };
  }

  /** Pages tierStart(g) … tierEnd(g)-1 of the rows that reach them, added into y. Every node's row count is a field that
   *  a run sets (`tierFields`): rows beyond it cost nothing. */
  #addTier(y: Tensor, x: Tensor, { a, b, pages, active, tier }: LowRank & { tier: number }): void {
    const [rows, count] = pages.shape as [number, number];
    const [inner, outer] = [x.shape[1]!, y.shape[1]!];
    const [first, ranks] = [tierStart(tier), a.shape[1]!];
    const width = Math.min(tierStart(tier + 1), count) - first;
    const fields: RowField[] = this.tierFields[tier] ?? [];
    this.tierFields[tier] = fields;
    const rowsAt = (tensor: Pointer, axis: number): Pointer => {
      fields.push({ word: this.#arena.locate(tensor), axis });
      return tensor;
    };
    const pageBytes = ranks * 4;
    const xView = rowsAt(
      this.#op('ggml_view_3d', pointerOf(x), inner, 1, rows, inner * 4, inner * 4, 0),
      2,
    );
    const ids = rowsAt(
      this.#op('ggml_view_2d', pointerOf(pages), width, rows, count * 4, first * 4),
      1,
    );
    const scales = rowsAt(
      this.#op(
        'ggml_view_3d',
        pointerOf(active),
        ranks,
        width,
        rows,
        pageBytes,
        count * pageBytes,
        first * pageBytes,
      ),
      2,
    );
    const h = rowsAt(this.#op('ggml_mul_mat_id', pointerOf(a), xView, ids), 2); // [T, w, 8]
    const scaled = rowsAt(this.#op('ggml_mul', h, scales), 2);
    const parts = rowsAt(this.#op('ggml_mul_mat_id', pointerOf(b), scaled, ids), 2); // [T, w, N]
    for (let page = 0; page < width; page++) {
      const partBytes = outer * 4;
      const part = rowsAt(
        this.#op('ggml_view_2d', parts, outer, rows, width * partBytes, page * partBytes),
        1,
      );
      const target = rowsAt(this.#op('ggml_view_2d', pointerOf(y), outer, rows, partBytes, 0), 1);
      this.#node(rowsAt(this.#op('ggml_add_inplace', target, part), 1), y.shape);
    }
  }

  gatherRows(x: Tensor, rows: Tensor): Node {
    const pointer = this.#op('ggml_get_rows', pointerOf(x), pointerOf(rows));
    return this.#node(pointer, [rows.shape[0]!, x.shape[1]!]);
  }
}

export function pointerOf(tensor: Tensor): Pointer {
  return (tensor as Node | GgmlTensor).pointer;
}
