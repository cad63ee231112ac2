// PEFT LoRA directories with seeded random weights, strong enough that another adapter or rank gives other tokens.

import { mkdirSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import {
  type DecoderConfig,
  type Projection,
  projectionShape,
} from '../../src/model/decoder-config.ts';
import { type SafetensorsTensor, writeSafetensors } from '../../src/model/safetensors.ts';
import { createRng, normals } from './random.ts';

const peftNames: Readonly<Record<Projection, string>> = {
  attn_q: 'self_attn.q_proj',
  attn_k: 'self_attn.k_proj',
  attn_v: 'self_attn.v_proj',
  attn_output: 'self_attn.o_proj',
  ffn_gate: 'mlp.gate_proj',
  ffn_up: 'mlp.up_proj',
  ffn_down: 'mlp.down_proj',
};

export interface RandomPeftOptions {
  readonly seed: number;
  readonly rank: number;
  readonly targets: readonly Projection[];
  /** Standard deviation of B's numbers; A's is 1/√in. */
  readonly strength: number;
}

/** Writes `directory/adapter_config.json` and `adapter_model.safetensors`; the same options give the same bytes. */
export function writeRandomPeft(
  directory: string,
  config: DecoderConfig,
  { seed, rank, targets, strength }: RandomPeftOptions,
): string {
  const rng = createRng(seed);
  const tensors = new Map<string, SafetensorsTensor>();
  for (let block = 0; block < config.blocks; block++) {
    for (const target of targets) {
      const shape = projectionShape(config, target);
      const prefix = `base_model.model.model.layers.${block}.${peftNames[target]}`;
      const a = normals(rng, rank * shape.in, 1 / Math.sqrt(shape.in));
      // A falling spectrum, as trained adapters have: the first ranks matter most.
      const b = normals(rng, shape.out * rank, strength).map(
        (value, i) => value * 0.7 ** (i % rank),
      );
      tensors.set(`${prefix}.lora_A.weight`, f32([rank, shape.in], a));
      tensors.set(`${prefix}.lora_B.weight`, f32([shape.out, rank], b));
    }
  }
  mkdirSync(directory, { recursive: true });
  writeFileSync(join(directory, 'adapter_model.safetensors'), writeSafetensors(tensors));
  const fields = {
    peft_type: 'LORA',
    r: rank,
    lora_alpha: rank,
    target_modules: targets.map((target) => peftNames[target].split('.')[1]),
    bias: 'none',
    base_model_name_or_path: null,
  };
  writeFileSync(join(directory, 'adapter_config.json'), JSON.stringify(fields));
  return directory;
}

function f32(shape: number[], values: Float32Array): SafetensorsTensor {
  return { dtype: 'F32', shape, data: new Uint8Array(values.buffer) };
}
