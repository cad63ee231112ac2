// A GGUF file's tensors → stored weights in one of the weight modes (design.md section 4). The file is read tensor by
// tensor, never whole.
//
//   parity    the file's own types: ggml's quantised kernels round activations to int8, as llama.cpp's do
//   faithful  what the file's weights say: activations in f32 or in 16 bits a block by our own kernels, whichever is
//             faster here; without those, quantised types are re-encoded to bf16 and the others stay as they are
//   fast      the fastest way below a divergence of 0.01 from exact: activations in 8 bits by our own kernels or ggml's
//   exact     everything in f32: the reference that the others are measured against; for tests and `bench fidelity`

import { GatewayError } from '../errors.ts';
import { elementCount } from '../kernels/check.ts';
import { dequantizeRows, dequantizeToBf16 } from '../kernels/dequantize.ts';
import {
  dtypeLayout,
  type Kernels,
  type LinearWay,
  type StoredTensor,
  type WeightType,
} from '../kernels/kernels.ts';
import type { BlockWeights, DecoderWeights } from './decoder.ts';
import { type DecoderConfig, projections } from './decoder-config.ts';
import type { GgufFile, GgufTensor } from './gguf.ts';
import type { WeightCache } from './weight-cache.ts';

export type WeightMode = 'parity' | 'faithful' | 'fast' | 'exact';

/** Ways within each mode's bound on divergence (`bench fidelity`): the fastest one is for weight-choice.ts to find. */
export const waysOf: Readonly<Record<WeightMode, readonly LinearWay[]>> = {
  parity: [],
  faithful: ['f32', 'int16'],
  fast: ['int8', 'f32', 'library'],
  exact: [],
};

function storedType(
  type: WeightType,
  { mode, kernels: { f32Activations } }: LoadOptions,
): WeightType {
  const quantised = dtypeLayout[type].block > 1;
  if (mode === 'exact') return 'f32';
  return mode === 'faithful' && quantised && !f32Activations ? 'bf16' : type;
}

/** Types of the tensors that are multiplied. */
export function weightTypes(file: GgufFile): WeightType[] {
  const matrices = [...file.tensors.values()].filter(({ shape }) => (shape[1] ?? 1) > 1);
  return [...new Set(matrices.map(weightType))];
}

function weightType(tensor: GgufTensor): WeightType {
  const name = tensor.type.toLowerCase();
  if (!(name in dtypeLayout) || name.startsWith('i')) {
    throw new GatewayError(
      'UNSUPPORTED',
      `${tensor.name}: weights of type ${tensor.type} are not supported`,
    );
  }
  return name as WeightType;
}

export interface LoadOptions {
  readonly kernels: Kernels;
  readonly mode: WeightMode;
  /** Where converted tensors are kept between starts; null: convert them every time. */
  readonly cache: WeightCache | null;
  /** How weights of each type are multiplied; left to the kernels where there is none. */
  readonly ways?: Readonly<Partial<Record<WeightType, LinearWay>>>;
}

/** Stores one tensor. A vector (norm) is always f32. */
function loadTensor(file: GgufFile, name: string, options: LoadOptions): StoredTensor {
  const tensor = file.tensors.get(name);
  if (tensor === undefined) {
    throw new GatewayError('INVALID_MODEL_FILE', `the model file has no tensor ${name}`);
  }
  const from = weightType(tensor);
  const isVector = tensor.shape.slice(1).every((size) => size === 1);
  const shape = isVector ? [tensor.shape[0]!] : [tensor.shape[1]!, tensor.shape[0]!];
  const into = isVector ? 'f32' : storedType(from, options);
  const way = isVector ? undefined : options.ways?.[into];
  const { kernels } = options;
  const stored = (way && kernels.storeWeight?.(into, shape, way)) ?? kernels.store(into, shape);
  // Only conversions to bf16 are kept: the others are as fast to repeat, or are for tests.
  const cache = from !== into && into === 'bf16' ? options.cache : null;
  const kept = cache?.get(name, stored.bytes) ?? null;
  if (kept !== null) {
    options.kernels.write(stored, kept, 0);
    return stored;
  }
  const converted = convert(file.read(tensor.offset, tensor.bytes), from, into, stored);
  options.kernels.write(stored, converted, 0);
  cache?.put(name, converted);
  return stored;
}

function convert(
  bytes: Uint8Array,
  from: WeightType,
  into: WeightType,
  stored: StoredTensor,
): Uint8Array {
  if (from === into) return bytes;
  const count = elementCount(stored.shape);
  if (into === 'bf16') {
    const bits = new Uint16Array(count);
    dequantizeToBf16(from, bytes, bits);
    return new Uint8Array(bits.buffer);
  }
  const values = new Float32Array(count);
  dequantizeRows(from, bytes, values);
  return new Uint8Array(values.buffer);
}

/** Loads every weight of the decoder; `config` must be of this very file (readDecoderConfig has checked the shapes). */
export function loadWeights(
  file: GgufFile,
  config: DecoderConfig,
  options: LoadOptions,
): DecoderWeights {
  const load = (name: string): StoredTensor => loadTensor(file, name, options);
  const tokenEmbedding = load('token_embd.weight');
  const blocks = Array.from({ length: config.blocks }, (_, i): BlockWeights => {
    const names = [...projections, 'attn_norm', 'ffn_norm'] as const;
    const entries = names.map((name) => [name, load(`blk.${i}.${name}.weight`)]);
    return Object.fromEntries(entries) as BlockWeights;
  });
  const outputNorm = load('output_norm.weight');
  const output = config.tiedEmbeddings ? tokenEmbedding : load('output.weight');
  options.cache?.finish();
  return { tokenEmbedding, blocks, outputNorm, output };
}
