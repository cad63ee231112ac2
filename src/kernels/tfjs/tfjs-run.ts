// One run of a program over TensorFlow.js: its values, and what depends on its inputs alone (rotation tables, which page of
// a row is where), made once a run from the arrays that were written, not from tensors. Sizes as in tfjs-ops.ts.

import { elementCount, mismatch } from '../check.ts';
import { type AttentionSegment, type RopeOptions, ranksPerPage, type Tensor } from '../kernels.ts';
import type { InputData } from '../symbolic-ops.ts';
import type { TensorFlow, TfTensor } from './tensorflow.ts';
import { TfjsTensor } from './tfjs-tensor.ts';

export interface Value extends Tensor {
  readonly tensor: TfTensor;
  /** The same numbers on this side; null for what was computed. */
  readonly data: Float32Array | Int32Array | null;
}

export interface RunInputs {
  readonly inputs: ReadonlyMap<string, InputData>;
  readonly segments: readonly AttentionSegment[];
  readonly segmentsMax: number;
}

export interface PagePlan {
  readonly rows: number;
  /** Pages of a row, P. */
  readonly count: number;
  /** The distinct pages, U of them, in the order of their first use. */
  readonly pages: readonly number[];
  /** Per row and place: row·U + the page's position in `pages`, [T·P, 1] i32. null: every row has all of them, in order. */
  readonly at: TfTensor | null;
}

export interface Rotation {
  readonly cos: TfTensor; // [T, 1, D], 1 for channels that pass through
  readonly sin: TfTensor; // [T, 1, D], negative for the first of a pair, 0 for channels that pass through
  readonly partner: TfTensor; // [D] i32
}

export function stored(tensor: Tensor): TfjsTensor {
  if (tensor instanceof TfjsTensor) return tensor;
  throw mismatch('tfjs', 'the tensor belongs to another backend');
}

export function tensorOf(tensor: Tensor): TfTensor {
  return tensor instanceof TfjsTensor ? tensor.whole() : (tensor as Value).tensor;
}

export function numbersOf(tensor: Tensor): Float32Array | Int32Array {
  const { data } = tensor as Value;
  if (data === null) throw mismatch('tfjs', 'indices and positions must be inputs');
  return data;
}

export class TfjsRun {
  readonly tf: TensorFlow;
  readonly #made: Map<object, Map<string, unknown>> = new Map();

  constructor(tf: TensorFlow) {
    this.tf = tf;
  }

  /** What `make` gave the first time in this run. */
  once<T>(of: object, key: string, make: () => T): T {
    const known = this.#made.get(of) ?? new Map<string, unknown>();
    this.#made.set(of, known);
    if (!known.has(key)) known.set(key, make());
    return known.get(key) as T;
  }

  value(tensor: TfTensor): Value {
    return { dtype: 'f32', shape: tensor.shape, tensor, data: null };
  }

  /** Its numbers on this side, fetched once a run where it was computed or stored. */
  onHost(tensor: Tensor): Float32Array | Int32Array {
    return (tensor as Value).data ?? this.once(tensor, 'host', () => tensorOf(tensor).dataSync());
  }

  scalar(value: number): TfTensor {
    return this.once(this, String(value), () => this.tf.scalar(value));
  }

  floats(values: Float32Array, shape: readonly number[]): TfTensor {
    return this.tf.tensor(values, shape, 'float32');
  }

  ints(values: Int32Array, shape: readonly number[]): TfTensor {
    return this.tf.tensor(values, shape, 'int32');
  }

  /** `1 / sqrt(mean(x²) + eps)` over the last axis, which stays with size 1. */
  inverseNorm(x: TfTensor, eps: number): TfTensor {
    const { tf } = this;
    const squares = tf.mean(tf.square(x), x.shape.length - 1, true);
    return tf.rsqrt(tf.add(squares, this.scalar(eps)));
  }

  rotation(positions: Tensor, headSize: number, options: RopeOptions): Rotation {
    const key = [headSize, options.size, options.base, options.style].join();
    return this.once(positions, key, () => this.#rotate(numbersOf(positions), headSize, options));
  }

  #rotate(at: ArrayLike<number>, headSize: number, { size, base, style }: RopeOptions): Rotation {
    const cos = new Float32Array(at.length * headSize).fill(1);
    const sin = new Float32Array(at.length * headSize);
    const partner = Int32Array.from({ length: headSize }, (_, channel) => channel);
    for (let i = 0; i < size / 2; i++) {
      const first = style === 'norm' ? 2 * i : i;
      const second = style === 'norm' ? 2 * i + 1 : i + size / 2;
      partner[first] = second;
      partner[second] = first;
      for (let t = 0; t < at.length; t++) {
        const angle = at[t]! * base ** ((-2 * i) / size);
        cos[t * headSize + first] = Math.cos(angle);
        cos[t * headSize + second] = Math.cos(angle);
        sin[t * headSize + first] = -Math.sin(angle);
        sin[t * headSize + second] = Math.sin(angle);
      }
    }
    const shape = [at.length, 1, headSize];
    return {
      cos: this.floats(cos, shape),
      sin: this.floats(sin, shape),
      partner: this.ints(partner, [headSize]),
    };
  }

  pagePlan(pages: Tensor): PagePlan {
    return this.once(pages, 'pages', () => {
      const [rows, count] = pages.shape as [number, number];
      const used = numbersOf(pages);
      const places = new Map<number, number>();
      for (const page of used) if (!places.has(page)) places.set(page, places.size);
      const distinct = places.size;
      const at = Int32Array.from(
        used,
        (page, i) => Math.floor(i / count) * distinct + places.get(page)!,
      );
      const isPlain = at.every((place, i) => place === i);
      const tensor = isPlain ? null : this.ints(at, [rows * count, 1]);
      return { rows, count, pages: [...places.keys()], at: tensor };
    });
  }

  /** The plan's pages of a pool, [8U, width]. Page 0 is a zero page like any other. */
  pagesOf(pool: Tensor, { pages }: PagePlan): TfTensor {
    const { tf } = this;
    if (pool instanceof TfjsTensor && pool.isPaged) {
      const parts = pages.map((page) => pool.part(page));
      return parts.length === 1 ? parts[0]! : tf.concat(parts, 0);
    }
    const own = tf.gather(tensorOf(pool), this.ints(Int32Array.from(pages), [pages.length]));
    return tf.reshape(own, [pages.length * ranksPerPage, pool.shape[2]!]);
  }

  /** What each row has at the pages of the plan, [T, 8U] → what it has at its own, [T, 8P]. */
  own(all: TfTensor, { rows, count, pages, at }: PagePlan): TfTensor {
    const { tf } = this;
    if (at === null) return all;
    const perPage = tf.reshape(all, [rows * pages.length, ranksPerPage]);
    const picked = tf.gather(perPage, tf.reshape(at, [rows * count])); // [T·P, 8]
    return tf.reshape(picked, [rows, count * ranksPerPage]);
  }

  /** The way back: [T, 8P] → [T, 8U], added up where a row has a page twice. */
  spread(own: TfTensor, { rows, count, pages, at }: PagePlan): TfTensor {
    const { tf } = this;
    if (at === null) return own;
    const perPage = tf.reshape(own, [rows * count, ranksPerPage]);
    const all = tf.scatterND(at, perPage, [rows * pages.length, ranksPerPage]);
    return tf.reshape(all, [rows, pages.length * ranksPerPage]);
  }

  /** [8U, width] → a pool with the plan's pages in their places and the others, page 0 among them, zero. */
  pool(all: TfTensor, { pages }: PagePlan, shape: readonly number[]): TfTensor {
    const { tf } = this;
    const width = elementCount(shape.slice(1));
    const own = tf.reshape(all, [pages.length, width]);
    const kept = Float32Array.from(pages, (page) => (page === 0 ? 0 : 1));
    const masked = tf.mul(own, this.floats(kept, [pages.length, 1]));
    const at = this.ints(Int32Array.from(pages), [pages.length, 1]);
    return tf.reshape(tf.scatterND(at, masked, [shape[0]!, width]), shape);
  }
}
