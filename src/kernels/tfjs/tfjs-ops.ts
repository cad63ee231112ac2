// The ops over TensorFlow.js, computed as they are called, inside the program's `tidy`. Sizes: T rows, H heads and Hkv key
// heads of D channels, P pages of a row, U distinct pages of a step, K in, N out.

import { checkSegments, elementCount, mismatch } from '../check.ts';
import type {
  AtomRouter,
  AtomUses,
  AttentionSegment,
  ExpandPart,
  Ops,
  RankRouter,
  RopeOptions,
  ShrinkPart,
  Tensor,
} from '../kernels.ts';
import { routeAtoms, routeRanks } from '../rank-routing.ts';
import type { TensorFlow, TfTensor } from './tensorflow.ts';
import { numbersOf, type RunInputs, stored, TfjsRun, tensorOf, type Value } from './tfjs-run.ts';
import { TfjsTensor } from './tfjs-tensor.ts';
import { TfjsTraining } from './tfjs-training.ts';

/** Cells of one part of a cache: a decode step copies as many per sequence, attention joins as many at a time. Guess. */
const cellsPerPart = 64;

interface CellPlan {
  readonly parts: readonly number[];
  readonly sizes: readonly number[];
  /** Which row of [the parts' rows; x] each row of the parts becomes. */
  readonly from: TfTensor;
}

export class TfjsOps implements Ops {
  readonly training: TfjsTraining;
  readonly #tf: TensorFlow;
  readonly #run: TfjsRun;
  readonly #inputs: RunInputs;

  constructor(tf: TensorFlow, inputs: RunInputs) {
    this.#tf = tf;
    this.#inputs = inputs;
    this.#run = new TfjsRun(tf);
    this.training = new TfjsTraining(this.#run);
  }

  input(name: string, dtype: 'f32' | 'i32' | 'i64', shape: readonly number[]): Tensor {
    const written = this.#inputs.inputs.get(name);
    if (written === undefined) throw mismatch('run', `inputs never written: ${name}`);
    // Axes are below 2^31, so what an i64 counts fits.
    const data = written instanceof BigInt64Array ? Int32Array.from(written, Number) : written;
    const tensor = this.#tf.tensor(data, shape, dtype === 'f32' ? 'float32' : 'int32');
    const value: Value = { dtype, shape, tensor, data };
    return value;
  }

  embed(table: Tensor, ids: Tensor): Tensor {
    return this.gatherRows(table, ids);
  }

  gatherRows(x: Tensor, rows: Tensor): Tensor {
    return this.#run.value(this.#tf.gather(tensorOf(x), tensorOf(rows)));
  }

  rmsNorm(x: Tensor, weight: Tensor, eps: number): Tensor {
    const tf = this.#tf;
    const from = tensorOf(x);
    const normed = tf.mul(from, this.#run.inverseNorm(from, eps));
    return this.#run.value(tf.mul(normed, tensorOf(weight)));
  }

  linear(x: Tensor, w: Tensor): Tensor {
    const product =
      w instanceof TfjsTensor
        ? this.#tf.matMul(tensorOf(x), w.columns())
        : this.#tf.matMul(tensorOf(x), tensorOf(w), false, true);
    return this.#run.value(product);
  }

  add(a: Tensor, b: Tensor): Tensor {
    return this.#run.value(this.#tf.add(tensorOf(a), tensorOf(b)));
  }

  mul(a: Tensor, b: Tensor): Tensor {
    return this.#run.value(this.#tf.mul(tensorOf(a), tensorOf(b)));
  }

  swiglu(gate: Tensor, up: Tensor): Tensor {
    const tf = this.#tf;
    const g = tensorOf(gate);
    return this.#run.value(tf.mul(tf.mul(g, tf.sigmoid(g)), tensorOf(up)));
  }

  reshape(x: Tensor, shape: readonly number[]): Tensor {
    const tensor = this.#tf.reshape(tensorOf(x), shape);
    const value: Value = { dtype: x.dtype, shape, tensor, data: (x as Value).data ?? null };
    return value;
  }

  slice(x: Tensor, index: number): Tensor {
    const tf = this.#tf;
    const [, ...shape] = x.shape;
    const own = tf.slice(tensorOf(x), [index, ...shape.map(() => 0)], [1, ...shape]);
    const size = elementCount(shape);
    const data = (x as Value).data?.subarray(index * size, (index + 1) * size) ?? null;
    const value: Value = { dtype: x.dtype, shape, tensor: tf.reshape(own, shape), data };
    return value;
  }

  rope(x: Tensor, positions: Tensor, options: RopeOptions): Tensor {
    const tf = this.#tf;
    const { cos, sin, partner } = this.#run.rotation(positions, x.shape[2]!, options);
    const from = tensorOf(x);
    return this.#run.value(tf.add(tf.mul(from, cos), tf.mul(tf.gather(from, partner, 2), sin)));
  }

  writeCells(cache: Tensor, x: Tensor, cells: Tensor): void {
    const tf = this.#tf;
    const target = stored(cache);
    target.cut(cellsPerPart);
    const { parts, sizes, from } = this.#run.once(cells, `write ${cache.shape[0]}`, () =>
      this.#cellPlan(target, numbersOf(cells)),
    );
    const all = tf.concat([...parts.map((part) => target.part(part)), tensorOf(x)], 0);
    const pieces = tf.split(tf.gather(all, from), sizes);
    pieces.forEach((piece, i) => {
      target.replacePart(parts[i]!, piece);
    });
  }

  #cellPlan(cache: TfjsTensor, cells: ArrayLike<number>): CellPlan {
    const partOf = (cell: number): number => Math.floor(cell / cellsPerPart);
    const parts = [...new Set(Array.from(cells, partOf))];
    const sizes = parts.map((part) => cache.rowsOfPart(part));
    const starts = new Map<number, number>();
    let total = 0;
    parts.forEach((part, i) => {
      starts.set(part, total);
      total += sizes[i]!;
    });
    const from = Int32Array.from({ length: total }, (_, row) => row);
    for (let t = 0; t < cells.length; t++) {
      from[starts.get(partOf(cells[t]!))! + (cells[t]! % cellsPerPart)] = total + t;
    }
    return { parts, sizes, from: this.#run.ints(from, [total]) };
  }

  attend(q: Tensor, k: Tensor, v: Tensor): Tensor {
    const tf = this.#tf;
    const { segments, segmentsMax } = this.#inputs;
    const [rows, heads, size] = q.shape as [number, number, number];
    checkSegments(segments, { rows, cells: k.shape[0]!, segmentsMax });
    const from = tf.mul(tensorOf(q), this.#run.scalar(1 / Math.sqrt(size)));
    const pieces: TfTensor[] = [];
    let end = 0;
    const pad = (to: number): void => {
      if (to > end) pieces.push(tf.zeros([to - end, heads * size]));
    };
    for (const segment of segments) {
      const { rowStart, rowCount } = segment;
      pad(rowStart);
      end = rowStart + rowCount;
      const own = tf.slice(from, [rowStart, 0, 0], [rowCount, heads, size]);
      pieces.push(this.#attendSegment(own, segment, [stored(k), stored(v)]));
    }
    pad(rows);
    return this.#run.value(pieces.length === 1 ? pieces[0]! : tf.concat(pieces, 0));
  }

  /** Query heads that share a key head are rows of one product: [Hkv, H/Hkv·rows, D] · [Hkv, D, cells]. */
  #attendSegment(
    q: TfTensor,
    segment: AttentionSegment,
    [k, v]: readonly [TfjsTensor, TfjsTensor],
  ): TfTensor {
    const tf = this.#tf;
    const { cellBase, cells, rowCount } = segment;
    const [, heads, size] = q.shape as [number, number, number];
    const kvHeads = k.shape[1]! / size;
    const cached = (cache: TfjsTensor, axes: readonly number[]): TfTensor =>
      tf.transpose(tf.reshape(cache.rows(cellBase, cells), [cells, kvHeads, size]), axes);
    const grouped = [kvHeads, (heads / kvHeads) * rowCount, size];
    const queries = tf.reshape(tf.transpose(q, [1, 0, 2]), grouped);
    let scores = tf.matMul(queries, cached(k, [1, 2, 0]));
    if (rowCount > 1) {
      const mask = this.#run.once(segment, 'mask', () => this.#mask(segment));
      const perHead = tf.reshape(scores, [heads, rowCount, cells]);
      scores = tf.reshape(tf.add(perHead, mask), scores.shape);
    }
    const mixed = tf.matMul(tf.softmax(scores), cached(v, [1, 0, 2])); // [Hkv, H/Hkv·rows, D]
    const perRow = tf.transpose(tf.reshape(mixed, [heads, rowCount, size]), [1, 0, 2]);
    return tf.reshape(perRow, [rowCount, heads * size]);
  }

  #mask({ rowCount, cells }: AttentionSegment): TfTensor {
    const mask = new Float32Array(rowCount * cells);
    for (let row = 0; row < rowCount; row++) {
      const seen = cells - rowCount + row + 1;
      mask.fill(Number.NEGATIVE_INFINITY, row * cells + seen, (row + 1) * cells);
    }
    return this.#run.floats(mask, [rowCount, cells]);
  }

  /** Every row through every page of the step, one product; then each row takes the ranks of its own pages. */
  shrink(x: Tensor, pages: Tensor, parts: readonly ShrinkPart[], uses: Tensor): Tensor[] {
    const tf = this.#tf;
    const run = this.#run;
    const plan = run.pagePlan(pages);
    return parts.map(({ a, gate }) => {
      const scale = tf.gather(tensorOf(gate), tensorOf(uses)); // [T, 8P]
      const all = tf.matMul(tensorOf(x), run.pagesOf(a, plan), false, true); // [T, 8U]
      return run.value(tf.mul(run.own(all, plan), scale));
    });
  }

  routeRanks(x: Tensor, hs: readonly Tensor[], router: RankRouter): Tensor[] {
    const routed = routeRanks((tensor) => this.#run.onHost(tensor), x, hs, router);
    return routed.map((values, i) => this.#run.value(this.#run.floats(values, hs[i]!.shape)));
  }

  routeAtoms(h: Tensor, earlier: readonly Tensor[], router: AtomRouter, uses: AtomUses): Tensor {
    const read = (tensor: Tensor): Float32Array | Int32Array => this.#run.onHost(tensor);
    const weights = routeAtoms(read, { h, earlier }, router, uses);
    const shape = [h.shape[0]!, weights.length / h.shape[0]!];
    return this.#run.value(this.#run.floats(weights, shape));
  }

  mixRanks(h: Tensor, atoms: Tensor, weights: Tensor): Tensor {
    const tf = this.#tf;
    const [rows, ranks] = h.shape as [number, number];
    const [mixes, mixed] = atoms.shape as [number, number];
    const maps = tf.reshape(tensorOf(atoms), [mixes * mixed, mixed]);
    const own = tf.slice(tensorOf(h), [0, 0], [rows, mixed]);
    const all = tf.reshape(tf.matMul(own, maps, false, true), [rows, mixes, mixed]);
    const kept = tf.mul(own, tf.slice(tensorOf(weights), [0, 0], [rows, 1]));
    const shares = tf.slice(tensorOf(weights), [0, 1], [rows, mixes]);
    const sum = tf.add(kept, tf.sum(tf.mul(all, tf.reshape(shares, [rows, mixes, 1])), 1));
    if (mixed === ranks) return this.#run.value(sum);
    const rest = tf.slice(tensorOf(h), [0, mixed], [rows, ranks - mixed]);
    return this.#run.value(tf.concat([sum, rest], 1));
  }

  expand(pages: Tensor, parts: readonly ExpandPart[]): Tensor[] {
    const tf = this.#tf;
    const plan = this.#run.pagePlan(pages);
    return parts.map(({ y, h, b }) => {
      const spread = this.#run.spread(tensorOf(h), plan); // [T, 8U]
      return this.#run.value(tf.add(tensorOf(y), tf.matMul(spread, this.#run.pagesOf(b, plan))));
    });
  }
}
