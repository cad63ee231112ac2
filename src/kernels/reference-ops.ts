// The ops of the reference backend: one obvious loop nest each, in f32, computed as they are called.

import { byteLength, checkSegments, elementCount, mismatch } from './check.ts';
import { dequantizeRows } from './dequantize.ts';
import { f32ToF16Bits } from './half.ts';
import {
  type AtomRouter,
  type AtomUses,
  type AttentionSegment,
  type DType,
  type ExpandPart,
  type Ops,
  type RankRouter,
  type RopeOptions,
  ranksPerPage,
  type ShrinkPart,
  type StoredTensor,
  type Tensor,
} from './kernels.ts';
import { routeAtoms, routeRanks } from './rank-routing.ts';
import type { InputData } from './symbolic-ops.ts';
import { ReferenceTraining } from './training-reference.ts';

export interface Value extends Tensor {
  /** Row-major numbers; i64 values are exact below 2^53. */
  readonly values: Float32Array | Float64Array | Int32Array;
}

export class ReferenceTensor implements StoredTensor {
  readonly dtype: DType;
  readonly shape: readonly number[];
  readonly bytes: number;
  readonly raw: Uint8Array;

  constructor(dtype: DType, shape: readonly number[]) {
    this.dtype = dtype;
    this.shape = shape;
    this.bytes = byteLength(dtype, shape);
    this.raw = new Uint8Array(this.bytes);
  }

  /** The stored numbers as f32. */
  get values(): Float32Array {
    const out = new Float32Array(elementCount(this.shape));
    if (this.dtype === 'i32' || this.dtype === 'i64')
      throw mismatch('store', 'integers are not weights');
    dequantizeRows(this.dtype, this.raw, out);
    return out;
  }
}

export function stored(tensor: Tensor): ReferenceTensor {
  if (tensor instanceof ReferenceTensor) return tensor;
  throw mismatch('reference', 'the tensor belongs to another backend');
}

function f32(shape: readonly number[]): Value & { readonly values: Float32Array } {
  return { dtype: 'f32', shape, values: new Float32Array(elementCount(shape)) };
}

function values(tensor: Tensor): Float32Array {
  return (tensor as Value).values as Float32Array;
}

export class EagerOps implements Ops {
  readonly training: ReferenceTraining = new ReferenceTraining();
  readonly #inputs: ReadonlyMap<string, InputData>;
  readonly #segments: readonly AttentionSegment[];
  readonly #segmentsMax: number;

  constructor(
    inputs: ReadonlyMap<string, InputData>,
    segments: readonly AttentionSegment[],
    segmentsMax: number,
  ) {
    this.#inputs = inputs;
    this.#segments = segments;
    this.#segmentsMax = segmentsMax;
  }

  input(name: string, dtype: 'f32' | 'i32' | 'i64', shape: readonly number[]): Value {
    const data = this.#inputs.get(name);
    if (data === undefined) throw mismatch('run', `inputs never written: ${name}`);
    const numbers = data instanceof BigInt64Array ? Float64Array.from(data, Number) : data;
    return { dtype, shape, values: numbers };
  }

  embed(table: Tensor, ids: Tensor): Tensor {
    return this.gatherRows({ ...table, values: stored(table).values } as Value, ids);
  }

  rmsNorm(x: Tensor, weight: Tensor, eps: number): Tensor {
    const y = f32(x.shape);
    const [from, scale] = [values(x), stored(weight).values];
    const width = scale.length;
    for (let start = 0; start < from.length; start += width) {
      let squares = 0;
      for (let i = 0; i < width; i++) squares += from[start + i]! ** 2;
      const norm = 1 / Math.sqrt(squares / width + eps);
      for (let i = 0; i < width; i++) y.values[start + i] = from[start + i]! * norm * scale[i]!;
    }
    return y;
  }

  linear(x: Tensor, w: Tensor): Tensor {
    const [rows, inner] = x.shape as [number, number];
    const outer = w.shape[0]!;
    const y = f32([rows, outer]);
    const [from, weight] = [values(x), values(w)];
    for (let t = 0; t < rows; t++) {
      for (let n = 0; n < outer; n++) {
        let sum = 0;
        for (let k = 0; k < inner; k++) sum += from[t * inner + k]! * weight[n * inner + k]!;
        y.values[t * outer + n] = sum;
      }
    }
    return y;
  }

  #each(a: Tensor, b: Tensor, f: (p: number, q: number) => number): Tensor {
    const y = f32(a.shape);
    const [p, q] = [values(a), values(b)];
    for (let i = 0; i < p.length; i++) y.values[i] = f(p[i]!, q[i]!);
    return y;
  }

  add(a: Tensor, b: Tensor): Tensor {
    return this.#each(a, b, (p, q) => p + q);
  }

  mul(a: Tensor, b: Tensor): Tensor {
    return this.#each(a, b, (p, q) => p * q);
  }

  swiglu(gate: Tensor, up: Tensor): Tensor {
    return this.#each(gate, up, (g, u) => (g / (1 + Math.exp(-g))) * u);
  }

  rope(x: Tensor, positions: Tensor, { size, base, style }: RopeOptions): Tensor {
    const [rows, heads, headSize] = x.shape as [number, number, number];
    const y: Value = { dtype: 'f32', shape: x.shape, values: values(x).slice() };
    const at = (positions as Value).values;
    for (let t = 0; t < rows; t++) {
      for (let h = 0; h < heads; h++) {
        const head = (t * heads + h) * headSize;
        for (let i = 0; i < size / 2; i++) {
          const angle = at[t]! * base ** ((-2 * i) / size);
          const first = head + (style === 'norm' ? 2 * i : i);
          const second = head + (style === 'norm' ? 2 * i + 1 : i + size / 2);
          const [p, q] = [values(x)[first]!, values(x)[second]!];
          y.values[first] = p * Math.cos(angle) - q * Math.sin(angle);
          y.values[second] = p * Math.sin(angle) + q * Math.cos(angle);
        }
      }
    }
    return y;
  }

  reshape(x: Tensor, shape: readonly number[]): Tensor {
    return { ...(x as Value), shape } as Value;
  }

  slice(x: Tensor, index: number): Tensor {
    const shape = x.shape.slice(1);
    const [from, size] = [(x as Value).values, elementCount(shape)];
    return {
      dtype: x.dtype,
      shape,
      values: from.subarray(index * size, (index + 1) * size),
    } as Value;
  }

  writeCells(cache: Tensor, x: Tensor, cells: Tensor): void {
    const { raw, dtype } = stored(cache);
    const width = x.shape[1]!;
    const at = (cells as Value).values;
    for (let t = 0; t < x.shape[0]!; t++) {
      const row = values(x).slice(t * width, (t + 1) * width);
      const bits = new Uint16Array(width);
      if (dtype === 'f16') f32ToF16Bits(row, bits);
      const bytes = new Uint8Array(dtype === 'f16' ? bits.buffer : row.buffer);
      raw.set(bytes, at[t]! * bytes.length);
    }
  }

  attend(q: Tensor, k: Tensor, v: Tensor): Tensor {
    const [rows, heads, headSize] = q.shape as [number, number, number];
    const y = f32([rows, heads * headSize]);
    const width = k.shape[1]!;
    const group = (heads * headSize) / width; // query heads per key head
    const [keys, cached] = [stored(k).values, stored(v).values];
    checkSegments(this.#segments, { rows, cells: k.shape[0]!, segmentsMax: this.#segmentsMax });
    for (const { rowStart, rowCount, cellBase, cells } of this.#segments) {
      for (let row = 0; row < rowCount; row++) {
        const seen = cells - rowCount + row + 1;
        for (let h = 0; h < heads; h++) {
          const from = ((rowStart + row) * heads + h) * headSize;
          const channel = Math.floor(h / group) * headSize;
          const cell = (c: number): number => (cellBase + c) * width + channel;
          const scores = Array.from({ length: seen }, (_, c) => {
            let dot = 0;
            for (let d = 0; d < headSize; d++) dot += values(q)[from + d]! * keys[cell(c) + d]!;
            return dot / Math.sqrt(headSize);
          });
          const top = scores.reduce((p, s) => Math.max(p, s), Number.NEGATIVE_INFINITY);
          const weights = scores.map((score) => Math.exp(score - top));
          const total = weights.reduce((sum, weight) => sum + weight, 0);
          for (let d = 0; d < headSize; d++) {
            let sum = 0;
            for (let c = 0; c < seen; c++) sum += weights[c]! * cached[cell(c) + d]!;
            y.values[from + d] = sum / total;
          }
        }
      }
    }
    return y;
  }

  shrink(x: Tensor, pages: Tensor, parts: readonly ShrinkPart[], uses: Tensor): Tensor[] {
    const [rows, count] = pages.shape as [number, number];
    const inner = x.shape[1]!;
    const ids = (pages as Value).values;
    return parts.map(({ a, gate }) => {
      const h = f32([rows, count * ranksPerPage]);
      const weights = stored(a).values;
      for (let i = 0; i < h.values.length; i++) {
        const page = ids[Math.floor(i / ranksPerPage)]!;
        if (page === 0) continue;
        const row = Math.floor(i / (count * ranksPerPage));
        const use = (uses as Value).values[row]! * count * ranksPerPage;
        const from = (page * ranksPerPage + (i % ranksPerPage)) * inner;
        let sum = 0;
        for (let k = 0; k < inner; k++) sum += weights[from + k]! * values(x)[row * inner + k]!;
        h.values[i] = values(gate)[use + (i % (count * ranksPerPage))]! * sum;
      }
      return h;
    });
  }

  routeRanks(x: Tensor, hs: readonly Tensor[], router: RankRouter): Tensor[] {
    const routed = routeRanks(values, x, hs, router);
    return hs.map(({ shape }, i): Value => ({ dtype: 'f32', shape, values: routed[i]! }));
  }

  routeAtoms(h: Tensor, earlier: readonly Tensor[], router: AtomRouter, uses: AtomUses): Value {
    const weights = routeAtoms(values, { h, earlier }, router, uses);
    return { dtype: 'f32', shape: [h.shape[0]!, weights.length / h.shape[0]!], values: weights };
  }

  mixRanks(h: Tensor, atoms: Tensor, weights: Tensor): Tensor {
    const [rows, ranks] = h.shape as [number, number];
    const [mixes, mixed] = atoms.shape as [number, number];
    const maps = stored(atoms).values;
    const y: Value = { dtype: 'f32', shape: h.shape, values: values(h).slice() };
    for (let t = 0; t < rows; t++) {
      const [keep, ...shares] = values(weights).subarray(t * (1 + mixes), (t + 1) * (1 + mixes));
      for (let r = 0; r < mixed; r++) {
        let sum = keep! * values(h)[t * ranks + r]!;
        shares.forEach((share, j) => {
          for (let s = 0; s < mixed; s++) {
            sum += share * maps[(j * mixed + r) * mixed + s]! * values(h)[t * ranks + s]!;
          }
        });
        y.values[t * ranks + r] = sum;
      }
    }
    return y;
  }

  expand(pages: Tensor, parts: readonly ExpandPart[]): Tensor[] {
    return parts.map((part) => expandOne(pages as Value, part));
  }

  gatherRows(x: Tensor, rows: Tensor): Tensor {
    const width = x.shape[1]!;
    const at = (rows as Value).values;
    const y = f32([rows.shape[0]!, width]);
    for (let i = 0; i < at.length; i++) {
      y.values.set(values(x).subarray(at[i]! * width, (at[i]! + 1) * width), i * width);
    }
    return y;
  }
}

function expandOne(pages: Value, { y, h, b }: ExpandPart): Value {
  const [rows, width] = y.shape as [number, number];
  const ranks = h.shape[1]!;
  const out: Value = { dtype: 'f32', shape: y.shape, values: values(y).slice() };
  const weights = stored(b).values;
  for (let i = 0; i < rows * ranks; i++) {
    const page = pages.values[Math.floor(i / ranksPerPage)]!;
    if (page === 0) continue;
    const from = (page * ranksPerPage + (i % ranksPerPage)) * width;
    const row = Math.floor(i / ranks) * width;
    for (let n = 0; n < width; n++) out.values[row + n]! += values(h)[i]! * weights[from + n]!;
  }
  return out;
}
