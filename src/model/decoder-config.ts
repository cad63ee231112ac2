// What a decoder-only transformer of a supported family looks like: sizes only, no tensors. Read from GGUF metadata by
// readDecoderConfig; a family is one entry of the table there.

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
