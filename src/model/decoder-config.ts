// What a decoder-only transformer of a supported family looks like: sizes only, no tensors. Read from GGUF metadata and
// checked against the tensor table, so that everything after this file may trust the numbers.

import { GatewayError } from '../errors.ts';
import type { GgufFile } from './gguf.ts';
import type { GgufMetadata } from './gguf-values.ts';
import { quoted } from './quoted.ts';

/** The seven linear layers of a block that an adapter may change, by their GGUF names. */
export const projections = [
  'attn_q',
  'attn_k',
  'attn_v',
  'attn_output',
  'ffn_gate',
  'ffn_up',
  'ffn_down',
] as const;
export type Projection = (typeof projections)[number];

/** Its place among all M = 7 · blocks modules, wherever a number or a row is given per module. */
export function moduleIndex(block: number, projection: Projection): number {
  return block * projections.length + projections.indexOf(projection);
}

export interface DecoderConfig {
  readonly family: 'llama';
  /** general.name of the file, or the file's label when it has none. */
  readonly name: string;
  readonly blocks: number; // L
  readonly width: number; // E
  readonly heads: number; // H
  readonly kvHeads: number; // Hkv
  readonly headSize: number; // D
  readonly ffnWidth: number; // F
  readonly vocabSize: number; // V
  readonly contextLength: number;
  /** Channels per head that RoPE rotates; ≤ headSize. */
  readonly ropeSize: number;
  readonly ropeBase: number;
  /** `norm`: adjacent pairs (llama files permute q and k for it); `neox`: pairs half a head apart. */
  readonly ropeStyle: 'norm' | 'neox';
  readonly normEps: number;
  readonly tiedEmbeddings: boolean;
}

/** Sizes of a projection's weight: `y[T,out] = x[T,in] · w[out,in]ᵀ`. */
export function projectionShape(
  config: DecoderConfig,
  projection: Projection,
): { readonly in: number; readonly out: number } {
  const { width, heads, kvHeads, headSize, ffnWidth } = config;
  switch (projection) {
    case 'attn_q':
      return { in: width, out: heads * headSize };
    case 'attn_k':
    case 'attn_v':
      return { in: width, out: kvHeads * headSize };
    case 'attn_output':
      return { in: heads * headSize, out: width };
    case 'ffn_gate':
    case 'ffn_up':
      return { in: width, out: ffnWidth };
    case 'ffn_down':
      return { in: ffnWidth, out: width };
  }
}

/** Bounds on sizes: far above any model that one machine runs, far below where products leave safe integers. */
const sizesMax = {
  blocks: 1024,
  width: 65_536,
  heads: 1024,
  ffnWidth: 1_048_576,
  vocab: 2_097_152,
  context: 16_777_216,
};

/** Throws UNSUPPORTED for another architecture or a feature that is not implemented (naming it), INVALID_MODEL_FILE for
 *  numbers that make no sense and for tensors that are missing or misshapen. */
export function readDecoderConfig(file: Pick<GgufFile, 'metadata' | 'tensors'>): DecoderConfig {
  const { metadata } = file;
  const architecture = metadata.string('general.architecture');
  if (architecture !== 'llama')
    throw unsupported(`the architecture ${quoted(architecture)} (llama is)`);
  refuseVariants(file);
  const read = numberReader(metadata);
  const width = read('embedding_length', sizesMax.width);
  const heads = read('attention.head_count', sizesMax.heads);
  const kvHeads = read('attention.head_count_kv', sizesMax.heads, heads);
  if (width % heads !== 0) throw badModel(`width ${width} is not a multiple of ${heads} heads`);
  if (heads % kvHeads !== 0)
    throw badModel(`${heads} heads are not a multiple of ${kvHeads} key heads`);
  const headSize = width / heads;
  for (const key of ['attention.key_length', 'attention.value_length']) {
    const length = read(key, sizesMax.width, headSize);
    if (length !== headSize)
      throw unsupported(`${key} ${length} beside a head size of ${headSize}`);
  }
  const ropeSize = read('rope.dimension_count', headSize, headSize);
  if (ropeSize % 2 !== 0) throw badModel(`rope.dimension_count ${ropeSize} is odd`);
  const config: DecoderConfig = {
    family: 'llama',
    name: metadata.has('general.name') ? metadata.string('general.name') : 'llama',
    blocks: read('block_count', sizesMax.blocks),
    width,
    heads,
    kvHeads,
    headSize,
    ffnWidth: read('feed_forward_length', sizesMax.ffnWidth),
    vocabSize: vocabularySize(file),
    contextLength: read('context_length', sizesMax.context),
    ropeSize,
    ropeBase: read('rope.freq_base', 1e12, 10_000, 'number'),
    ropeStyle: 'norm',
    normEps: read('attention.layer_norm_rms_epsilon', 1, undefined, 'number'),
    tiedEmbeddings: !file.tensors.has('output.weight'),
  };
  checkTensors(file, config);
  return config;
}

function unsupported(what: string): GatewayError {
  return new GatewayError('UNSUPPORTED', `model file: ${what} is not supported`);
}

function badModel(message: string): GatewayError {
  return new GatewayError('INVALID_MODEL_FILE', `model file: ${message}`);
}

/** Features of llama files that change the forward pass and that decoder.ts does not have. */
function refuseVariants({ metadata, tensors }: Pick<GgufFile, 'metadata' | 'tensors'>): void {
  const experts = 'llama.expert_count';
  if (metadata.has(experts) && metadata.integer(experts) > 0)
    throw unsupported('a mixture of experts');
  if (metadata.has('split.count') && metadata.integer('split.count') > 1)
    throw unsupported('a model in several files (split.count)');
  if (tensors.has('rope_freqs.weight'))
    throw unsupported('RoPE frequency factors (rope_freqs.weight)');
  const scaling = 'llama.rope.scaling.type';
  if (metadata.has(scaling)) {
    const type = metadata.string(scaling);
    if (type !== 'none') throw unsupported(`RoPE scaling ${quoted(type)}`);
    return;
  }
  // Without a type llama.cpp scales linearly by either of these; older files have only the second.
  for (const key of ['llama.rope.scaling.factor', 'llama.rope.scale_linear']) {
    if (!metadata.has(key)) continue;
    const factor = metadata.number(key);
    if (factor !== 0 && factor !== 1) throw unsupported(`RoPE scaling by ${factor} (${key})`);
  }
}

/** Reads numbers of this family within bounds: more than 0, and whole unless told otherwise. */
function numberReader(
  metadata: GgufMetadata,
): (key: string, max: number, whenAbsent?: number, kind?: 'integer' | 'number') => number {
  return (key, max, whenAbsent, kind = 'integer') => {
    const name = `llama.${key}`;
    if (whenAbsent !== undefined && !metadata.has(name)) return whenAbsent;
    const value = metadata[kind](name);
    if (value > 0 && value <= max) return value;
    throw badModel(`${name} is ${value}, more than 0 and at most ${max} is accepted`);
  };
}

function vocabularySize({ tensors }: Pick<GgufFile, 'tensors'>): number {
  const size = tensors.get('token_embd.weight')?.shape[1];
  if (size === undefined || size < 1 || size > sizesMax.vocab) {
    throw badModel(`token_embd.weight must be there with 1 to ${sizesMax.vocab} rows`);
  }
  return size;
}

/** Every tensor of the decoder with its shape as the file states it, innermost axis first. */
export function expectedTensors(config: DecoderConfig): Map<string, readonly number[]> {
  const { width, vocabSize } = config;
  const expected = new Map<string, readonly number[]>([
    ['token_embd.weight', [width, vocabSize]],
    ['output_norm.weight', [width]],
  ]);
  if (!config.tiedEmbeddings) expected.set('output.weight', [width, vocabSize]);
  for (let block = 0; block < config.blocks; block++) {
    expected.set(`blk.${block}.attn_norm.weight`, [width]);
    expected.set(`blk.${block}.ffn_norm.weight`, [width]);
    for (const projection of projections) {
      const shape = projectionShape(config, projection);
      expected.set(`blk.${block}.${projection}.weight`, [shape.in, shape.out]);
    }
  }
  return expected;
}

function checkTensors({ tensors }: Pick<GgufFile, 'tensors'>, config: DecoderConfig): void {
  const expected = expectedTensors(config);
  for (const [name, wanted] of expected) {
    const shape = tensors.get(name)?.shape;
    if (shape === undefined) throw badModel(`there is no tensor ${name}`);
    // Trailing axes of size 1 mean nothing in GGUF.
    const axes = Math.max(wanted.length, shape.findLastIndex((size) => size !== 1) + 1);
    const got = shape.slice(0, axes);
    if (got.length !== wanted.length || got.some((size, i) => size !== wanted[i])) {
      throw badModel(`${name} is ${shape.join('×')}, want ${wanted.join('×')}`);
    }
  }
  // A bias or a norm that is there and not used would be an answer that is quietly not the model's.
  for (const name of tensors.keys()) {
    if (!expected.has(name))
      throw unsupported(`a tensor that the decoder has no use for, ${quoted(name)},`);
  }
}
