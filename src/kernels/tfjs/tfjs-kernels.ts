// Kernels over TensorFlow.js: the portable path, and CUDA through tfjs-node-gpu. Programs run their closure eagerly.
// TensorFlow.js is one engine a process; tensors made here are freed here, so several Kernels may share it.

import { checkPool, checkRange, checkShape, mismatch } from '../check.ts';
import {
  type AttentionSegment,
  type ByteMove,
  type DType,
  type Kernels,
  type Ops,
  type PagePool,
  type Program,
  type ProgramShape,
  ranksPerPage,
  type StoredTensor,
  type Tensor,
} from '../kernels.ts';
import { pageBytes, pageRange } from '../page-numbers.ts';
import { checkInput, type InputData, SymbolicOps } from '../symbolic-ops.ts';
import type { LoadedTensorFlow, TensorFlow, TfTensor } from './tensorflow.ts';
import { TfjsOps } from './tfjs-ops.ts';
import { stored, tensorOf } from './tfjs-run.ts';
import { TfjsTensor } from './tfjs-tensor.ts';

export class TfjsKernels implements Kernels {
  readonly name = 'tfjs';
  readonly description: string;
  readonly f32Activations = true;
  readonly #tf: TensorFlow;
  readonly #tensors: TfjsTensor[] = [];
  readonly #programs: Set<TfjsProgram> = new Set();

  constructor({ tf, description }: LoadedTensorFlow) {
    this.#tf = tf;
    this.description = `${description}, f32`;
  }

  store(dtype: DType, shape: readonly number[]): StoredTensor {
    checkShape('store', dtype, shape);
    const cut = { tail: shape.slice(1), partRows: shape[0]! };
    const tensor = new TfjsTensor(this.#tf, { dtype, shape: [...shape] }, cut);
    this.#tensors.push(tensor);
    return tensor;
  }

  storePages(pages: number, pools: readonly PagePool[]): StoredTensor[] {
    return pools.map(({ dtype, width }) => {
      const shape = [pages, ranksPerPage, width];
      checkShape('storePages', dtype, shape);
      checkPool('storePages', { dtype, shape }, width);
      const cut = { tail: [width], partRows: ranksPerPage };
      const pool = new TfjsTensor(this.#tf, { dtype, shape }, cut);
      this.#tensors.push(pool);
      return pool;
    });
  }

  writePage(pool: StoredTensor, page: number, halves: Uint16Array | null): void {
    const { at } = pageRange(pool, page, halves);
    this.write(pool, pageBytes(pool, page, halves), at);
  }

  write(tensor: StoredTensor, bytes: Uint8Array, byteOffset: number): void {
    checkRange('write', tensor.bytes, byteOffset, bytes.byteLength);
    stored(tensor).write(bytes, byteOffset);
  }

  read(tensor: StoredTensor, out: Uint8Array, byteOffset: number): void {
    checkRange('read', tensor.bytes, byteOffset, out.byteLength);
    stored(tensor).read(out, byteOffset);
  }

  copyWithin(tensor: StoredTensor, { from, to, bytes }: ByteMove): void {
    checkRange('copyWithin', tensor.bytes, from, bytes);
    checkRange('copyWithin', tensor.bytes, to, bytes);
    const moved = new Uint8Array(bytes);
    stored(tensor).read(moved, from);
    stored(tensor).write(moved, to);
  }

  compile(build: (ops: Ops) => Readonly<Record<string, Tensor>>, shape: ProgramShape): Program {
    const program = new TfjsProgram(this.#tf, build, shape, () => this.#programs.delete(program));
    this.#programs.add(program);
    return program;
  }

  [Symbol.dispose](): void {
    for (const program of [...this.#programs]) program[Symbol.dispose]();
    for (const tensor of this.#tensors.splice(0)) tensor.dispose();
  }
}

class TfjsProgram implements Program {
  readonly #tf: TensorFlow;
  readonly #build: (ops: Ops) => Readonly<Record<string, Tensor>>;
  readonly #segmentsMax: number;
  readonly #symbolic: SymbolicOps;
  readonly #onDispose: () => void;
  readonly #inputs: Map<string, InputData> = new Map();
  #outputs: Readonly<Record<string, TfTensor>> = {};
  /** What has been read of the outputs of the last run. */
  readonly #numbers: Map<string, Float32Array | Int32Array> = new Map();

  constructor(
    tf: TensorFlow,
    build: (ops: Ops) => Readonly<Record<string, Tensor>>,
    { segments }: ProgramShape,
    onDispose: () => void,
  ) {
    this.#tf = tf;
    this.#build = build;
    this.#segmentsMax = segments;
    this.#onDispose = onDispose;
    this.#symbolic = new SymbolicOps(segments);
    build(this.#symbolic);
  }

  write(name: string, data: InputData): void {
    checkInput(this.#symbolic.inputs, name, data);
    this.#inputs.set(name, data.slice());
  }

  run(segments: readonly AttentionSegment[]): void {
    this.#dropOutputs();
    const run = { inputs: this.#inputs, segments, segmentsMax: this.#segmentsMax };
    this.#outputs = this.#tf.tidy(() => {
      const outputs = Object.entries(this.#build(new TfjsOps(this.#tf, run)));
      // Clones share the numbers: an output may be a weight, or be named twice.
      return Object.fromEntries(
        outputs.map(([name, output]) => [name, this.#tf.clone(tensorOf(output))]),
      );
    });
  }

  read(name: string, start: number, out: Float32Array | Int32Array): void {
    const output = this.#outputs[name];
    if (output === undefined) throw mismatch('read', `the program has no output ${name}`);
    const numbers = this.#numbers.get(name) ?? output.dataSync();
    this.#numbers.set(name, numbers);
    checkRange('read', numbers.length, start, out.length);
    out.set(numbers.subarray(start, start + out.length));
  }

  #dropOutputs(): void {
    for (const output of Object.values(this.#outputs)) output.dispose();
    this.#outputs = {};
    this.#numbers.clear();
  }

  [Symbol.dispose](): void {
    this.#dropOutputs();
    this.#onDispose();
  }
}
