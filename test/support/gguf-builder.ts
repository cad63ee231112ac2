// Writes GGUF files for tests, right or wrong as asked. Lengths and counts are bigint where a test lies about them.

type Value =
  | {
      readonly type: 'u8' | 'i8' | 'bool' | 'u16' | 'i16' | 'u32' | 'i32' | 'f32';
      readonly value: number;
    }
  | { readonly type: 'u64' | 'i64'; readonly value: bigint }
  | { readonly type: 'f64'; readonly value: number }
  | { readonly type: 'string'; readonly value: string | Uint8Array }
  | {
      readonly type: 'array';
      readonly of: Exclude<ValueType, 'array'>;
      readonly values: readonly unknown[];
    }
  | { readonly type: 'raw'; readonly bytes: Uint8Array };
type ValueType =
  | 'u8'
  | 'i8'
  | 'u16'
  | 'i16'
  | 'u32'
  | 'i32'
  | 'f32'
  | 'bool'
  | 'string'
  | 'array'
  | 'u64'
  | 'i64'
  | 'f64';

const valueNumbers: Readonly<Record<ValueType, number>> = {
  u8: 0,
  i8: 1,
  u16: 2,
  i16: 3,
  u32: 4,
  i32: 5,
  f32: 6,
  bool: 7,
  string: 8,
  array: 9,
  u64: 10,
  i64: 11,
  f64: 12,
};

export interface TensorSpec {
  readonly name: string;
  /** Innermost axis first. */
  readonly shape: readonly (number | bigint)[];
  /** GGUF type number; 0 is F32. */
  readonly type: number;
  readonly data: Uint8Array;
  readonly offset?: bigint;
  readonly axes?: number;
}

export interface GgufSpec {
  readonly magic?: string;
  readonly version?: number;
  readonly keyCount?: bigint;
  readonly tensorCount?: bigint;
  readonly keys?: readonly (readonly [key: string, value: Value])[];
  readonly tensors?: readonly TensorSpec[];
  /** What the writer pads to, whatever the metadata says. */
  readonly padding?: number;
  /** Bytes to leave out at the end. */
  readonly cut?: number;
}

/** Little-endian bytes, appended one after the other. */
export class ByteWriter {
  readonly #parts: Uint8Array[] = [];
  bytes = 0;

  raw(bytes: Uint8Array): this {
    this.#parts.push(bytes);
    this.bytes += bytes.length;
    return this;
  }

  #number(size: number, write: (view: DataView) => void): this {
    const bytes = new Uint8Array(size);
    write(new DataView(bytes.buffer));
    return this.raw(bytes);
  }

  u32(value: number): this {
    return this.#number(4, (view) => view.setUint32(0, value, true));
  }

  u64(value: bigint): this {
    return this.#number(8, (view) => view.setBigUint64(0, BigInt.asUintN(64, value), true));
  }

  string(text: string | Uint8Array, length?: bigint): this {
    const bytes = typeof text === 'string' ? new TextEncoder().encode(text) : text;
    return this.u64(length ?? BigInt(bytes.length)).raw(bytes);
  }

  scalar(type: Exclude<ValueType, 'array'>, value: unknown): this {
    if (type === 'string') return this.string(value as string);
    if (type === 'u64' || type === 'i64') return this.u64(value as bigint);
    const size = { u8: 1, i8: 1, bool: 1, u16: 2, i16: 2, u32: 4, i32: 4, f32: 4, f64: 8 }[type];
    return this.#number(size, (view) => {
      if (type === 'f32') view.setFloat32(0, value as number, true);
      else if (type === 'f64') view.setFloat64(0, value as number, true);
      else if (size === 1) view.setUint8(0, value as number);
      else if (size === 2) view.setUint16(0, value as number, true);
      else view.setUint32(0, value as number, true);
    });
  }

  padTo(alignment: number): this {
    return this.raw(new Uint8Array((alignment - (this.bytes % alignment)) % alignment));
  }

  finish(): Uint8Array {
    const all = new Uint8Array(this.bytes);
    let at = 0;
    for (const part of this.#parts) {
      all.set(part, at);
      at += part.length;
    }
    return all;
  }
}

export function buildGguf(spec: GgufSpec): Uint8Array {
  const { keys = [], tensors = [], padding = 32 } = spec;
  const out = new ByteWriter();
  out.raw(new TextEncoder().encode(spec.magic ?? 'GGUF')).u32(spec.version ?? 3);
  out.u64(spec.tensorCount ?? BigInt(tensors.length)).u64(spec.keyCount ?? BigInt(keys.length));
  for (const [key, value] of keys) writeValue(out.string(key), value);
  let offset = 0;
  for (const tensor of tensors) {
    out.string(tensor.name).u32(tensor.axes ?? tensor.shape.length);
    for (const size of tensor.shape) out.u64(BigInt(size));
    out.u32(tensor.type).u64(tensor.offset ?? BigInt(offset));
    offset += Math.ceil(tensor.data.length / padding) * padding;
  }
  out.padTo(padding);
  for (const tensor of tensors) out.raw(tensor.data).padTo(padding);
  const bytes = out.finish();
  return bytes.subarray(0, bytes.length - (spec.cut ?? 0));
}

function writeValue(out: ByteWriter, value: Value): void {
  if (value.type === 'raw') {
    out.raw(value.bytes);
    return;
  }
  out.u32(valueNumbers[value.type]);
  if (value.type === 'array') {
    out.u32(valueNumbers[value.of]).u64(BigInt(value.values.length));
    for (const one of value.values) out.scalar(value.of, one);
    return;
  }
  out.scalar(value.type, value.value);
}

/** A whole model of the llama family with weights of zero: small, and every check of the decoder passes. */
export function buildTinyLlama(change: Partial<LlamaSpec> = {}): Uint8Array {
  const spec: LlamaSpec = { keys: {}, shapes: {}, ...change };
  const [width, vocab, heads, kvHeads, ffn] = [8, 16, 2, 1, 12];
  const keys: Record<string, Value | null> = {
    'general.architecture': { type: 'string', value: 'llama' },
    'general.name': { type: 'string', value: 'tiny' },
    'llama.block_count': { type: 'u32', value: 1 },
    'llama.context_length': { type: 'u32', value: 64 },
    'llama.embedding_length': { type: 'u32', value: width },
    'llama.feed_forward_length': { type: 'u32', value: ffn },
    'llama.attention.head_count': { type: 'u32', value: heads },
    'llama.attention.head_count_kv': { type: 'u32', value: kvHeads },
    'llama.attention.layer_norm_rms_epsilon': { type: 'f32', value: 1e-5 },
    'llama.rope.dimension_count': { type: 'u32', value: 4 },
    'llama.rope.freq_base': { type: 'f32', value: 10_000 },
    ...spec.keys,
  };
  const shapes: Record<string, readonly number[] | null> = {
    'token_embd.weight': [width, vocab],
    'output_norm.weight': [width],
    'blk.0.attn_norm.weight': [width],
    'blk.0.ffn_norm.weight': [width],
    'blk.0.attn_q.weight': [width, width],
    'blk.0.attn_k.weight': [width, 4],
    'blk.0.attn_v.weight': [width, 4],
    'blk.0.attn_output.weight': [width, width],
    'blk.0.ffn_gate.weight': [width, ffn],
    'blk.0.ffn_up.weight': [width, ffn],
    'blk.0.ffn_down.weight': [ffn, width],
    ...spec.shapes,
  };
  return buildGguf({
    keys: Object.entries(keys).flatMap(([key, value]) =>
      value === null ? [] : [[key, value] as const],
    ),
    tensors: Object.entries(shapes).flatMap(([name, shape]) =>
      shape === null ? [] : [{ name, shape, type: 0, data: zeros(shape) }],
    ),
  });
}

/** null leaves a key or tensor out. */
export interface LlamaSpec {
  readonly keys: Readonly<Record<string, Value | null>>;
  readonly shapes: Readonly<Record<string, readonly number[] | null>>;
}

function zeros(shape: readonly number[]): Uint8Array {
  return new Uint8Array(4 * shape.reduce((product, size) => product * size, 1));
}
