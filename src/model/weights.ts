// A GGUF file's tensors → stored weights in one of the weight modes (design.md section 4). The file is read tensor by
// tensor, never whole.
//
//   parity    the file's own types: ggml's quantised kernels round activations to int8, as llama.cpp's do
//   faithful  what the file's weights say with activations in f32 or bf16: quantised types are re-encoded to bf16
//             (measured KL to f32 and what it costs: docs/benchmarks.md), the others stay as they are
//   exact     everything in f32: the reference that the others are measured against; for tests and `bench fidelity`

import { GatewayError } from '../errors.ts';
import { dequantizeRows, dequantizeToBf16 } from '../kernels/dequantize.ts';
import {
  dtypeLayout,
  type Kernels,
  type StoredTensor,
  type WeightType,
} from '../kernels/kernels.ts';
import type { BlockWeights, DecoderWeights } from './decoder.ts';
import { type DecoderConfig, projections } from './decoder-config.ts';
import type { GgufFile, GgufTensor } from './gguf.ts';

export type WeightMode = 'parity' | 'faithful' | 'exact';

/** Rows are converted in pieces of about this size, so that loading needs little memory beside the weights. */
const pieceBytesMax = 8 * 1024 * 1024;

function storedType(type: WeightType, mode: WeightMode): WeightType {
  const quantised = dtypeLayout[type].block > 1;
  if (mode === 'exact') return 'f32';
  return mode === 'faithful' && quantised ? 'bf16' : type;
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

/** Stores one tensor, converting row by row. A vector (norm) is always f32. */
function loadTensor(
  file: GgufFile,
  name: string,
  { kernels, mode }: { readonly kernels: Kernels; readonly mode: WeightMode },
): StoredTensor {
  const tensor = file.tensors.get(name);
  if (tensor === undefined) {
    throw new GatewayError('INVALID_MODEL_FILE', `the model file has no tensor ${name}`);
  }
  const from = weightType(tensor);
  const shape = [...tensor.shape].reverse();
  const into = shape.length === 1 ? 'f32' : storedType(from, mode);
  const stored = kernels.store(into, shape);
  const rowLength = tensor.shape[0]!;
  const rows = stored.shape.length === 1 ? 1 : shape[0]!;
  const rowBytes = tensor.bytes / rows;
  const rowsPerPiece = Math.max(1, Math.floor(pieceBytesMax / (rowLength * 4)));
  const outBytes = stored.bytes / rows;
  for (let row = 0; row < rows; row += rowsPerPiece) {
    const count = Math.min(rowsPerPiece, rows - row);
    const bytes = file.read(tensor.offset + row * rowBytes, count * rowBytes);
    kernels.write(stored, convert(bytes, from, into, count * rowLength), row * outBytes);
  }
  return stored;
}

function convert(bytes: Uint8Array, from: WeightType, into: WeightType, count: number): Uint8Array {
  if (from === into) return bytes;
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
  options: { readonly kernels: Kernels; readonly mode: WeightMode },
): DecoderWeights {
  const load = (name: string): StoredTensor => loadTensor(file, name, options);
  const tokenEmbedding = load('token_embd.weight');
  const blocks = Array.from({ length: config.blocks }, (_, i): BlockWeights => {
    const names = [...projections, 'attn_norm', 'ffn_norm'] as const;
    const entries = names.map((name) => [name, load(`blk.${i}.${name}.weight`)]);
    return Object.fromEntries(entries) as BlockWeights;
  });
  return {
    tokenEmbedding,
    blocks,
    outputNorm: load('output_norm.weight'),
    output: config.tiedEmbeddings ? tokenEmbedding : load('output.weight'),
  };
}
