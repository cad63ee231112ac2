// One block of a llama-like decoder, written once: serving and training differ in how a projection is made and in what
// attention looks at, which `parts` says.

import type { ForwardOps, StoredTensor, Tensor } from '../kernels/kernels.ts';
import type { DecoderConfig, Projection } from './decoder-config.ts';

export interface BlockInputs {
  readonly config: DecoderConfig;
  readonly norms: Readonly<Record<'attn_norm' | 'ffn_norm', StoredTensor>>; // each [E]
  readonly positions: Tensor; // [T]
}

export interface BlockParts {
  /** Projections that share an input: x [T,in] → each [T,out]. */
  project(x: Tensor, names: readonly Projection[]): Tensor[];
  /** q [T,H,D] and k [T,Hkv,D], both rotated, v [T,Hkv·D] → [T,H·D]. */
  attend(q: Tensor, k: Tensor, v: Tensor): Tensor;
}

/** x [T,E] → [T,E]. */
export function decoderBlock(
  ops: ForwardOps,
  { config, norms, positions }: BlockInputs,
  x: Tensor,
  parts: BlockParts,
): Tensor {
  const { heads, kvHeads, headSize, normEps } = config;
  const rows = x.shape[0]!;
  const rope = { size: config.ropeSize, base: config.ropeBase, style: config.ropeStyle };
  const h = ops.rmsNorm(x, norms.attn_norm, normEps); // [T, E]
  const [q, k, v] = parts.project(h, ['attn_q', 'attn_k', 'attn_v']) as [Tensor, Tensor, Tensor];
  const qRope = ops.rope(ops.reshape(q, [rows, heads, headSize]), positions, rope); // [T, H, D]
  const kRope = ops.rope(ops.reshape(k, [rows, kvHeads, headSize]), positions, rope); // [T, Hkv, D]
  const attended = parts.attend(qRope, kRope, v); // [T, H·D]
  const y = ops.add(x, parts.project(attended, ['attn_output'])[0]!); // [T, E]

  const g = ops.rmsNorm(y, norms.ffn_norm, normEps); // [T, E]
  const [gate, up] = parts.project(g, ['ffn_gate', 'ffn_up']) as [Tensor, Tensor]; // [T, F]
  return ops.add(y, parts.project(ops.swiglu(gate, up), ['ffn_down'])[0]!); // [T, E]
}
