// Finds and loads ggml's shared objects (npm package @node-llama-cpp/<platform>, pinned: the C API is the contract) and
// names every C function that we call, once. Nothing else touches koffi's prototypes. Pointers are bigints (koffi 3).
// ggml aborts the *process* on a wrong shape: callers check shapes first (check.ts).

import { existsSync, readdirSync } from 'node:fs';
import { createRequire } from 'node:module';
import { dirname, join } from 'node:path';
import koffi, { type LibraryHandle } from 'koffi';
import { GatewayError } from '../../errors.ts';
import type { DType } from '../kernels.ts';
import { type DeviceWish, devicePackages, type FoundDevice } from './select-device.ts';

export type Pointer = bigint;

/** The package version whose ggml this file was written against. */
const packageVersion = '3.21.1';
const ggmlVersion = '0.23.0';

/** `struct ggml_tensor` of ggml 0.23 on a 64-bit machine: byte offsets of the fields that programs patch between runs.
 *  selfTest checks them against the library's own answers before anything relies on them. */
export const tensorLayout = { ne: 16, nb: 48, src: 152, viewOffset: 240, data: 248 } as const;

export const ggmlType: Readonly<Record<DType, number>> = {
  f32: 0,
  f16: 1,
  q4_0: 2,
  q4_1: 3,
  q5_0: 6,
  q5_1: 7,
  q8_0: 8,
  q4_k: 12,
  q5_k: 13,
  q6_k: 14,
  i32: 26,
  i64: 27,
  bf16: 30,
};

koffi.struct('rankgate_init_params', {
  mem_size: 'size_t',
  mem_buffer: 'void *',
  no_alloc: 'bool',
});

/** name → [library, result, arguments]. `base` is libggml-base (tensors, graphs, buffers), `core` is libggml (backends). */
const prototypes = {
  ggml_version: ['base', 'str', []],
  ggml_tensor_overhead: ['base', 'size_t', []],
  ggml_graph_overhead_custom: ['base', 'size_t', ['size_t', 'bool']],
  ggml_init: ['base', 'void *', ['rankgate_init_params']],
  ggml_free: ['base', 'void', ['void *']],
  ggml_nbytes: ['base', 'size_t', ['void *']],
  ggml_get_data: ['base', 'void *', ['void *']],
  ggml_new_tensor_4d: [
    'base',
    'void *',
    ['void *', 'int', 'int64_t', 'int64_t', 'int64_t', 'int64_t'],
  ],
  ggml_new_graph_custom: ['base', 'void *', ['void *', 'size_t', 'bool']],
  ggml_build_forward_expand: ['base', 'void', ['void *', 'void *']],
  ggml_graph_n_nodes: ['base', 'int', ['void *']],
  ggml_set_input: ['base', 'void', ['void *']],
  ggml_set_output: ['base', 'void', ['void *']],
  ggml_get_rows: ['base', 'void *', ['void *', 'void *', 'void *']],
  ggml_set_rows: ['base', 'void *', ['void *', 'void *', 'void *', 'void *']],
  ggml_rms_norm: ['base', 'void *', ['void *', 'void *', 'float']],
  ggml_add: ['base', 'void *', ['void *', 'void *', 'void *']],
  ggml_add_inplace: ['base', 'void *', ['void *', 'void *', 'void *']],
  ggml_custom_inplace: [
    'base',
    'void *',
    ['void *', 'void *', 'void *', 'int', 'void *', 'int', 'void *'],
  ],
  ggml_fill: ['base', 'void *', ['void *', 'void *', 'float']],
  ggml_cpy: ['base', 'void *', ['void *', 'void *', 'void *']],
  ggml_mul: ['base', 'void *', ['void *', 'void *', 'void *']],
  ggml_mul_mat: ['base', 'void *', ['void *', 'void *', 'void *']],
  ggml_mul_mat_id: ['base', 'void *', ['void *', 'void *', 'void *', 'void *']],
  ggml_swiglu_split: ['base', 'void *', ['void *', 'void *', 'void *']],
  ggml_reshape_4d: [
    'base',
    'void *',
    ['void *', 'void *', 'int64_t', 'int64_t', 'int64_t', 'int64_t'],
  ],
  ggml_cont: ['base', 'void *', ['void *', 'void *']],
  ggml_view_2d: ['base', 'void *', ['void *', 'void *', 'int64_t', 'int64_t', 'size_t', 'size_t']],
  ggml_view_3d: [
    'base',
    'void *',
    ['void *', 'void *', 'int64_t', 'int64_t', 'int64_t', 'size_t', 'size_t', 'size_t'],
  ],
  ggml_rope_ext: [
    'base',
    'void *',
    [
      'void *',
      'void *',
      'void *',
      'void *',
      'int',
      'int',
      'int',
      'float',
      'float',
      'float',
      'float',
      'float',
      'float',
    ],
  ],
  ggml_flash_attn_ext: [
    'base',
    'void *',
    ['void *', 'void *', 'void *', 'void *', 'void *', 'float', 'float', 'float'],
  ],
  // Training.
  ggml_custom_4d: [
    'base',
    'void *',
    [
      'void *',
      'int',
      'int64_t',
      'int64_t',
      'int64_t',
      'int64_t',
      'void *',
      'int',
      'void *',
      'int',
      'void *',
    ],
  ],
  ggml_sub: ['base', 'void *', ['void *', 'void *', 'void *']],
  ggml_out_prod: ['base', 'void *', ['void *', 'void *', 'void *']],
  ggml_rms_norm_back: ['base', 'void *', ['void *', 'void *', 'void *', 'float']],
  ggml_repeat_back: ['base', 'void *', ['void *', 'void *', 'void *']],
  ggml_silu_back: ['base', 'void *', ['void *', 'void *', 'void *']],
  ggml_rope_ext_back: [
    'base',
    'void *',
    [
      'void *',
      'void *',
      'void *',
      'void *',
      'int',
      'int',
      'int',
      'float',
      'float',
      'float',
      'float',
      'float',
      'float',
    ],
  ],
  ggml_get_rows_back: ['base', 'void *', ['void *', 'void *', 'void *', 'void *']],
  ggml_permute: ['base', 'void *', ['void *', 'void *', 'int', 'int', 'int', 'int']],
  ggml_soft_max_ext: ['base', 'void *', ['void *', 'void *', 'void *', 'float', 'float']],
  ggml_soft_max_ext_back: ['base', 'void *', ['void *', 'void *', 'void *', 'float', 'float']],
  ggml_sgn: ['base', 'void *', ['void *', 'void *']],
  ggml_argmax: ['base', 'void *', ['void *', 'void *']],
  ggml_log: ['base', 'void *', ['void *', 'void *']],
  ggml_sum: ['base', 'void *', ['void *', 'void *']],
  ggml_scale_bias: ['base', 'void *', ['void *', 'void *', 'float', 'float']],
  ggml_arange: ['base', 'void *', ['void *', 'float', 'float', 'float']],
  ggml_clamp: ['base', 'void *', ['void *', 'void *', 'float', 'float']],
  ggml_diag: ['base', 'void *', ['void *', 'void *']],
  ggml_concat: ['base', 'void *', ['void *', 'void *', 'void *', 'int']],
  ggml_log_set: ['base', 'void', ['void *', 'void *']],
  ggml_backend_dev_name: ['base', 'str', ['void *']],
  ggml_backend_dev_type: ['base', 'int', ['void *']],
  ggml_backend_dev_memory: ['base', 'void', ['void *', 'void *', 'void *']],
  ggml_backend_dev_init: ['base', 'void *', ['void *', 'void *']],
  ggml_backend_dev_supports_op: ['base', 'bool', ['void *', 'void *']],
  ggml_backend_buffer_is_host: ['base', 'bool', ['void *']],
  ggml_backend_tensor_copy: ['base', 'void', ['void *', 'void *']],
  ggml_backend_sched_new: ['base', 'void *', ['void *', 'void *', 'int', 'size_t', 'bool', 'bool']],
  ggml_backend_sched_free: ['base', 'void', ['void *']],
  ggml_backend_sched_reset: ['base', 'void', ['void *']],
  ggml_backend_sched_alloc_graph: ['base', 'bool', ['void *', 'void *']],
  ggml_backend_sched_graph_compute: ['base', 'int', ['void *', 'void *']],
  ggml_backend_sched_get_n_splits: ['base', 'int', ['void *']],
  ggml_backend_sched_get_buffer_size: ['base', 'size_t', ['void *', 'void *']],
  ggml_graph_node: ['base', 'void *', ['void *', 'int']],
  ggml_backend_get_default_buffer_type: ['base', 'void *', ['void *']],
  ggml_backend_buft_alloc_buffer: ['base', 'void *', ['void *', 'size_t']],
  ggml_backend_buft_get_alloc_size: ['base', 'size_t', ['void *', 'void *']],
  ggml_backend_buffer_get_base: ['base', 'void *', ['void *']],
  ggml_backend_buffer_set_usage: ['base', 'void', ['void *', 'int']],
  ggml_backend_buffer_clear: ['base', 'void', ['void *', 'uint8_t']],
  ggml_backend_buffer_free: ['base', 'void', ['void *']],
  ggml_backend_tensor_alloc: ['base', 'int', ['void *', 'void *', 'void *']],
  ggml_backend_tensor_set: ['base', 'void', ['void *', 'void *', 'size_t', 'size_t']],
  ggml_backend_tensor_get: ['base', 'void', ['void *', 'void *', 'size_t', 'size_t']],
  ggml_backend_graph_compute: ['base', 'int', ['void *', 'void *']],
  ggml_backend_free: ['base', 'void', ['void *']],
  ggml_backend_get_device: ['base', 'void *', ['void *']],
  ggml_backend_dev_backend_reg: ['base', 'void *', ['void *']],
  ggml_backend_dev_description: ['base', 'str', ['void *']],
  ggml_backend_reg_get_proc_address: ['base', 'void *', ['void *', 'str']],
  ggml_gallocr_new: ['base', 'void *', ['void *']],
  ggml_gallocr_free: ['base', 'void', ['void *']],
  ggml_gallocr_alloc_graph: ['base', 'bool', ['void *', 'void *']],
  ggml_gallocr_get_buffer_size: ['base', 'size_t', ['void *', 'int']],
  ggml_threadpool_params_init: ['base', 'void', ['void *', 'int']],
  ggml_backend_load_all_from_path: ['core', 'void', ['str']],
  ggml_backend_init_by_type: ['core', 'void *', ['int', 'void *']],
  ggml_backend_reg_count: ['core', 'size_t', []],
  ggml_backend_dev_count: ['core', 'size_t', []],
  ggml_backend_dev_get: ['core', 'void *', ['size_t']],
} as const;

type FunctionName = keyof typeof prototypes;
// koffi's functions take numbers, bigints, buffers and structs alike; each call site's shapes are checked in TypeScript.
type ForeignFunction = (...values: unknown[]) => unknown;

export interface GgmlLibrary {
  readonly version: string;
  readonly directory: string;
  /** Calls a function that returns a pointer; a null result is a GatewayError, never a later crash. */
  pointer(name: FunctionName, ...values: unknown[]): Pointer;
  number(name: FunctionName, ...values: unknown[]): number;
  text(name: FunctionName, ...values: unknown[]): string;
  call(name: FunctionName, ...values: unknown[]): void;
  /** A C function that does nothing, whatever it is called with. */
  readonly noop: Pointer;
}

/** The folder with the shared objects: of the first package that can meet the wish and is installed. */
function findLibraryDirectory(wish: DeviceWish): string {
  const names = devicePackages(`${process.platform}-${process.arch}`, wish);
  const { resolve } = createRequire(import.meta.url);
  for (const name of names) {
    let entry: string;
    try {
      entry = resolve(`@node-llama-cpp/${name}`);
    } catch {
      continue; // not installed: the next one
    }
    const directory = join(dirname(entry), '..', 'bins', name);
    if (existsSync(directory)) return directory;
  }
  const wanted = `@node-llama-cpp/${names.at(-1)}@${packageVersion}`;
  throw new GatewayError('UNSUPPORTED', `ggml: npm install ${wanted}`);
}

function loadObject(directory: string, pattern: RegExp): LibraryHandle {
  const file = readdirSync(directory).find((name) => pattern.test(name));
  if (file === undefined) {
    throw new GatewayError('UNSUPPORTED', `ggml: no file like ${pattern} in the library folder`);
  }
  return koffi.load(join(directory, file));
}

function bind(directory: string): GgmlLibrary {
  const objects = {
    base: loadObject(directory, /^(lib)?ggml-base(\.[^-]*)?\.(so|dylib|dll)$/),
    // libggml.v0.4.0.so, libggml.vulkan.v0.4.0.so
    core: loadObject(directory, /^(lib)?ggml(\.[a-z]+)?(\.v[\d.]+)?\.(so|dylib|dll)$/),
  };
  const functions = new Map<string, ForeignFunction>();
  for (const [name, [object, result, parameters]] of Object.entries(prototypes)) {
    try {
      functions.set(name, objects[object].func(name, result, [...parameters]));
    } catch (cause) {
      throw new GatewayError(
        'UNSUPPORTED',
        `ggml: the library has no ${name}; version ${packageVersion} of the npm package is wanted`,
        { cause },
      );
    }
  }
  const invoke = (name: FunctionName, values: unknown[]): unknown =>
    functions.get(name)!(...values);
  const library: GgmlLibrary = {
    version: invoke('ggml_version', []) as string,
    noop: objects.base.symbol('ggml_time_init', 'void') as Pointer, // at most sets a clock up, once
    directory,
    pointer(name, ...values) {
      const result = invoke(name, values) as Pointer | null;
      if (result === null || result === 0n) {
        throw new GatewayError('ENGINE_FAILED', `ggml: ${name} returned nothing (out of memory?)`);
      }
      return result;
    },
    number: (name, ...values) => Number(invoke(name, values)),
    text: (name, ...values) => invoke(name, values) as string,
    call(name, ...values) {
      invoke(name, values);
    },
  };
  return library;
}

/** The struct offsets that programs patch, checked against the library itself; a moved field would corrupt memory. */
function selfTest(library: GgmlLibrary): void {
  const bytes = 1 << 16;
  const memory = koffi.alloc('uint8_t', bytes) as Pointer;
  const context = library.pointer('ggml_init', {
    mem_size: bytes,
    mem_buffer: memory,
    no_alloc: false,
  });
  const tensor = library.pointer('ggml_new_tensor_4d', context, ggmlType.f32, 7, 5, 3, 2);
  const other = library.pointer('ggml_new_tensor_4d', context, ggmlType.f32, 7, 4, 3, 2);
  const product = library.pointer('ggml_mul_mat', context, tensor, other);
  const part = library.pointer('ggml_view_2d', context, tensor, 3, 2, 28, 32);
  const view = new DataView(koffi.view(memory, bytes));
  const field = (owner: Pointer, offset: number): number =>
    Number(view.getBigUint64(Number(owner - memory) + offset, true));
  const wanted = [7, 5, 3, 2];
  const ok =
    wanted.every((size, i) => field(tensor, tensorLayout.ne + 8 * i) === size) &&
    [4, 28, 140, 420].every((stride, i) => field(tensor, tensorLayout.nb + 8 * i) === stride) &&
    field(tensor, tensorLayout.data) === Number(library.pointer('ggml_get_data', tensor)) &&
    field(part, tensorLayout.viewOffset) === 32 &&
    field(product, tensorLayout.src) === Number(tensor) &&
    field(product, tensorLayout.src + 8) === Number(other) &&
    field(product, tensorLayout.data) === Number(library.pointer('ggml_get_data', product));
  library.call('ggml_free', context);
  koffi.free(memory);
  if (!ok) {
    throw new GatewayError(
      'UNSUPPORTED',
      `ggml ${library.version}: tensors are laid out otherwise than in ${ggmlVersion}; install @node-llama-cpp ${packageVersion}`,
    );
  }
}

let loaded: GgmlLibrary | undefined;

/** Loads the library once per process: ggml's backend registry is process-wide. Throws UNSUPPORTED with what to install. */
export function loadLibrary(
  wish: DeviceWish,
  directory: string = loaded?.directory ?? findLibraryDirectory(wish),
): GgmlLibrary {
  if (loaded !== undefined) return loaded;
  const library = bind(directory);
  selfTest(library);
  // ggml prints a line with a path for what it loads. A GPU's library says there why it does not load: that is kept.
  const quiet = !/(cuda|vulkan)$/.test(directory);
  if (quiet) library.call('ggml_log_set', library.noop, null);
  library.call('ggml_backend_load_all_from_path', directory);
  if (quiet) library.call('ggml_log_set', null, null);
  if (library.number('ggml_backend_reg_count') === 0) {
    throw new GatewayError('UNSUPPORTED', 'ggml: none of the CPU variants runs on this machine');
  }
  loaded = library;
  return library;
}

export interface GgmlDevice extends FoundDevice {
  readonly pointer: Pointer;
}

/** By enum ggml_backend_dev_type. */
const deviceKinds = ['cpu', 'gpu', 'integrated'] as const;

export function listDevices(library: GgmlLibrary): readonly GgmlDevice[] {
  const count = library.number('ggml_backend_dev_count');
  return Array.from({ length: count }, (_, i) => {
    const pointer = library.pointer('ggml_backend_dev_get', i);
    const memory = new BigUint64Array(2); // free, total
    library.call('ggml_backend_dev_memory', pointer, memory.subarray(0, 1), memory.subarray(1));
    return {
      pointer,
      name: library.text('ggml_backend_dev_name', pointer),
      description: library.text('ggml_backend_dev_description', pointer),
      kind: deviceKinds[library.number('ggml_backend_dev_type', pointer)] ?? 'other',
      freeBytes: Number(memory[0]),
    };
  });
}
