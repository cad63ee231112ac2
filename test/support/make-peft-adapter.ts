// Writes a PEFT LoRA of any rank for any base from a seed: the same bytes on every machine, so that a real-size adapter
// need not be committed for the oracle (test/oracle/peft-smollm2.py) and the test to mean the same one.
//
//   npx tsx test/support/make-peft-adapter.ts <directory>      (rank 16, alpha 32, seed 135, SmolLM2-135M)

import { mkdirSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { formatTensorName, targetName } from '../../src/adapters/peft-names.ts';
import type { PeftFiles } from '../../src/adapters/registry.ts';
import {
  type DecoderConfig,
  type Projection,
  projectionShape,
  projections,
} from '../../src/model/decoder-config.ts';
import { type SafetensorsTensor, writeSafetensors } from '../../src/model/safetensors.ts';
import { createRng } from './random.ts';

export type AdapterShape = Pick<
  DecoderConfig,
  'blocks' | 'width' | 'heads' | 'kvHeads' | 'headSize' | 'ffnWidth'
>;

export const smolShape: AdapterShape = {
  blocks: 30,
  width: 576,
  heads: 9,
  kvHeads: 3,
  headSize: 64,
  ffnWidth: 1536,
};

export interface PeftAdapterOptions {
  readonly shape: AdapterShape;
  readonly rank: number;
  readonly alpha: number;
  readonly seed: number;
  /** All seven by default. */
  readonly targets?: readonly Projection[];
  /** Size of B's numbers in the first rank. */
  readonly gain?: number;
  /** Rank i (0 first) has 0.85 of the one before it, or 1/sqrt(i + 1) of the first, a longer tail. */
  readonly fall?: 'geometric' | 'root';
}

export const smolAdapter: PeftAdapterOptions = { shape: smolShape, rank: 16, alpha: 32, seed: 135 };

/** The same options give the same bytes on every machine: only + - * / and sqrt, nothing that a machine may round its own way. */
export function makePeftAdapter(options: PeftAdapterOptions): PeftFiles {
  const { shape, rank, alpha, seed, targets = projections, gain: firstGain = 0.05 } = options;
  const isRoot = options.fall === 'root';
  const config = shape as DecoderConfig;
  const draw = bellDraws(seed);
  const tensors = new Map<string, SafetensorsTensor>();
  for (let block = 0; block < shape.blocks; block++) {
    for (const projection of targets) {
      const sizes = projectionShape(config, projection);
      const module = { block, projection };
      const a = Float32Array.from({ length: rank * sizes.in }, () => draw() / Math.sqrt(sizes.in));
      const b = new Float32Array(sizes.out * rank);
      for (let o = 0; o < sizes.out; o++) {
        // Falling by column, so that ranks differ in weight.
        for (let r = 0, gain = firstGain; r < rank; r++, gain *= 0.85)
          b[o * rank + r] = (isRoot ? firstGain / Math.sqrt(r + 1) : gain) * draw();
      }
      tensors.set(formatTensorName(module, 'A'), f32(a, [rank, sizes.in]));
      tensors.set(formatTensorName(module, 'B'), f32(b, [sizes.out, rank]));
    }
  }
  const fields = {
    peft_type: 'LORA',
    task_type: 'CAUSAL_LM',
    base_model_name_or_path: 'HuggingFaceTB/SmolLM2-135M-Instruct',
    r: rank,
    lora_alpha: alpha,
    target_modules: targets.map(targetName),
    bias: 'none',
  };
  return { config: JSON.stringify(fields, null, 2), weights: writeSafetensors(tensors) };
}

function f32(values: Float32Array, shape: readonly number[]): SafetensorsTensor {
  return { dtype: 'F32', shape, data: new Uint8Array(values.buffer) };
}

/** Sums of four uniform draws, variance 1: a bell without logarithms. */
function bellDraws(seed: number): () => number {
  const { next } = createRng(seed);
  return () => (next() + next() + next() + next() - 2) * Math.sqrt(3);
}

export function writePeftAdapter(directory: string, options: PeftAdapterOptions): void {
  mkdirSync(directory, { recursive: true });
  const { config, weights } = makePeftAdapter(options);
  writeFileSync(join(directory, 'adapter_config.json'), config);
  writeFileSync(join(directory, 'adapter_model.safetensors'), weights);
}

const [, script, directory] = process.argv;
if (script?.endsWith('make-peft-adapter.ts') === true && directory !== undefined) {
  writePeftAdapter(directory, smolAdapter);
}
