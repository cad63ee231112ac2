// PEFT's tensor names and row order ↔ ours. `base_model.model.model.layers.3.self_attn.q_proj.lora_A.weight` is the A of
// blk.3.attn_q; llama files in GGUF keep the rows of q and k in pairs for RoPE, so the rows of their B move too.

import type { DecoderConfig, Projection } from '../model/decoder-config.ts';
import type { ModuleRef } from '../model/stepper.ts';

const peftNames: Readonly<Record<Projection, string>> = {
  attn_q: 'self_attn.q_proj',
  attn_k: 'self_attn.k_proj',
  attn_v: 'self_attn.v_proj',
  attn_output: 'self_attn.o_proj',
  ffn_gate: 'mlp.gate_proj',
  ffn_up: 'mlp.up_proj',
  ffn_down: 'mlp.down_proj',
};

const projectionOf: ReadonlyMap<string, Projection> = new Map(
  Object.entries(peftNames).map(([projection, name]) => [name, projection as Projection]),
);

export type Factor = 'A' | 'B';

const tensorName =
  /^(?:base_model\.model\.)?(?:model\.)?layers\.(0|[1-9]\d{0,3})\.([a-z_.]{1,40})\.lora_([AB])(?:\.default)?\.weight$/;

/** null when the name is of no projection that an adapter may change. */
export function parseTensorName(name: string): (ModuleRef & { readonly factor: Factor }) | null {
  const found = tensorName.exec(name);
  const projection = projectionOf.get(found?.[2] ?? '');
  if (found === null || projection === undefined) return null;
  return { block: Number(found[1]), projection, factor: found[3] as Factor };
}

/** The module's name inside the base, which the patterns of adapter_config.json are matched against. */
export function moduleName({ block, projection }: ModuleRef): string {
  return `model.layers.${block}.${peftNames[projection]}`;
}

export function formatTensorName(module: ModuleRef, factor: Factor): string {
  return `base_model.model.${moduleName(module)}.lora_${factor}.weight`;
}

/** `q_proj` of attn_q. */
export function targetName(projection: Projection): string {
  return peftNames[projection].split('.')[1]!;
}

/** order[i] is PEFT's row for our row i, or null where the rows stay. Per head, [2, D/2] becomes [D/2, 2]: each channel
 *  beside its partner (llama.cpp, convert_hf_to_gguf.py, LlamaModel.permute). */
export function peftRowOrder(config: DecoderConfig, projection: Projection): Int32Array | null {
  if (config.ropeStyle !== 'norm') return null;
  if (projection !== 'attn_q' && projection !== 'attn_k') return null;
  const heads = projection === 'attn_q' ? config.heads : config.kvHeads;
  const { headSize } = config;
  return Int32Array.from({ length: heads * headSize }, (_, row) => {
    const head = Math.floor(row / headSize);
    const channel = row % headSize;
    return head * headSize + (channel % 2) * (headSize / 2) + Math.floor(channel / 2);
  });
}
