// Native memory and who frees it: the device (backend + thread pool), arenas of tensor structs, and buffers of tensor
// data. Everything is freed by its own dispose, in the order program → buffers → device; nothing is freed by GC.

import koffi from 'koffi';
import { GatewayError } from '../../errors.ts';
import { byteLength } from '../check.ts';
import type { DType, LinearWay, StoredTensor, Tensor } from '../kernels.ts';
import type { GgmlLibrary, Pointer } from './library.ts';

const deviceTypeCpu = 0; // enum ggml_backend_dev_type
const usageWeights = 1; // enum ggml_backend_buffer_usage
export const hugePageBytes: number = 2 ** 21;
const adviceHuge = 14; // MADV_HUGEPAGE

/** A CPU device with its own persistent thread pool: ggml otherwise makes and joins threads at every graph. */
export class Device implements Disposable {
  readonly backend: Pointer;
  readonly bufferType: Pointer;
  readonly description: string;
  readonly #library: GgmlLibrary;
  readonly #pool: Pointer;
  readonly #registry: Pointer;

  constructor(library: GgmlLibrary, threads: number) {
    this.#library = library;
    this.backend = library.pointer('ggml_backend_init_by_type', deviceTypeCpu, null);
    this.bufferType = library.pointer('ggml_backend_get_default_buffer_type', this.backend);
    const device = library.pointer('ggml_backend_get_device', this.backend);
    this.description = library.text('ggml_backend_dev_description', device);
    this.#registry = library.pointer('ggml_backend_dev_backend_reg', device);
    const parameters = poolParameters(library, threads);
    this.#pool = this.#invoke('ggml_threadpool_new', 'void *', ['void *'], [parameters]) as Pointer;
    if (!this.#pool)
      throw new GatewayError('ENGINE_FAILED', `ggml: no thread pool of ${threads} threads`);
    this.#invoke(
      'ggml_backend_cpu_set_threadpool',
      'void',
      ['void *', 'void *'],
      [this.backend, this.#pool],
    );
    this.setThreads(threads);
  }

  /** At most as many as the pool has. */
  setThreads(threads: number): void {
    this.#invoke('ggml_backend_set_n_threads', 'void', ['void *', 'int'], [this.backend, threads]);
  }

  /** CPU-only functions live in the variant that the loader picked: ggml hands them out by name. */
  #invoke(name: string, result: string, parameters: string[], values: unknown[]): unknown {
    const address = this.#library.pointer(
      'ggml_backend_reg_get_proc_address',
      this.#registry,
      name,
    );
    return koffi.call(address, koffi.proto(result, parameters), ...values);
  }

  [Symbol.dispose](): void {
    this.#library.call('ggml_backend_free', this.backend);
    this.#invoke('ggml_threadpool_free', 'void', ['void *'], [this.#pool]);
  }
}

/** struct ggml_threadpool_params { bool cpumask[512]; int n_threads; int prio; uint32_t poll; … }. ggml lets every thread of
 *  the pool, also one that has no part in the graph, spin for `poll` × 131,072 pauses before it sleeps: by default (50) some
 *  170 ms of CPU time after each step, and half a core for a thread that is left out. Waking costs less than 0.1 ms a step. */
function poolParameters(library: GgmlLibrary, threads: number): Buffer {
  const [threadsAt, pollAt, pollDefault] = [512, 520, 50];
  const parameters = Buffer.alloc(1024);
  library.call('ggml_threadpool_params_init', parameters, threads);
  const isAsKnown =
    parameters.readInt32LE(threadsAt) === threads &&
    parameters.readUInt32LE(pollAt) === pollDefault;
  if (!isAsKnown) throw new GatewayError('UNSUPPORTED', 'ggml: its thread pool has changed');
  parameters.writeUInt32LE(0, pollAt);
  return parameters;
}

/** A context whose tensor structs lie in memory that TypeScript can patch: the replay of a program moves the views of
 *  its attention by writing their fields. Owns the memory; every tensor made in it dies with it. */
export class Arena implements Disposable {
  readonly context: Pointer;
  readonly #library: GgmlLibrary;
  readonly #memory: Pointer;
  readonly #words: Uint32Array;
  #kept: Uint32Array = new Uint32Array(0);

  constructor(library: GgmlLibrary, tensors: number, graphNodes: number) {
    this.#library = library;
    const overhead = library.number('ggml_tensor_overhead');
    const graph =
      graphNodes > 0 ? library.number('ggml_graph_overhead_custom', graphNodes, false) : 0;
    const bytes = tensors * overhead + graph + 4096;
    this.#memory = koffi.alloc('uint8_t', bytes) as Pointer;
    this.#words = new Uint32Array(koffi.view(this.#memory, bytes - (bytes % 4)));
    this.context = library.pointer('ggml_init', {
      mem_size: bytes,
      mem_buffer: this.#memory,
      no_alloc: true,
    });
  }

  /** Index of a tensor's first 32-bit word, for `patch`. */
  locate(tensor: Pointer): number {
    return Number(tensor - this.#memory) >>> 2;
  }

  /** Writes a 64-bit field of a struct as two words: addresses and sizes stay below 2^53. */
  patch(word: number, offset: number, value: number): void {
    const index = word + (offset >>> 2);
    this.#words[index] = value >>> 0;
    this.#words[index + 1] = Math.floor(value / 0x1_0000_0000);
  }

  peek(word: number, offset: number): number {
    const index = word + (offset >>> 2);
    return this.#words[index]! + this.#words[index + 1]! * 0x1_0000_0000;
  }

  /** Remembers every struct and the graph as they are now, and puts them back. */
  keep(): void {
    this.#kept = this.#words.slice();
  }

  restore(): void {
    this.#words.set(this.#kept);
  }

  [Symbol.dispose](): void {
    this.#library.call('ggml_free', this.context);
    koffi.free(this.#memory);
  }
}

/** What tensor data can lie in: the CPU's memory or a device's. */
export interface MemoryPlace {
  readonly bufferType: Pointer;
}

/** Asks for pages of 2 MB: what is read once a step is read at the pace of the address look-ups of small ones. A system that
 *  has none goes on with those. */
function adviseHuge(address: Pointer, bytes: number): void {
  if (process.platform !== 'linux') return;
  koffi.load(null).func('madvise', 'int', ['void *', 'size_t', 'int'])(address, bytes, adviceHuge);
}

/** Memory for tensors, undefined at first and free until it is written. */
export class TensorBuffer implements Disposable {
  readonly address: Pointer;
  /** In the CPU's memory: `address` may be read and written. */
  readonly isHost: boolean;
  readonly #library: GgmlLibrary;
  readonly #buffer: Pointer;

  /** `huge` is for the CPU's memory: a write then takes up to 2 MB more than it needs. */
  constructor(library: GgmlLibrary, { bufferType }: MemoryPlace, bytes: number, huge = false) {
    this.#library = library;
    const slack = huge ? 2 * hugePageBytes : 0; // to begin and to end with a whole page
    this.#buffer = library.pointer('ggml_backend_buft_alloc_buffer', bufferType, bytes + slack);
    library.call('ggml_backend_buffer_set_usage', this.#buffer, usageWeights);
    const base = library.pointer('ggml_backend_buffer_get_base', this.#buffer);
    const align = BigInt(huge ? hugePageBytes : 1);
    this.address = ((base + align - 1n) / align) * align;
    this.isHost = library.number('ggml_backend_buffer_is_host', this.#buffer) === 1;
    if (huge) adviseHuge(this.address, bytes + hugePageBytes);
  }

  static bytesFor(library: GgmlLibrary, { bufferType }: MemoryPlace, tensor: Pointer): number {
    return library.number('ggml_backend_buft_get_alloc_size', bufferType, tensor);
  }

  /** A buffer for one tensor, which lies in it. */
  static of(library: GgmlLibrary, place: MemoryPlace, tensor: Pointer): TensorBuffer {
    const bytes = TensorBuffer.bytesFor(library, place, tensor);
    const buffer = new TensorBuffer(library, place, bytes);
    buffer.adopt(tensor);
    return buffer;
  }

  clear(): void {
    this.#library.call('ggml_backend_buffer_clear', this.#buffer, 0);
  }

  /** Makes a tensor lie in this buffer, which stays the owner. */
  adopt(tensor: Pointer, byteOffset = 0): void {
    const at = this.address + BigInt(byteOffset);
    if (this.#library.number('ggml_backend_tensor_alloc', this.#buffer, tensor, at) !== 0) {
      throw new GatewayError('ENGINE_FAILED', 'ggml: a tensor could not be placed in its buffer');
    }
  }

  [Symbol.dispose](): void {
    this.#library.call('ggml_backend_buffer_free', this.#buffer);
  }
}

export class GgmlTensor implements StoredTensor {
  readonly dtype: DType;
  readonly shape: readonly number[];
  readonly bytes: number;
  readonly pointer: Pointer;
  readonly buffer: TensorBuffer;
  /** Address of the data. */
  readonly address: number;
  /** A pool whose pages [8, width] lie here as [width, 8]: rows for ggml's products. */
  readonly transposedPages: boolean;
  /** Of a pool: bytes from one page to the next, with the other pools' pages in between. */
  readonly pageStride: number | undefined;
  /** How linears multiply it, where it was stored for one way. */
  readonly way: LinearWay | undefined;

  constructor(
    shape: Tensor,
    place: { readonly pointer: Pointer; readonly buffer: TensorBuffer; readonly at?: number },
    how: { transposedPages?: boolean; pageStride?: number; way?: LinearWay | undefined },
  ) {
    this.dtype = shape.dtype;
    this.shape = shape.shape;
    this.bytes = byteLength(shape.dtype, shape.shape);
    this.pointer = place.pointer;
    this.buffer = place.buffer;
    this.address = Number(place.buffer.address) + (place.at ?? 0);
    this.transposedPages = how.transposedPages ?? false;
    this.pageStride = how.pageStride;
    this.way = how.way;
  }
}

/** The sizes in ggml's order: innermost first, four of them. */
export function toNe(shape: readonly number[]): [number, number, number, number] {
  const inner = [...shape].reverse();
  return [inner[0] ?? 1, inner[1] ?? 1, inner[2] ?? 1, inner[3] ?? 1];
}

/** It lies in tiles (native/tiles.c), which only our own kernels read. */
export function isTiled(tensor: Tensor): boolean {
  return tensor instanceof GgmlTensor && (tensor.way === 'int16' || tensor.way === 'int8');
}

export function ours(tensor: Tensor): GgmlTensor {
  if (tensor instanceof GgmlTensor) return tensor;
  throw new GatewayError('SHAPE_MISMATCH', 'ggml: the tensor belongs to another backend');
}

/** One buffer for the intermediate values of every program, as large as the largest needs: only one runs at a time.
 *  Growing it moves it, so `version` tells programs recorded before to record themselves again. */
export class Scratch implements Disposable {
  version = 0;
  readonly #library: GgmlLibrary;
  readonly #allocator: Pointer;
  #bytes = 0;

  get bytes(): number {
    return this.#bytes;
  }

  constructor(library: GgmlLibrary, device: Device) {
    this.#library = library;
    this.#allocator = library.pointer('ggml_gallocr_new', device.bufferType);
  }

  compute({ backend }: Device, graph: Pointer): void {
    const status = this.#library.number('ggml_backend_graph_compute', backend, graph);
    if (status !== 0) throw new GatewayError('ENGINE_FAILED', `ggml: graph compute gave ${status}`);
  }

  place(graph: Pointer): void {
    if (this.#library.number('ggml_gallocr_alloc_graph', this.#allocator, graph) !== 1) {
      throw new GatewayError('ENGINE_FAILED', 'ggml: no memory for a program');
    }
    const bytes = this.#library.number('ggml_gallocr_get_buffer_size', this.#allocator, 0);
    if (bytes !== this.#bytes) {
      this.#bytes = bytes;
      this.version++;
    }
  }

  [Symbol.dispose](): void {
    this.#library.call('ggml_gallocr_free', this.#allocator);
  }
}
