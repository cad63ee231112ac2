// The obvious f32 implementation of every op, one loop nest each: the oracle of the conformance suite, and what a new
// backend is written against. Programs replay their closure eagerly. Weights of any type are dequantised when written.

import { checkPool, checkRange, checkShape, mismatch } from './check.ts';
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
} from './kernels.ts';
import { pageBytes, pageRange } from './page-numbers.ts';
import { EagerOps, ReferenceTensor, stored, type Value } from './reference-ops.ts';
import { checkInput, type InputData, SymbolicOps } from './symbolic-ops.ts';

export class ReferenceKernels implements Kernels {
  readonly name = 'reference';
  readonly description = 'reference loops in TypeScript, f32';
  readonly f32Activations = true;

  store(dtype: DType, shape: readonly number[]): StoredTensor {
    checkShape('store', dtype, shape);
    return new ReferenceTensor(dtype, [...shape]);
  }

  storePages(pages: number, pools: readonly PagePool[]): StoredTensor[] {
    return pools.map(({ dtype, width }) => {
      const pool = this.store(dtype, [pages, ranksPerPage, width]);
      checkPool('storePages', pool, width);
      return pool;
    });
  }

  writePage(pool: StoredTensor, page: number, halves: Uint16Array | null): void {
    const { at } = pageRange(pool, page, halves);
    this.write(pool, pageBytes(pool, page, halves), at);
  }

  write(tensor: StoredTensor, bytes: Uint8Array, byteOffset: number): void {
    checkRange('write', tensor.bytes, byteOffset, bytes.byteLength);
    stored(tensor).raw.set(bytes, byteOffset);
  }

  read(tensor: StoredTensor, out: Uint8Array, byteOffset: number): void {
    checkRange('read', tensor.bytes, byteOffset, out.byteLength);
    out.set(stored(tensor).raw.subarray(byteOffset, byteOffset + out.byteLength));
  }

  copyWithin(tensor: StoredTensor, { from, to, bytes }: ByteMove): void {
    checkRange('copyWithin', tensor.bytes, from, bytes);
    checkRange('copyWithin', tensor.bytes, to, bytes);
    stored(tensor).raw.copyWithin(to, from, from + bytes);
  }

  compile(build: (ops: Ops) => Readonly<Record<string, Tensor>>, shape: ProgramShape): Program {
    return new ReferenceProgram(build, shape);
  }

  [Symbol.dispose](): void {
    // Nothing native is held.
  }
}

class ReferenceProgram implements Program {
  readonly #build: (ops: Ops) => Readonly<Record<string, Tensor>>;
  readonly #symbolic: SymbolicOps;
  readonly #segmentsMax: number;
  readonly #inputs: Map<string, InputData> = new Map();
  #outputs: Readonly<Record<string, Tensor>> = {};

  constructor(build: (ops: Ops) => Readonly<Record<string, Tensor>>, { segments }: ProgramShape) {
    this.#build = build;
    this.#segmentsMax = segments;
    this.#symbolic = new SymbolicOps(segments);
    build(this.#symbolic);
  }

  write(name: string, data: InputData): void {
    checkInput(this.#symbolic.inputs, name, data);
    this.#inputs.set(name, data.slice());
  }

  run(segments: readonly AttentionSegment[]): void {
    this.#outputs = this.#build(new EagerOps(this.#inputs, segments, this.#segmentsMax));
  }

  read(name: string, start: number, out: Float32Array | Int32Array): void {
    const output = this.#outputs[name] as Value | undefined;
    if (output === undefined) throw mismatch('read', `the program has no output ${name}`);
    checkRange('read', output.values.length, start, out.length);
    for (let i = 0; i < out.length; i++) out[i] = output.values[start + i]!;
  }

  [Symbol.dispose](): void {
    this.#outputs = {};
  }
}
