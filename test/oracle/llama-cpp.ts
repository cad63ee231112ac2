// llama.cpp itself as an oracle and as the opponent of bench/: libllama's C API (npm @node-llama-cpp 3.21.1, llama.cpp
// 0.4.0) through koffi, with prototypes of its own, so that a mistake in src/kernels cannot repeat itself here. Raw
// logits, LoRA sets, and a persistent thread pool as llama-server and llama-bench attach one. Runs in a child process
// or a script, never beside src's ggml: both keep process-wide state.

import { readdirSync } from 'node:fs';
import { createRequire } from 'node:module';
import { dirname, join } from 'node:path';
import koffi, { type LibraryHandle, type TypeObject } from 'koffi';

type Pointer = bigint;
type Foreign = (...values: unknown[]) => unknown;

const p = 'void *';
/** The parameter structs are passed by value; 512 bytes hold them and what a newer version may append (160 and 80 used). */
const parameterBytes = 512;
const Parameters = koffi.struct({ bytes: koffi.array('uint8_t', parameterBytes) });
const Batch = koffi.struct({
  n_tokens: 'int32_t',
  token: p,
  embd: p,
  pos: p,
  n_seq_id: p,
  seq_id: p,
  logits: p,
});

/** Byte offsets in `struct llama_context_params` of llama.cpp 0.4.0; openContext checks each against the library. */
const contextField = {
  contextTokens: 0,
  batchTokens: 4,
  microBatchTokens: 8,
  sequencesMax: 12,
  threads: 28,
  threadsBatch: 32,
  flashAttention: 52,
  typeK: 104,
  typeV: 108,
  kvUnified: 133,
} as const;
/** What llama_context_default_params must return there: another value means another layout. */
const contextDefaults: ReadonlyArray<readonly [offset: number, value: number]> = [
  [contextField.contextTokens, 512],
  [contextField.batchTokens, 2048],
  [contextField.microBatchTokens, 512],
  [contextField.sequencesMax, 1],
  [contextField.threads, 4],
  [contextField.threadsBatch, 4],
  [contextField.flashAttention, -1],
  [contextField.typeK, 1],
  [contextField.typeV, 1],
];

const prototypes: Readonly<Record<string, readonly [result: unknown, parameters: unknown[]]>> = {
  llama_version: ['str', []],
  llama_print_system_info: ['str', []],
  llama_log_set: ['void', [p, p]],
  llama_backend_init: ['void', []],
  llama_model_default_params: [Parameters, []],
  llama_context_default_params: [Parameters, []],
  llama_model_load_from_file: [p, ['str', Parameters]],
  llama_model_free: ['void', [p]],
  llama_model_get_vocab: [p, [p]],
  llama_model_chat_template: ['str', [p, 'str']],
  llama_model_desc: ['int32_t', [p, p, 'size_t']],
  llama_model_quantize_default_params: [Parameters, []],
  llama_model_quantize: ['uint32_t', ['str', 'str', p]],
  llama_vocab_n_tokens: ['int32_t', [p]],
  llama_vocab_is_eog: ['bool', [p, 'int32_t']],
  llama_vocab_get_add_bos: ['bool', [p]],
  llama_tokenize: ['int32_t', [p, p, 'int32_t', p, 'int32_t', 'bool', 'bool']],
  llama_detokenize: ['int32_t', [p, p, 'int32_t', p, 'int32_t', 'bool', 'bool']],
  llama_init_from_model: [p, [p, Parameters]],
  llama_free: ['void', [p]],
  llama_n_ctx: ['uint32_t', [p]],
  llama_n_batch: ['uint32_t', [p]],
  llama_n_ubatch: ['uint32_t', [p]],
  llama_n_seq_max: ['uint32_t', [p]],
  llama_n_threads: ['int32_t', [p]],
  llama_attach_threadpool: ['void', [p, p, p]],
  llama_detach_threadpool: ['void', [p]],
  llama_get_memory: [p, [p]],
  llama_memory_clear: ['void', [p, 'bool']],
  llama_memory_seq_rm: ['bool', [p, 'int32_t', 'int32_t', 'int32_t']],
  llama_decode: ['int32_t', [p, Batch]],
  llama_get_logits_ith: [p, [p, 'int32_t']],
  llama_adapter_lora_init: [p, [p, 'str']],
  llama_adapter_lora_free: ['void', [p]],
  llama_set_adapters_lora: ['int32_t', [p, p, 'size_t', p]],
};
/** From the CPU variant that ggml's loader picked, by name. */
const threadPoolPrototypes = {
  ggml_threadpool_new: [p, [p]],
  ggml_threadpool_free: ['void', [p]],
} as const;

export interface ContextOptions {
  readonly contextTokens: number;
  readonly threads: number;
  readonly batchTokens?: number; // 2048
  readonly microBatchTokens?: number; // 512
  readonly sequencesMax?: number; // 1
  readonly flashAttention?: 'auto' | 'on' | 'off'; // auto
  readonly kvType?: 'f16' | 'f32'; // f16
  /** Shared by contexts that never run at the same time; without it the context makes its own. */
  readonly threadPool?: ThreadPool;
  /** One KV buffer for all sequences, or one per sequence; the library's own default is per sequence. */
  readonly kvUnified?: boolean; // false
}

/** One token of a batch. */
export interface BatchToken {
  readonly token: number;
  readonly position: number;
  readonly sequence: number;
  readonly wantsLogits: boolean;
}

export interface AdapterSetting {
  readonly adapter: LoraAdapter;
  readonly scale: number;
}

class Library {
  readonly directory: string;
  readonly #functions: Map<string, Foreign> = new Map();
  readonly #core: LibraryHandle;
  readonly #base: LibraryHandle;

  constructor() {
    const name = `${process.platform}-${process.arch}`;
    if (name !== 'linux-x64' && name !== 'linux-arm64') {
      throw new Error(`llama.cpp oracle: only linux is supported, this is ${name}`);
    }
    const entry = createRequire(import.meta.url).resolve(`@node-llama-cpp/${name}`);
    this.directory = join(dirname(entry), '..', 'bins', name);
    this.#base = koffi.load(this.#file(/^libggml-base\.so$/));
    this.#core = koffi.load(this.#file(/^libggml(\.v[\d.]+)?\.so$/));
    const llama = koffi.load(this.#file(/^libllama(\.v[\d.]+)?\.so$/));
    for (const [symbol, [result, parameters]] of Object.entries(prototypes)) {
      this.#functions.set(
        symbol,
        llama.func(symbol, result as TypeObject, parameters as TypeObject[]),
      );
    }
    this.#quiet();
    this.#core.func('ggml_backend_load_all_from_path', 'void', ['str'])(this.directory);
    this.call('llama_backend_init');
  }

  #file(pattern: RegExp): string {
    const name = readdirSync(this.directory).find((file) => pattern.test(file));
    if (name === undefined) throw new Error(`llama.cpp oracle: no file like ${pattern}`);
    return join(this.directory, name);
  }

  /** Without a callback libllama writes several hundred lines to standard error. Errors (level 4) stay visible. */
  #quiet(): void {
    const proto = koffi.proto('void', ['int', 'str', p]);
    const onLog = koffi.register((level: number, text: string) => {
      if (level === 4) process.stderr.write(`llama.cpp: ${text}`);
    }, koffi.pointer(proto));
    this.call('llama_log_set', onLog, null);
    this.#base.func('ggml_log_set', 'void', [p, p])(onLog, null);
  }

  call(name: string, ...values: unknown[]): unknown {
    return this.#functions.get(name)!(...values);
  }

  number(name: string, ...values: unknown[]): number {
    return Number(this.call(name, ...values));
  }

  pointer(name: string, ...values: unknown[]): Pointer {
    const value = this.call(name, ...values) as Pointer | null;
    if (!value) throw new Error(`llama.cpp oracle: ${name} returned nothing`);
    return value;
  }

  cpuRegistry(): { readonly device: Pointer; readonly registry: Pointer } {
    const device = this.#core.func('ggml_backend_dev_by_type', p, ['int'])(0) as Pointer;
    const registry = this.#base.func('ggml_backend_dev_backend_reg', p, [p])(device) as Pointer;
    return { device, registry };
  }

  cpuName(): string {
    const { device } = this.cpuRegistry();
    return this.#base.func('ggml_backend_dev_description', 'str', [p])(device) as string;
  }

  cpuFunction(name: keyof typeof threadPoolPrototypes): Foreign {
    const lookUp = this.#base.func('ggml_backend_reg_get_proc_address', p, [p, 'str']);
    const address = lookUp(this.cpuRegistry().registry, name) as Pointer | null;
    if (!address) throw new Error(`llama.cpp oracle: the CPU backend has no ${name}`);
    const [result, parameters] = threadPoolPrototypes[name];
    const proto = koffi.proto(result, [...parameters]);
    return (...values) => koffi.call(address, proto, ...values);
  }

  baseFunction(name: string, result: string, parameters: string[]): Foreign {
    return this.#base.func(name, result, parameters);
  }
}

let library: Library | undefined;
function load(): Library {
  library ??= new Library();
  return library;
}

export function libraryVersion(): string {
  return load().call('llama_version') as string;
}
/** The features that the chosen CPU variant was built with, as llama.cpp prints them. */
export function systemInfo(): string {
  return (load().call('llama_print_system_info') as string).trim();
}
export function cpuName(): string {
  return load().cpuName();
}

/** A persistent pool of ggml's, as llama-server and llama-bench make one: without it every graph starts its own threads. */
export class ThreadPool implements Disposable {
  readonly pointer: Pointer;

  constructor(threads: number) {
    // struct ggml_threadpool_params is about 540 bytes (a cpumask of 512); init writes it whole.
    const parameters = Buffer.alloc(1024);
    load().baseFunction('ggml_threadpool_params_init', 'void', [p, 'int'])(parameters, threads);
    this.pointer = load().cpuFunction('ggml_threadpool_new')(parameters) as Pointer;
  }

  [Symbol.dispose](): void {
    load().cpuFunction('ggml_threadpool_free')(this.pointer);
  }
}

export class LlamaModel implements Disposable {
  readonly pointer: Pointer;
  readonly vocabSize: number;
  readonly #vocab: Pointer;

  constructor(path: string) {
    const parameters = load().call('llama_model_default_params');
    this.pointer = load().pointer('llama_model_load_from_file', path, parameters);
    this.#vocab = load().pointer('llama_model_get_vocab', this.pointer);
    this.vocabSize = load().number('llama_vocab_n_tokens', this.#vocab);
  }

  /** e.g. `llama 256M Q4_1`. */
  description(): string {
    const text = Buffer.alloc(256);
    load().call('llama_model_desc', this.pointer, text, text.length);
    return text.toString('utf8', 0, text.indexOf(0));
  }

  /** The Jinja source that the file carries. */
  chatTemplate(): string {
    return load().call('llama_model_chat_template', this.pointer, null) as string;
  }

  isEnd(token: number): boolean {
    return load().call('llama_vocab_is_eog', this.#vocab, token) as boolean;
  }

  addsBos(): boolean {
    return load().call('llama_vocab_get_add_bos', this.#vocab) as boolean;
  }

  /** `parseSpecial`: text that spells a special token becomes it; a BOS token first when the model wants one. */
  tokenize(text: string, parseSpecial: boolean): number[] {
    const bytes = Buffer.from(text, 'utf8');
    const ids = new Int32Array(bytes.length + 8);
    const args = [bytes, bytes.length, ids, ids.length, true, parseSpecial];
    const count = load().number('llama_tokenize', this.#vocab, ...args);
    if (count < 0) throw new Error(`llama_tokenize: ${count}`);
    return [...ids.subarray(0, count)];
  }

  detokenize(ids: readonly number[]): string {
    const text = Buffer.alloc(64 + ids.length * 64);
    const args = [Int32Array.from(ids), ids.length, text, text.length, false, true];
    const count = load().number('llama_detokenize', this.#vocab, ...args);
    if (count < 0) throw new Error(`llama_detokenize: ${count}`);
    return text.toString('utf8', 0, count);
  }

  [Symbol.dispose](): void {
    load().call('llama_model_free', this.pointer);
  }
}

/** A GGUF LoRA file bound to a model. Freed before the model. */
export class LoraAdapter implements Disposable {
  readonly pointer: Pointer;

  constructor(model: LlamaModel, path: string) {
    this.pointer = load().pointer('llama_adapter_lora_init', model.pointer, path);
  }

  [Symbol.dispose](): void {
    load().call('llama_adapter_lora_free', this.pointer);
  }
}

export class LlamaContext implements Disposable {
  readonly options: ContextOptions;
  readonly #pointer: Pointer;
  readonly #pool: ThreadPool;
  readonly #ownsPool: boolean;
  readonly #memory: Pointer;
  readonly #vocabSize: number;
  readonly #batch: BatchMemory;

  constructor(model: LlamaModel, options: ContextOptions) {
    this.options = options;
    this.#pointer = openContext(model, options);
    this.#ownsPool = options.threadPool === undefined;
    this.#pool = options.threadPool ?? new ThreadPool(options.threads);
    const pool = this.#pool.pointer;
    load().call('llama_attach_threadpool', this.#pointer, pool, pool);
    this.#memory = load().pointer('llama_get_memory', this.#pointer);
    this.#vocabSize = model.vocabSize;
    this.#batch = new BatchMemory(options.batchTokens ?? 2048);
  }

  /** Runs the batch and adds it to the KV cache. Throws when there is no room for it. */
  decode(tokens: readonly BatchToken[]): void {
    const status = load().number('llama_decode', this.#pointer, this.#batch.fill(tokens));
    if (status !== 0) throw new Error(`llama_decode: status ${status} for ${tokens.length} tokens`);
  }

  /** Appends `tokens` to sequence 0 at `position`; the last one's logits are wanted. */
  append(tokens: readonly number[], position: number): Float32Array {
    const batchTokens = this.options.batchTokens ?? 2048;
    for (let from = 0; from < tokens.length; from += batchTokens) {
      const part = tokens.slice(from, from + batchTokens);
      this.decode(
        part.map((token, i) => ({
          token,
          position: position + from + i,
          sequence: 0,
          wantsLogits: from + i === tokens.length - 1,
        })),
      );
    }
    return this.logits(-1);
  }

  /** [V], valid until the next decode. `index` counts the batch's tokens; −1 is the last that wanted logits. */
  logits(index: number): Float32Array {
    const address = load().pointer('llama_get_logits_ith', this.#pointer, index);
    return new Float32Array(koffi.view(address, this.#vocabSize * 4));
  }

  /** The whole set of LoRA adapters that the following decodes apply, to every sequence in them. */
  setAdapters(settings: readonly AdapterSetting[]): void {
    const pointers = BigUint64Array.from(settings.map(({ adapter }) => adapter.pointer));
    const scales = Float32Array.from(settings.map(({ scale }) => scale));
    const args = [pointers, settings.length, scales];
    const status = load().number('llama_set_adapters_lora', this.#pointer, ...args);
    if (status !== 0) throw new Error(`llama_set_adapters_lora: status ${status}`);
  }

  clear(): void {
    load().call('llama_memory_clear', this.#memory, true);
  }

  removeSequence(sequence: number): void {
    load().call('llama_memory_seq_rm', this.#memory, sequence, -1, -1);
  }

  [Symbol.dispose](): void {
    load().call('llama_detach_threadpool', this.#pointer);
    load().call('llama_free', this.#pointer);
    if (this.#ownsPool) this.#pool[Symbol.dispose]();
    this.#batch[Symbol.dispose]();
  }
}

function openContext(model: LlamaModel, options: ContextOptions): Pointer {
  const parameters = load().call('llama_context_default_params') as { bytes: ArrayLike<number> };
  const bytes = Buffer.from(Uint8Array.from(parameters.bytes));
  for (const [offset, value] of contextDefaults) {
    if (bytes.readInt32LE(offset) !== value) {
      throw new Error(`llama.cpp oracle: context parameters are laid out otherwise at ${offset}`);
    }
  }
  const flash = { auto: -1, off: 0, on: 1 }[options.flashAttention ?? 'auto'];
  const kvType = { f32: 0, f16: 1 }[options.kvType ?? 'f16'];
  const wanted = {
    llama_n_batch: options.batchTokens ?? 2048,
    llama_n_ubatch: options.microBatchTokens ?? 512,
    llama_n_seq_max: options.sequencesMax ?? 1,
    llama_n_threads: options.threads,
  };
  bytes.writeInt32LE(options.contextTokens, contextField.contextTokens);
  bytes.writeInt32LE(wanted.llama_n_batch, contextField.batchTokens);
  bytes.writeInt32LE(wanted.llama_n_ubatch, contextField.microBatchTokens);
  bytes.writeInt32LE(wanted.llama_n_seq_max, contextField.sequencesMax);
  bytes.writeInt32LE(options.threads, contextField.threads);
  bytes.writeInt32LE(options.threads, contextField.threadsBatch);
  bytes.writeInt32LE(flash, contextField.flashAttention);
  bytes.writeInt32LE(kvType, contextField.typeK);
  bytes.writeInt32LE(kvType, contextField.typeV);
  bytes.writeUInt8(options.kvUnified === true ? 1 : 0, contextField.kvUnified);
  const context = load().pointer('llama_init_from_model', model.pointer, { bytes: [...bytes] });
  for (const [name, value] of Object.entries(wanted)) {
    const got = load().number(name, context);
    // llama.cpp caps n_batch and n_ubatch at n_ctx.
    if (got !== value && got !== options.contextTokens) {
      throw new Error(`llama.cpp oracle: ${name} is ${got}, want ${value}`);
    }
  }
  return context;
}

/** The arrays of one `struct llama_batch`, in native memory because seq_id is an array of pointers. */
class BatchMemory implements Disposable {
  readonly #size: number;
  readonly #memory: Pointer;
  readonly #words: Int32Array;
  readonly #flags: Uint8Array;

  /** Layout: token[n], pos[n], n_seq_id[n], sequence[n] as i32, then seq_id[n] pointers into sequence, then logits[n]. */
  constructor(size: number) {
    this.#size = size;
    const bytes = size * (4 * 4 + 8 + 1);
    this.#memory = koffi.alloc('uint8_t', bytes) as Pointer;
    const view = koffi.view(this.#memory, bytes);
    this.#words = new Int32Array(view, 0, size * 4);
    const pointers = new BigUint64Array(view, size * 16, size);
    for (let i = 0; i < size; i++) pointers[i] = this.#memory + BigInt((size * 3 + i) * 4);
    this.#flags = new Uint8Array(view, size * 24, size);
  }

  fill(tokens: readonly BatchToken[]): object {
    const size = this.#size;
    if (tokens.length < 1 || tokens.length > size) {
      throw new Error(`llama.cpp oracle: ${tokens.length} tokens in a batch of at most ${size}`);
    }
    tokens.forEach(({ token, position, sequence, wantsLogits }, i) => {
      this.#words[i] = token;
      this.#words[size + i] = position;
      this.#words[size * 2 + i] = 1;
      this.#words[size * 3 + i] = sequence;
      this.#flags[i] = wantsLogits ? 1 : 0;
    });
    const at = (bytes: number): Pointer => this.#memory + BigInt(bytes);
    return {
      n_tokens: tokens.length,
      token: at(0),
      embd: null,
      pos: at(size * 4),
      n_seq_id: at(size * 8),
      seq_id: at(size * 16),
      logits: at(size * 24),
    };
  }

  [Symbol.dispose](): void {
    koffi.free(this.#memory);
  }
}

/** Writes the same weights dequantised to f32 (llama_ftype 0): `struct llama_model_quantize_params` starts with the thread
 *  count and the file type, and `allow_requantize` is its first flag, in 0.4.0 at byte 16. */
export function writeF32Model(from: string, to: string, threads: number): void {
  const parameters = load().call('llama_model_quantize_default_params') as {
    bytes: ArrayLike<number>;
  };
  const bytes = Buffer.from(Uint8Array.from(parameters.bytes));
  bytes.writeInt32LE(threads, 0);
  bytes.writeInt32LE(0, 4);
  bytes.writeUInt8(1, 16);
  const status = load().number('llama_model_quantize', from, to, bytes);
  if (status !== 0) throw new Error(`llama_model_quantize: status ${status}`);
}

/** The best and second-best entry of a row of logits. The lower id wins a tie, as in ggml's and our arg max. */
export function topTwo(logits: Float32Array): {
  readonly best: number;
  readonly second: number;
  readonly gap: number;
} {
  let best = 0;
  let second = -1;
  for (let i = 1; i < logits.length; i++) {
    if (logits[i]! > logits[best]!) {
      second = best;
      best = i;
    } else if (second < 0 || logits[i]! > logits[second]!) {
      second = i;
    }
  }
  return { best, second, gap: logits[best]! - logits[second]! };
}

/** The `count` most probable tokens as [id, log-probability], by log-softmax in f64. */
export function topLogprobs(
  logits: Float32Array,
  count: number,
): Array<[id: number, logprob: number]> {
  let max = Number.NEGATIVE_INFINITY;
  for (const value of logits) if (value > max) max = value;
  let sum = 0;
  for (const value of logits) sum += Math.exp(value - max);
  const logSum = max + Math.log(sum);
  return [...logits.keys()]
    .sort((a, b) => logits[b]! - logits[a]! || a - b)
    .slice(0, count)
    .map((id) => [id, logits[id]! - logSum]);
}
