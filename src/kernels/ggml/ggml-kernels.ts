// Kernels over ggml. Stored tensors have a buffer each, pools of adapter pages one together; programs share one scratch buffer (see GgmlProgram).

import { GatewayError } from '../../errors.ts';
import { byteLength, checkPool, checkRange, checkShape, mismatch } from '../check.ts';
import {
  type ByteMove,
  type DType,
  dtypeLayout,
  type Kernels,
  type LinearWay,
  type Ops,
  type PagePool,
  type Program,
  type ProgramShape,
  ranksPerPage,
  type StoredTensor,
  type Tensor,
  type WeightType,
} from '../kernels.ts';
import { pageBytes, pageRange } from '../page-numbers.ts';
import { Accelerator, DeviceScheduler } from './device-scheduler.ts';
import { GgmlProgram } from './ggml-program.ts';
import {
  type GgmlDevice,
  type GgmlLibrary,
  ggmlType,
  listDevices,
  loadLibrary,
  type Pointer,
  tensorLayout,
} from './library.ts';
import {
  Arena,
  Device,
  GgmlTensor,
  hugePageBytes,
  isTiled,
  ours,
  Scratch,
  TensorBuffer,
  toNe,
} from './memory.ts';
import { type NativeKernels, nativeKernels } from './native.ts';
import { nativeWidth, type ProgramHost } from './recorder.ts';
import { type DeviceChoice, type DeviceWish, selectDevice } from './select-device.ts';

const none: NativeKernels = { addresses: new Map(), why: 'composed of ggml’s ops' };
const typeInt8 = 24; // enum ggml_type: a type of one byte a number
/** Types that our own kernels lay out as tiles of rows, and ggml's type that takes as many bytes: q4_1 or q8_1. */
const tileType: Partial<Record<WeightType, number>> = {
  ...{ q4_0: 3, q4_1: 3, q4_k: 3 },
  ...{ q5_0: 9, q5_1: 9, q5_k: 9, q8_0: 9 },
};
const tileRows = 16; // rows of a tile on the widest machine
const storedTensorsMax = 4096; // a 30-block decoder with adapters stores about 800

export interface GgmlOptions {
  readonly threads: number;
  /** Folder of the shared objects; the installed npm package by default. */
  readonly libraryDirectory?: string;
  /** What holds the model; the CPU by default. */
  readonly device?: DeviceWish;
  /** Memory that the model, its cache and its adapters will take. */
  readonly bytesNeeded?: number;
  /** Multiplies weights of any type by f32 activations, where our own kernels run; ggml's kernels otherwise. */
  readonly f32Activations?: boolean;
  /** false: composed of ggml's ops alone. */
  readonly native?: boolean;
}

/** Which device a wish leads to on this machine, and why. Loads the library. Throws UNSUPPORTED with what to do. */
export function chooseDevice(options: Omit<GgmlOptions, 'threads'>): DeviceChoice<GgmlDevice> {
  const { device: wish = 'cpu', libraryDirectory, bytesNeeded = 0 } = options;
  return selectDevice(listDevices(loadLibrary(wish, libraryDirectory)), wish, bytesNeeded);
}

export class GgmlKernels implements Kernels {
  readonly name = 'ggml';
  readonly description: string;
  readonly f32Activations: boolean;
  readonly #library: GgmlLibrary;
  readonly #device: Device;
  readonly #arena: Arena;
  readonly #buffers: TensorBuffer[] = [];
  readonly #programs: Set<GgmlProgram> = new Set();
  readonly #scratch: Scratch;
  readonly #scheduler: DeviceScheduler | undefined;
  readonly #host: ProgramHost;
  readonly #tile: NativeKernels['tile'];
  readonly #roundPage: NativeKernels['roundPage'];
  #tensors = 0;
  #disposed = false;

  constructor(options: GgmlOptions) {
    const { threads } = options;
    if (!Number.isSafeInteger(threads) || threads < 1 || threads > 512) {
      throw new GatewayError('INVALID_REQUEST', `threads: 1 to 512 wanted, got ${threads}`);
    }
    const { device: chosen } = chooseDevice(options);
    const library = loadLibrary(options.device ?? 'cpu');
    const device = new Device(library, threads);
    this.#library = library;
    this.#device = device;
    this.#arena = new Arena(library, storedTensorsMax, 0);
    this.#scratch = new Scratch(library, device);
    const accelerator = chosen === null ? undefined : new Accelerator(library, chosen);
    this.#scheduler = accelerator && new DeviceScheduler(library, accelerator, device);
    const [scratch, scheduler, place] = [this.#scratch, this.#scheduler, accelerator ?? device];
    const own = options.native === false || accelerator !== undefined ? none : nativeKernels();
    const { addresses: native } = own;
    this.#tile = own.tile;
    this.#roundPage = own.roundPage;
    const f32Activations = options.f32Activations ?? false;
    this.f32Activations = f32Activations && native.size > 0;
    this.#host = { library, device, scratch, scheduler, place, native, f32Activations };
    const devices = [accelerator, device].flatMap((each) => each?.description.trim() ?? []);
    this.description = `ggml ${library.version}, ${devices.join(', ')}, ${threads} threads, ${own.why}`;
  }

  store(
    dtype: DType,
    shape: readonly number[],
    contents: 'zero' | 'undefined' = 'zero',
  ): StoredTensor {
    checkShape('store', dtype, shape);
    return this.#store(dtype, shape, { contents });
  }

  storeWeight(dtype: WeightType, shape: readonly number[], way: LinearWay): StoredTensor | null {
    checkShape('storeWeight', dtype, shape);
    const isOwn = this.#host.native.size > 0 && shape[1]! % nativeWidth === 0;
    if (way !== 'library' && !isOwn) return null;
    if (way === 'library' || way === 'f32') {
      return this.#store(dtype, shape, { contents: 'undefined', way });
    }
    const type = tileType[dtype];
    if (type === undefined || shape[0]! % tileRows !== 0) return null;
    return this.#store(dtype, shape, { contents: 'undefined', way, type });
  }

  storePages(pages: number, pools: readonly PagePool[]): StoredTensor[] {
    for (const { use, dtype, width } of pools) {
      const shape = [pages, ranksPerPage, width];
      checkShape('storePages', dtype, shape);
      checkPool('storePages', { dtype, shape }, width);
      if (dtype === 'q8_0' && this.#isTransposed(use, width)) {
        throw new GatewayError('UNSUPPORTED', 'ggml: q8_0 pages need the native kernels');
      }
    }
    const groups = this.#scheduler === undefined ? [pools] : pools.map((pool) => [pool]);
    return groups.flatMap((group) => this.#storeTogether(pages, group));
  }

  /** ggml's products contract the innermost axis: out of the bottleneck that is the ranks. */
  #isTransposed(use: PagePool['use'], width: number): boolean {
    return use === 'expand' && (this.#host.native.size === 0 || width % nativeWidth !== 0);
  }

  /** Page by page, each with the page of every pool: an adapter's pages are a few runs of memory, whatever the model's size. */
  #storeTogether(pages: number, pools: readonly PagePool[]): GgmlTensor[] {
    const sizes = pools.map(({ dtype, width }) => byteLength(dtype, [ranksPerPage, width]));
    const pageStride = sizes.reduce((sum, bytes) => sum + bytes, 0);
    const placed = pools.map((pool, i) => {
      const transposedPages = this.#isTransposed(pool.use, pool.width);
      const shape = [pages, ranksPerPage, pool.width];
      const pointer = this.#tensor(pool.dtype, shape, transposedPages);
      const word = this.#arena.locate(pointer);
      this.#arena.patch(word, tensorLayout.nb + 16, pageStride);
      this.#arena.patch(word, tensorLayout.nb + 24, pageStride * pages);
      const at = sizes.slice(0, i).reduce((sum, bytes) => sum + bytes, 0);
      return { dtype: pool.dtype, shape, transposedPages, pointer, at };
    });
    const { pointer: last, at: lastAt } = placed.at(-1)!;
    const bytes = lastAt + TensorBuffer.bytesFor(this.#library, this.#host.place, last);
    const huge = this.#scheduler === undefined && bytes >= hugePageBytes;
    const buffer = new TensorBuffer(this.#library, this.#host.place, bytes, huge);
    this.#buffers.push(buffer);
    return placed.map(({ dtype, shape, transposedPages, pointer, at }, i) => {
      buffer.adopt(pointer, at);
      const how = { transposedPages, pageStride };
      const pool = new GgmlTensor({ dtype, shape }, { pointer, buffer, at }, how);
      this.write(pool, new Uint8Array(sizes[i]!), 0);
      return pool;
    });
  }

  #tensor(
    dtype: DType,
    shape: readonly number[],
    transposedPages = false,
    type = ggmlType[dtype],
  ): Pointer {
    if (++this.#tensors > storedTensorsMax) {
      throw new GatewayError('ENGINE_FAILED', `ggml: more than ${storedTensorsMax} stored tensors`);
    }
    const sizes = transposedPages ? [shape[0]!, shape[2]!, shape[1]!] : shape;
    return this.#library.pointer('ggml_new_tensor_4d', this.#arena.context, type, ...toNe(sizes));
  }

  #store(
    dtype: DType,
    shape: readonly number[],
    how: {
      readonly contents: 'zero' | 'undefined';
      readonly way?: LinearWay;
      /** ggml's, where it is not that of `dtype`. */
      readonly type?: number;
    },
  ): GgmlTensor {
    const pointer = this.#tensor(dtype, shape, false, how.type);
    const buffer = TensorBuffer.of(this.#library, this.#host.place, pointer);
    if (how.contents === 'zero') buffer.clear();
    this.#buffers.push(buffer);
    return new GgmlTensor({ dtype, shape: [...shape] }, { pointer, buffer }, how);
  }

  writePage(pool: StoredTensor, page: number, halves: Uint16Array | null): void {
    const { at } = pageRange(pool, page, halves);
    if (pool.dtype === 'q8_0' && halves !== null && this.#roundPage !== undefined) {
      const { address, pageStride } = ours(pool);
      this.#roundPage(BigInt(address + page * pageStride!), halves);
      return;
    }
    this.write(pool, pageBytes(pool, page, halves), at);
  }

  write(tensor: StoredTensor, bytes: Uint8Array, byteOffset: number): void {
    checkRange('write', tensor.bytes, byteOffset, bytes.byteLength);
    const target = ours(tensor);
    if (isTiled(target)) {
      this.#writeTiles(target, bytes);
      return;
    }
    const source = target.transposedPages ? transposePages(target, bytes, byteOffset, true) : bytes;
    for (const { from, to, at } of runsOf(target, byteOffset, bytes.byteLength)) {
      const run = source.subarray(from, to);
      this.#library.call('ggml_backend_tensor_set', target.pointer, run, at, to - from);
    }
  }

  #writeTiles({ pointer, dtype, shape, bytes: wanted }: GgmlTensor, bytes: Uint8Array): void {
    const [rows, width] = shape as [number, number];
    if (bytes.byteLength !== wanted) throw mismatch('write', 'a weight is written as a whole');
    const sizes = { rows, width, rowBytes: wanted / rows };
    this.#tile?.(this.#library.pointer('ggml_get_data', pointer), bytes, ggmlType[dtype], sizes);
  }

  read(tensor: StoredTensor, out: Uint8Array, byteOffset: number): void {
    checkRange('read', tensor.bytes, byteOffset, out.byteLength);
    const source = ours(tensor);
    if (isTiled(source)) throw new GatewayError('UNSUPPORTED', 'ggml: tiles are not read back');
    for (const { from, to, at } of runsOf(source, byteOffset, out.byteLength)) {
      const run = out.subarray(from, to);
      this.#library.call('ggml_backend_tensor_get', source.pointer, run, at, to - from);
    }
    if (source.transposedPages) out.set(transposePages(source, out, byteOffset, false));
  }

  setThreads(threads: number): void {
    this.#device.setThreads(threads);
  }

  copyWithin(tensor: StoredTensor, { from, to, bytes }: ByteMove): void {
    checkRange('copyWithin', tensor.bytes, from, bytes);
    checkRange('copyWithin', tensor.bytes, to, bytes);
    const { pointer, address, buffer, pageStride } = ours(tensor);
    if (pageStride !== undefined) throw mismatch('copyWithin', 'pages are written anew');
    if (buffer.isHost) {
      // Setting from its own address is one memcpy.
      this.#library.call('ggml_backend_tensor_set', pointer, BigInt(address + from), to, bytes);
      return;
    }
    using arena = new Arena(this.#library, 2, 0);
    const [source, target] = [from, to].map((offset) => {
      const name = 'ggml_new_tensor_4d';
      const range = this.#library.pointer(name, arena.context, typeInt8, bytes, 1, 1, 1);
      buffer.adopt(range, offset);
      return range;
    });
    this.#library.call('ggml_backend_tensor_copy', source, target);
  }

  compile(build: (ops: Ops) => Readonly<Record<string, Tensor>>, shape: ProgramShape): Program {
    const program = new GgmlProgram(this.#host, build, shape, () => this.#programs.delete(program));
    this.#programs.add(program);
    return program;
  }

  /** Of the intermediate values of the largest program so far. */
  get scratchBytes(): number {
    return this.#scheduler?.bytes ?? this.#scratch.bytes;
  }

  [Symbol.dispose](): void {
    if (this.#disposed) return;
    this.#disposed = true;
    for (const program of [...this.#programs]) program[Symbol.dispose]();
    this.#scratch[Symbol.dispose]();
    for (const buffer of this.#buffers) buffer[Symbol.dispose]();
    this.#arena[Symbol.dispose]();
    this.#scheduler?.[Symbol.dispose]();
    this.#scheduler?.accelerator[Symbol.dispose]();
    this.#device[Symbol.dispose]();
  }
}

/** Bytes [from, to) of what is written or read, and where in the tensor they lie: pages of a pool lie apart. */
function* runsOf(
  { shape, bytes, pageStride }: GgmlTensor,
  start: number,
  count: number,
): Generator<{ readonly from: number; readonly to: number; readonly at: number }> {
  const whole = pageStride === undefined ? bytes : bytes / shape[0]!;
  for (let from = 0; from < count; ) {
    const [page, inside] = [Math.floor((start + from) / whole), (start + from) % whole];
    const to = Math.min(count, from + whole - inside);
    yield { from, to, at: page * (pageStride ?? 0) + inside };
    from = to;
  }
}

/** Whole pages [8, width] ↔ [width, 8] of numbers of two or four bytes. */
function transposePages(
  pool: GgmlTensor,
  bytes: Uint8Array,
  byteOffset: number,
  inward: boolean,
): Uint8Array {
  const width = pool.shape[2]!;
  const size = dtypeLayout[pool.dtype].bytes;
  const pageBytes = ranksPerPage * width * size;
  if (byteOffset % pageBytes !== 0 || bytes.byteLength % pageBytes !== 0) {
    throw mismatch('pages', `whole pages of ${pageBytes} bytes wanted`);
  }
  const [rows, columns] = inward ? [ranksPerPage, width] : [width, ranksPerPage];
  const out = new Uint8Array(bytes.byteLength);
  for (let page = 0; page < bytes.byteLength; page += pageBytes) {
    for (let row = 0; row < rows; row++) {
      for (let column = 0; column < columns; column++) {
        const from = page + (row * columns + column) * size;
        const to = page + (column * rows + row) * size;
        for (let i = 0; i < size; i++) out[to + i] = bytes[from + i]!;
      }
    }
  }
  return out;
}
