// A second CPU backend that ggml takes for a GPU: memory that the CPU backend may not touch, a stream of its own, and a
// list of ops that it refuses. Made by copying ggml's CPU structs (ggml-backend-impl.h of 0.23) and changing a few of
// their function pointers; ggml lists it as CUDA0 from then on. What it cannot show: other arithmetic, asynchrony.

import { readdirSync } from 'node:fs';
import { join } from 'node:path';
import koffi from 'koffi';
import { type GgmlLibrary, loadLibrary, type Pointer } from '../../src/kernels/ggml/library.ts';

const word = 8;
const deviceWords = {
  getName: 0,
  getType: 3,
  initBackend: 5,
  getBufferType: 6,
  getHostBufferType: 7,
  bufferFromHostPtr: 8,
  supportsOp: 9,
  supportsBufferType: 10,
  registry: 15,
  all: 17,
} as const;
const bufferTypeWords = { isHost: 5, device: 6, all: 8 } as const;
const backendWords = { graphCompute: 13, device: 17, all: 19 } as const;
const typeGpu = 1; // enum ggml_backend_dev_type

export interface StandInDevice {
  /** ggml's names of the ops that the device refuses: MUL_MAT, ROPE, … */
  readonly lacks: Set<string>;
  /** How often each op was computed on the device. */
  readonly ran: Map<string, number>;
  /** Parts of graphs that the device computed. */
  parts: number;
}

/** `count` words from `pointer`, as they are. */
function wordsAt(pointer: Pointer, count: number): BigUint64Array {
  return new BigUint64Array(koffi.view(pointer, count * word));
}

function copyOf(pointer: Pointer, count: number): { pointer: Pointer; words: BigUint64Array } {
  const copy = koffi.alloc('uint8_t', count * word) as Pointer;
  const words = wordsAt(copy, count);
  words.set(wordsAt(pointer, count));
  return { pointer: copy, words };
}

type Native = (...values: unknown[]) => unknown;

interface Natives {
  readonly library: GgmlLibrary;
  readonly cpu: Pointer;
  bind(object: RegExp, prototype: string): Native;
}

function openNatives(): Natives {
  const library = loadLibrary('cpu');
  const bind = (object: RegExp, prototype: string): Native => {
    const file = readdirSync(library.directory).find((name) => object.test(name));
    return koffi.load(join(library.directory, file!)).func(prototype) as Native;
  };
  const byType = bind(core, 'void *ggml_backend_dev_by_type(int type)');
  return { library, bind, cpu: byType(0) as Pointer };
}

const base = /ggml-base\.(so|dylib|dll)$/;
const core = /^(lib)?ggml\.(v[\d.]+)?(so|dylib|dll)$/;

const pointerType = 'void *';

function callback(
  result: string,
  parameters: number,
  act: (...values: never[]) => unknown,
): Pointer {
  const type = koffi.proto(result, Array<string>(parameters).fill(pointerType));
  return koffi.register(act, koffi.pointer(type)) as Pointer;
}

/** A graph_compute that counts what it computes on the way to `compute`. */
function watchCompute(compute: Pointer, natives: Natives, device: StandInDevice): Pointer {
  const nodeCount = natives.bind(base, 'int ggml_graph_n_nodes(void *graph)');
  const nodeAt = natives.bind(base, 'void *ggml_graph_node(void *graph, int i)');
  const opName = natives.bind(base, 'str ggml_op_desc(void *tensor)');
  const type = koffi.proto('int', [pointerType, pointerType]);
  return callback('int', 2, (backend: Pointer, graph: Pointer) => {
    device.parts++;
    for (let i = 0; i < Number(nodeCount(graph)); i++) {
      const name = opName(nodeAt(graph, i)) as string;
      device.ran.set(name, (device.ran.get(name) ?? 0) + 1);
    }
    return koffi.call(compute, type, backend, graph);
  });
}

/** A CPU backend that says it belongs to the device, with another graph_compute. */
function startBackend(self: Pointer, { library, cpu }: Natives, compute: Pointer): Pointer {
  const backend = library.pointer('ggml_backend_dev_init', cpu, null);
  const words = wordsAt(backend, backendWords.all);
  if (words[backendWords.device] !== cpu) throw new Error('ggml_backend is laid out otherwise');
  const registry = library.pointer('ggml_backend_dev_backend_reg', cpu);
  const name = 'ggml_backend_set_n_threads';
  const setThreads = library.pointer('ggml_backend_reg_get_proc_address', registry, name);
  koffi.call(setThreads, koffi.proto('void', ['void *', 'int']), backend, 1);
  words[backendWords.device] = self;
  words[backendWords.graphCompute] = compute;
  return backend;
}

/** Registers the device with ggml for the rest of the process, and returns what it records. */
export function registerStandIn(): StandInDevice {
  const natives = openNatives();
  const { library, cpu, bind } = natives;
  const device: StandInDevice = { lacks: new Set(), ran: new Map(), parts: 0 };
  const self = copyOf(cpu, deviceWords.all);
  const registry = library.pointer('ggml_backend_dev_backend_reg', cpu);
  if (self.words[deviceWords.registry] !== registry) {
    throw new Error('ggml_backend_device is laid out otherwise');
  }
  const ofDevice = bind(base, 'void *ggml_backend_dev_buffer_type(void *device)');
  const memory = copyOf(ofDevice(cpu) as Pointer, bufferTypeWords.all);
  memory.words[bufferTypeWords.isHost] = 0n;
  memory.words[bufferTypeWords.device] = self.pointer;
  const name = koffi.alloc('char', 6) as Pointer;
  new Uint8Array(koffi.view(name, 6)).set(Buffer.from('CUDA0\0'));
  const opName = bind(base, 'str ggml_op_desc(void *tensor)');
  const cpuSupports = bind(base, 'bool ggml_backend_dev_supports_op(void *device, void *op)');
  // Made here, once: koffi's callbacks are few, and one that is made inside another cannot be called.
  const sample = library.pointer('ggml_backend_dev_init', cpu, null);
  const compute = wordsAt(sample, backendWords.all)[backendWords.graphCompute]!;
  library.call('ggml_backend_free', sample);
  const watched = watchCompute(compute, natives, device);
  const start = (): Pointer => startBackend(self.pointer, natives, watched);
  const supports = (_: Pointer, op: Pointer): boolean =>
    !device.lacks.has(opName(op) as string) && (cpuSupports(cpu, op) as boolean);
  const replaced: readonly (readonly [number, bigint])[] = [
    [deviceWords.getName, callback(pointerType, 1, () => name)],
    [deviceWords.getType, callback('int', 1, () => typeGpu)],
    [deviceWords.initBackend, callback(pointerType, 2, start)],
    [deviceWords.getBufferType, callback(pointerType, 1, () => memory.pointer)],
    [deviceWords.getHostBufferType, 0n],
    [deviceWords.bufferFromHostPtr, 0n],
    [deviceWords.supportsOp, callback('bool', 2, supports)],
    [
      deviceWords.supportsBufferType,
      callback('bool', 2, (_: Pointer, type: Pointer) => type === memory.pointer),
    ],
  ];
  for (const [at, value] of replaced) self.words[at] = value;
  bind(core, 'void ggml_backend_device_register(void *device)')(self.pointer);
  return device;
}
