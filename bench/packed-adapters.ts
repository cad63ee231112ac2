// Adapters of seeded numbers as the importer would have stored them: packed files in a blob store. Their ranks are not
// ordered by size: nothing that is measured depends on it.

import { type Generation, noOptions } from '../src/adapters/adapter.ts';
import { createBlobStore } from '../src/adapters/blobs.ts';
import { createPacker } from '../src/adapters/pack.ts';
import { servedPair } from '../src/adapters/served.ts';
import { f16BitsToF32 } from '../src/kernels/half.ts';
import { type DecoderConfig, projections } from '../src/model/decoder-config.ts';
import { sha256OfFile } from '../src/model/file-hash.ts';
import { type AdapterModule, adapterModules } from './adapter-numbers.ts';
import { readConfig } from './rankgate-side.ts';

export interface PackedBase {
  readonly config: DecoderConfig;
  /** SHA-256 of the model file. */
  readonly hash: string;
}

export async function readBase(modelPath: string): Promise<PackedBase> {
  return { config: readConfig(modelPath), hash: await sha256OfFile(modelPath) };
}

/** Stores adapters of seeds 1 … count and returns their generations in that order. */
export async function storePackedAdapters(
  directory: string,
  base: PackedBase,
  { count, rank }: { readonly count: number; readonly rank: number },
): Promise<Generation[]> {
  const blobs = createBlobStore(directory);
  const generations: Generation[] = [];
  for (let seed = 1; seed <= count; seed++) {
    generations.push(await blobs.put(packAdapter(base, seed, rank)));
  }
  return generations;
}

function packAdapter({ config, hash }: PackedBase, seed: number, rank: number): Uint8Array {
  const packer = createPacker();
  for (const module of adapterModules(config, seed, rank)) {
    const { block, projection, out } = module;
    const b = columns(module.b, out, rank); // [r, out]
    const a = Float64Array.from(wide(module.a)); // [r, in]
    packer.add(servedPair({ block, projection }, { rank, a, b }));
  }
  return packer.finish({
    format: 'rankgate-adapter/3',
    kind: 'lora',
    describe: '',
    levels: null,
    options: noOptions,
    baseHash: hash,
    rankMax: rank,
    rankCurve: Array.from({ length: rank }, (_, k) => (k + 1) / rank),
    source: {
      format: 'peft',
      rank,
      alpha: rank,
      rslora: false,
      targetModules: [...projections],
      baseName: null,
    },
  }).bytes;
}

function wide(bits: AdapterModule['a']): Float32Array {
  const values = new Float32Array(bits.length);
  f16BitsToF32(bits, values);
  return values;
}

/** [out, r] → [r, out]. */
function columns(bits: AdapterModule['b'], out: number, rank: number): Float64Array {
  const values = wide(bits);
  const result = new Float64Array(values.length);
  for (let row = 0; row < out; row++) {
    for (let r = 0; r < rank; r++) result[r * out + row] = values[row * rank + r]!;
  }
  return result;
}
