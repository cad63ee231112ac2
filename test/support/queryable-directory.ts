// Directories of queryable adapters for the tiny base, of seeded numbers: the same options give the same bytes.

import { mkdirSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { projectionShape } from '../../src/model/decoder-config.ts';
import { type SafetensorsTensor, writeSafetensors } from '../../src/model/safetensors.ts';
import type { ModuleRef } from '../../src/model/stepper.ts';
import { createRng, normals } from './random.ts';
import { tinyBase } from './tiny-base.ts';

export const queryableRank = 4;
export const queryWidth = 6;
export const queryableModules: readonly ModuleRef[] = [
  { block: 0, projection: 'attn_q' },
  { block: 0, projection: 'ffn_up' },
  { block: 1, projection: 'attn_q' },
];

export interface DirectoryOptions {
  readonly seed: number;
  readonly labels: readonly string[];
  /** A bank of so many atoms from its own seed; else the named one, with `more` atoms for its end. */
  readonly bank: { readonly atoms: number; readonly seed: number } | string;
  readonly more?: number;
  readonly alpha?: number;
  readonly blockLayers?: number;
  /** Of B: large enough to be seen in a short answer. */
  readonly gain?: number;
}

type Tensors = Map<string, SafetensorsTensor>;

export function queryableTensors(options: DirectoryOptions): Tensors {
  const { seed, labels, bank, more = 0, gain = 0.3 } = options;
  const tensors: Tensors = new Map();
  const put = (draws: number, name: string, size: number, ...shape: number[]): void => {
    const count = shape.reduce((product, length) => product * length, 1);
    const values = normals(createRng(draws + 97 * tensors.size), count, size);
    tensors.set(name, { dtype: 'F32', shape, data: new Uint8Array(values.buffer) });
  };
  const r = queryableRank;
  if (typeof bank !== 'string') {
    put(bank.seed, 'bank.atoms', 1, bank.atoms, r, r);
    put(bank.seed, 'bank.query', 1, queryWidth, r);
    put(bank.seed, 'bank.summary', 0.5, r, r);
    put(bank.seed, 'bank.context', 0.5, queryWidth, r);
  } else if (more > 0) {
    put(seed, 'bank.atoms', 1, more, r, r);
  }
  put(seed, 'keys', 1, labels.length, queryWidth);
  for (const { block, projection } of queryableModules) {
    const sizes = projectionShape(tinyBase.config, projection);
    put(seed, `blk.${block}.${projection}.a`, 0.2, r, sizes.in);
    put(seed, `blk.${block}.${projection}.b`, gain, r, sizes.out);
  }
  return tensors;
}

export function queryableConfig(options: DirectoryOptions): Record<string, unknown> {
  const { labels, bank, alpha = 8, blockLayers = 1 } = options;
  return {
    kind: 'queryable',
    format: 'queryable/1',
    rank: queryableRank,
    alpha,
    top_k: Math.min(2, labels.length),
    labels,
    bank: typeof bank === 'string' ? bank : { block_layers: blockLayers },
  };
}

export function writeQueryable(
  folder: string,
  config: unknown,
  weights: Tensors | Uint8Array,
): string {
  mkdirSync(folder, { recursive: true });
  writeFileSync(
    join(folder, 'rankgate.json'),
    typeof config === 'string' ? config : JSON.stringify(config),
  );
  const bytes = weights instanceof Uint8Array ? weights : writeSafetensors(weights);
  writeFileSync(join(folder, 'adapter_model.safetensors'), bytes);
  return folder;
}
