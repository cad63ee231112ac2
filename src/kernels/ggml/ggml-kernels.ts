// Kernels over ggml. Stored tensors have a buffer each; programs share one scratch buffer (see GgmlProgram).

import { GatewayError } from '../../errors.ts';
import { checkRange, checkShape } from '../check.ts';
import type {
  ByteMove,
  DType,
  Kernels,
  Ops,
  Program,
  ProgramShape,
  StoredTensor,
  Tensor,
} from '../kernels.ts';
import { GgmlProgram } from './ggml-program.ts';
import { type GgmlLibrary, ggmlType, loadLibrary } from './library.ts';
import { Arena, Device, GgmlTensor, ours, Scratch, TensorBuffer, toNe } from './memory.ts';

const storedTensorsMax = 4096; // a 30-block decoder with adapters stores about 800

export interface GgmlOptions {
  readonly threads: number;
  /** Folder of the shared objects; the installed npm package by default. */
  readonly libraryDirectory?: string;
}

export class GgmlKernels implements Kernels {
  readonly name = 'ggml';
  readonly description: string;
  readonly #library: GgmlLibrary;
  readonly #device: Device;
  readonly #arena: Arena;
  readonly #buffers: TensorBuffer[] = [];
  readonly #programs: Set<GgmlProgram> = new Set();
  readonly #scratch: Scratch;
  #disposed = false;

  constructor(options: GgmlOptions) {
    const { threads } = options;
    if (!Number.isSafeInteger(threads) || threads < 1 || threads > 512) {
      throw new GatewayError('INVALID_REQUEST', `threads: 1 to 512 wanted, got ${threads}`);
    }
    this.#library = loadLibrary(options.libraryDirectory);
    this.#device = new Device(this.#library, threads);
    this.#arena = new Arena(this.#library, storedTensorsMax, 0);
    this.#scratch = new Scratch(this.#library, this.#device);
    this.description = `ggml ${this.#library.version}, ${this.#device.description.trim()}, ${threads} threads`;
  }

  store(
    dtype: DType,
    shape: readonly number[],
    contents: 'zero' | 'undefined' = 'zero',
  ): StoredTensor {
    checkShape('store', dtype, shape);
    if (this.#buffers.length >= storedTensorsMax) {
      throw new GatewayError('ENGINE_FAILED', `ggml: more than ${storedTensorsMax} stored tensors`);
    }
    const pointer = this.#library.pointer(
      'ggml_new_tensor_4d',
      this.#arena.context,
      ggmlType[dtype],
      ...toNe(shape),
    );
    const buffer = new TensorBuffer(this.#library, this.#device, pointer);
    if (contents === 'zero') buffer.clear();
    this.#buffers.push(buffer);
    return new GgmlTensor(dtype, [...shape], pointer, Number(buffer.address));
  }

  write(tensor: StoredTensor, bytes: Uint8Array, byteOffset: number): void {
    checkRange('write', tensor.bytes, byteOffset, bytes.byteLength);
    const { pointer } = ours(tensor);
    this.#library.call('ggml_backend_tensor_set', pointer, bytes, byteOffset, bytes.byteLength);
  }

  read(tensor: StoredTensor, out: Uint8Array, byteOffset: number): void {
    checkRange('read', tensor.bytes, byteOffset, out.byteLength);
    const { pointer } = ours(tensor);
    this.#library.call('ggml_backend_tensor_get', pointer, out, byteOffset, out.byteLength);
  }

  setThreads(threads: number): void {
    this.#device.setThreads(threads);
  }

  copyWithin(tensor: StoredTensor, { from, to, bytes }: ByteMove): void {
    checkRange('copyWithin', tensor.bytes, from, bytes);
    checkRange('copyWithin', tensor.bytes, to, bytes);
    const { pointer, address } = ours(tensor);
    // The source is CPU memory, so setting from its own address is one memcpy.
    this.#library.call('ggml_backend_tensor_set', pointer, BigInt(address + from), to, bytes);
  }

  compile(build: (ops: Ops) => Readonly<Record<string, Tensor>>, shape: ProgramShape): Program {
    const program = new GgmlProgram(
      { library: this.#library, device: this.#device, scratch: this.#scratch },
      build,
      shape,
      () => this.#programs.delete(program),
    );
    this.#programs.add(program);
    return program;
  }

  [Symbol.dispose](): void {
    if (this.#disposed) return;
    this.#disposed = true;
    for (const program of [...this.#programs]) program[Symbol.dispose]();
    this.#scratch[Symbol.dispose]();
    for (const buffer of this.#buffers) buffer[Symbol.dispose]();
    this.#arena[Symbol.dispose]();
    this.#device[Symbol.dispose]();
  }
}
