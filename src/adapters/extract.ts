// What a full fine-tune changed, as low-rank pairs (as FlexMoRE makes its experts): per projection, the SVD of
// W_from − W_base. Both files have the rows of q and k in the same order, and so has the pair.

import { GatewayError } from '../errors.ts';
import { elementCount } from '../kernels/check.ts';
import { dequantizeRows } from '../kernels/dequantize.ts';
import { dtypeLayout, type WeightType } from '../kernels/kernels.ts';
import {
  type DecoderConfig,
  expectedTensors,
  projections,
  readDecoderConfig,
} from '../model/decoder-config.ts';
import type { GgufFile } from '../model/gguf.ts';
import type { ModuleRef } from '../model/stepper.ts';
import { rankMaxLimit } from './adapter.ts';
import type { Columns } from './orthogonal.ts';
import { firstRanks, type PairSource } from './pack-pairs.ts';
import { type SqueezedModule, squeezeMatrix } from './squeeze.ts';

export interface FilePair {
  /** The fine-tune, or the file of higher precision. */
  readonly from: GgufFile;
  readonly base: GgufFile;
}

/** Ranks of each module, or the fewest that hold this share of what it changed: at most 256. */
export type ExtractTarget = { readonly rank: number } | { readonly energy: number };

/** The modules that differ, each as a pair when it is asked for; `onEnergy` hears then which part of Σ(W_from − W_base)² the
 *  pair holds, of how much. Throws BASE_MISMATCH for files of other sizes. */
export function extractModules(
  files: FilePair,
  target: ExtractTarget,
  onEnergy: (held: number, all: number) => void = () => {},
): PairSource[] {
  return changedModules(files).map((module) => ({
    module,
    squeeze: () => {
      const change = weightChange(files, module);
      const all = energyOf(change.data);
      const squeezed = extractPair(change, target, all);
      onEnergy(energyOf(squeezed.sigma), all);
      return squeezed;
    },
  }));
}

function extractPair(change: Columns, target: ExtractTarget, all: number): SqueezedModule {
  if ('rank' in target) return squeezeMatrix(change, { rankMax: target.rank });
  const squeezed = squeezeMatrix(change, { rankMax: rankMaxLimit });
  const share = energyOf(squeezed.sigma) / all;
  if (share >= target.energy) return firstRanks(squeezed, target.energy / share);
  // All of its ranks may be there, and rounding be what is missing.
  if (share > target.energy - 1e-9) return squeezed;
  const message = `${rankMaxLimit} ranks hold ${share.toFixed(4)} of the change, ${target.energy} is wanted`;
  throw new GatewayError('INVALID_ADAPTER', message);
}

function energyOf(values: Float64Array): number {
  return values.reduce((sum, value) => sum + value * value, 0);
}

/** Throws BASE_MISMATCH unless both are the same decoder but for their numbers. */
function checkSameSizes({ from, base }: FilePair): DecoderConfig {
  const [theirs, ours] = [readDecoderConfig(from), readDecoderConfig(base)];
  for (const [key, value] of Object.entries(ours)) {
    if (key === 'name' || key === 'contextLength') continue; // They change no number of a short text.
    const other = theirs[key as keyof DecoderConfig];
    if (other === value) continue;
    throw new GatewayError('BASE_MISMATCH', `${key} is ${other}, the base's is ${value}`);
  }
  return ours;
}

export function changedModules(files: FilePair): ModuleRef[] {
  const { blocks } = checkSameSizes(files);
  return Array.from({ length: blocks }, (_, block) =>
    projections.map((projection) => ({ block, projection })),
  )
    .flat()
    .filter((module) => differs(files, weightName(module)));
}

/** Tensors that differ and that no adapter can change: norms, embeddings, the output. */
export function changedOutsideModules(files: FilePair): string[] {
  const names = [...expectedTensors(checkSameSizes(files)).keys()];
  return names.filter(
    (name) => !projections.some((p) => name.includes(`.${p}.`)) && differs(files, name),
  );
}

/** W_from − W_base of a projection. */
export function weightChange({ from, base }: FilePair, module: ModuleRef): Columns {
  const name = weightName(module);
  const [width, out] = base.tensors.get(name)!.shape as [number, number];
  const [theirs, ours] = [numbersOf(from, name), numbersOf(base, name)]; // [out, in]
  const data = new Float64Array(out * width);
  for (let o = 0; o < out; o++) {
    for (let i = 0; i < width; i++) {
      data[i * out + o] = theirs[o * width + i]! - ours[o * width + i]!;
    }
  }
  return { rows: out, columns: width, data };
}

export function weightName({ block, projection }: ModuleRef): string {
  return `blk.${block}.${projection}.weight`;
}

function differs({ from, base }: FilePair, name: string): boolean {
  const [theirs, ours] = [numbersOf(from, name), numbersOf(base, name)];
  return theirs.some((value, i) => value !== ours[i]);
}

/** A tensor of a model file, finite, in f32; or one row of it. */
export function numbersOf(file: GgufFile, name: string, row: number | null = null): Float32Array {
  const { shape, offset, bytes, ...tensor } = file.tensors.get(name)!;
  const type = tensor.type.toLowerCase();
  if (!(type in dtypeLayout) || type.startsWith('i')) {
    throw new GatewayError('UNSUPPORTED', `${name}: weights of type ${tensor.type}`);
  }
  const numbers = new Float32Array(row === null ? elementCount(shape) : shape[0]!);
  const size = (bytes / elementCount(shape)) * numbers.length;
  dequantizeRows(type as WeightType, file.read(offset + (row ?? 0) * size, size), numbers);
  const bad = numbers.find((value) => !Number.isFinite(value));
  if (bad !== undefined) throw new GatewayError('INVALID_MODEL_FILE', `${name} has ${bad}`);
  return numbers;
}
