// A stored tensor as TensorFlow.js tensors, which are f32 and never change. It is cut along its first axis into parts, so
// that a write replaces the parts it touches and not a whole cache. 16-bit floats live as f32 and are rounded when they are
// read back; quantised types and integers keep the bytes that were written beside the numbers decoded from them. What the
// reading methods return is borrowed, or new and freed by the caller's `tidy`.

import { byteLength, elementCount, mismatch } from '../check.ts';
import { dequantizeRows } from '../dequantize.ts';
import { f32ToBf16Bits, f32ToF16Bits } from '../half.ts';
import { type DType, dtypeLayout, type StoredTensor, type Tensor } from '../kernels.ts';
import type { TensorFlow, TfTensor } from './tensorflow.ts';

interface Part {
  /** null: not asked for yet, or dropped. Made from the bytes or the columns; without either it is zero. */
  numbers: TfTensor | null;
  bytes: Uint8Array | null;
}

export class TfjsTensor implements StoredTensor {
  readonly dtype: DType;
  readonly shape: readonly number[];
  readonly bytes: number;
  readonly #tf: TensorFlow;
  readonly #rows: number;
  readonly #tail: readonly number[];
  readonly #keepsBytes: boolean;
  #partRows: number;
  #parts: Part[];
  #columns: TfTensor | null = null;

  /** The numbers are rows of shape `tail`, cut every `partRows`. */
  constructor(
    tf: TensorFlow,
    { dtype, shape }: Tensor,
    { tail, partRows }: { readonly tail: readonly number[]; readonly partRows: number },
  ) {
    this.#tf = tf;
    this.dtype = dtype;
    this.shape = shape;
    this.bytes = byteLength(dtype, shape);
    this.#tail = tail;
    this.#rows = elementCount(shape) / elementCount(tail);
    this.#keepsBytes = dtypeLayout[dtype].block > 1 || dtype === 'i32' || dtype === 'i64';
    this.#partRows = partRows;
    this.#parts = this.#emptyParts();
  }

  #emptyParts(): Part[] {
    const count = Math.ceil(this.#rows / this.#partRows);
    return Array.from({ length: count }, () => ({ numbers: null, bytes: null }));
  }

  /** Are its parts pages [8, width] of a pool? */
  get isPaged(): boolean {
    return this.#tail.length < this.shape.length - 1;
  }

  rowsOfPart(index: number): number {
    return Math.min(this.#partRows, this.#rows - index * this.#partRows);
  }

  get #partBytes(): number {
    return (this.bytes / this.#rows) * this.#partRows;
  }

  /** Cuts smaller from now on; what was written stays. For caches, whose rows change at every step. */
  cut(partRows: number): void {
    if (this.#partRows <= partRows) return;
    const isEmpty =
      this.#columns === null &&
      this.#parts.every(({ numbers, bytes }) => numbers === null && bytes === null);
    const kept = isEmpty ? null : new Uint8Array(this.bytes);
    if (kept !== null) this.read(kept, 0);
    this.dispose();
    this.#partRows = partRows;
    this.#parts = this.#emptyParts();
    if (kept !== null) this.write(kept, 0);
  }

  /** [rows of the part, ...tail]; borrowed until the part is written. */
  part(index: number): TfTensor {
    const part = this.#parts[index]!;
    part.numbers ??= this.#tf.keep(this.#make(index));
    return part.numbers;
  }

  #make(index: number): TfTensor {
    const { bytes } = this.#parts[index]!;
    if (this.#columns !== null && this.#parts.length === 1) {
      return this.#tf.transpose(this.#columns);
    }
    const shape = [this.rowsOfPart(index), ...this.#tail];
    return bytes === null ? this.#tf.zeros(shape) : this.#decode(bytes, shape);
  }

  #decode(bytes: Uint8Array, shape: readonly number[]): TfTensor {
    if (this.dtype === 'i32' || this.dtype === 'i64') {
      throw mismatch('store', 'integers are not weights');
    }
    const values = new Float32Array(elementCount(shape));
    dequantizeRows(this.dtype, bytes, values);
    return this.#tf.tensor(values, shape, 'float32');
  }

  /** Takes over `numbers`, of the shape of the part. */
  replacePart(index: number, numbers: TfTensor): void {
    const part = this.#parts[index]!;
    part.numbers?.dispose();
    part.numbers = this.#tf.keep(numbers);
    this.#dropColumns();
  }

  /** [count, ...tail]: a new tensor, or a part itself. */
  rows(from: number, count: number): TfTensor {
    const first = Math.floor(from / this.#partRows);
    const last = Math.floor((from + count - 1) / this.#partRows);
    const parts = Array.from({ length: last - first + 1 }, (_, i) => this.part(first + i));
    const joined = parts.length === 1 ? parts[0]! : this.#tf.concat(parts, 0);
    if (joined.shape[0] === count) return joined;
    const begin = [from - first * this.#partRows, ...this.#tail.map(() => 0)];
    return this.#tf.slice(joined, begin, [count, ...this.#tail]);
  }

  /** All of it, in its own shape. */
  whole(): TfTensor {
    const all = this.rows(0, this.#rows);
    const isShaped = all.shape.length === this.shape.length;
    return isShaped ? all : this.#tf.reshape(all, this.shape);
  }

  /** [K, N] of a weight [N, K]: what the backends' products are fast on (wasm 13 times, libtensorflow twice for one row).
   *  The rows are dropped when this is made, and come back for who asks for them, so a tied embedding has both. */
  columns(): TfTensor {
    if (this.#columns === null) {
      const columns = this.#tf.keep(this.#tf.transpose(this.whole()));
      if (this.#parts.length === 1) this.#dropNumbers();
      this.#columns = columns;
    }
    return this.#columns;
  }

  write(bytes: Uint8Array, byteOffset: number): void {
    const size = this.#partBytes;
    for (let done = 0; done < bytes.byteLength; ) {
      const index = Math.floor((byteOffset + done) / size);
      const at = byteOffset + done - index * size;
      const partEnd = Math.min(size, this.bytes - index * size);
      const piece = bytes.subarray(done, done + partEnd - at);
      const whole = piece.byteLength === partEnd ? piece : this.#bytesOf(index);
      if (whole !== piece) whole.set(piece, at);
      this.#setBytes(index, whole);
      done += piece.byteLength;
    }
  }

  #setBytes(index: number, bytes: Uint8Array): void {
    if (!this.#keepsBytes) {
      this.replacePart(index, this.#decode(bytes, [this.rowsOfPart(index), ...this.#tail]));
      return;
    }
    const part = this.#parts[index]!;
    part.numbers?.dispose();
    part.numbers = null;
    part.bytes = bytes.slice();
    this.#dropColumns();
  }

  read(out: Uint8Array, byteOffset: number): void {
    const size = this.#partBytes;
    for (let done = 0; done < out.byteLength; ) {
      const index = Math.floor((byteOffset + done) / size);
      const at = byteOffset + done - index * size;
      const piece = this.#bytesOf(index).subarray(at, at + out.byteLength - done);
      out.set(piece, done);
      done += piece.byteLength;
    }
  }

  /** A copy. */
  #bytesOf(index: number): Uint8Array {
    const { numbers, bytes } = this.#parts[index]!;
    if (bytes !== null) return bytes.slice();
    if (this.#keepsBytes || (numbers === null && this.#columns === null)) {
      const size = this.#partBytes;
      return new Uint8Array(Math.min(size, this.bytes - index * size));
    }
    const values = Float32Array.from(this.part(index).dataSync());
    if (this.dtype === 'f32') return new Uint8Array(values.buffer);
    const bits = new Uint16Array(values.length);
    if (this.dtype === 'f16') f32ToF16Bits(values, bits);
    else f32ToBf16Bits(values, bits);
    return new Uint8Array(bits.buffer);
  }

  #dropColumns(): void {
    this.#columns?.dispose();
    this.#columns = null;
  }

  #dropNumbers(): void {
    for (const part of this.#parts) {
      part.numbers?.dispose();
      part.numbers = null;
    }
  }

  dispose(): void {
    this.#dropColumns();
    this.#dropNumbers();
  }
}
