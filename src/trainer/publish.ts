// Trained factors → the adapter that is served: scales folded in, ranks ordered as the recipe says (algorithms.md section 1),
// packed, and written as a directory that `adapters add` takes. And the way back: an adapter's pairs as factors to go on from.

import { mkdir } from 'node:fs/promises';
import { join } from 'node:path';
import type { Generation } from '../adapters/adapter.ts';
import { type Family, type Site, streamOf, type Tensors } from '../adapters/families/family.ts';
import { lora } from '../adapters/families/lora.ts';
import { matryoshka, scaleOf } from '../adapters/families/matryoshka.ts';
import { createRandom } from '../adapters/families/seeded-random.ts';
import { pairKinds } from '../adapters/manifest.ts';
import { asServed, bySvd } from '../adapters/native-import.ts';
import type { PackedAdapter } from '../adapters/pack.ts';
import { type Packed, packPairs, prefixOf, ranksAt } from '../adapters/pack-pairs.ts';
import { packedConfig } from '../adapters/packed-import.ts';
import { GatewayError } from '../errors.ts';
import type { Recipe } from '../jobs/recipe.ts';
import { type DecoderConfig, type Projection, projectionShape } from '../model/decoder-config.ts';
import { writeFileDurably } from '../model/file-hash.ts';
import { writeError } from './checkpoint.ts';

export function familyOf(recipe: Recipe): Family {
  const { kind, rank, ranks, scaling, objective, order } = recipe;
  switch (kind) {
    case 'lora': {
      const alpha = rank * scaleOf(scaling, rank);
      const ordered = order === 'svd' ? 'svd' : 'as-trained';
      return lora({ rank, alpha, rslora: false, order: ordered });
    }
    case 'matryoshka': {
      const mask = objective === 'diag' || objective === 'binary' ? objective : 'prefix';
      return matryoshka({ maxRank: rank, ranks, scaling, mask, order });
    }
  }
}

export function siteOf(config: DecoderConfig, block: number, projection: Projection): Site {
  const weight = (): never => {
    throw new GatewayError('INTERNAL', 'no family that is trained asks for the weight');
  };
  return { block, projection, ...projectionShape(config, projection), weight };
}

/** The low-rank factors of one module, as a decoder reads them. */
export interface ModuleFactors {
  readonly site: Site;
  readonly a: Float32Array; // [R, in]
  readonly b: Float32Array; // [R, out]
}

/** A adds nothing at the start: B is zero. */
export function initialFactors(recipe: Recipe, site: Site): Omit<ModuleFactors, 'site'> {
  const random = createRandom(BigInt(recipe.seed), [streamOf(site), 0]);
  const { a, b } = familyOf(recipe).init(site, random);
  return { a: Float32Array.from(a!.data), b: Float32Array.from(b!.data) };
}

/** What a level of a packed adapter has of a module, as the first of `ranks` ranks, the others 0. */
export function servedFactors(
  packed: PackedAdapter,
  { block, projection, in: width, out }: Site,
  { level, ranks }: { readonly level: number; readonly ranks: number },
): Omit<ModuleFactors, 'site'> {
  const { modules, rankMax } = packed.manifest;
  const [a, b] = [new Float32Array(ranks * width), new Float32Array(ranks * out)];
  const index = modules.findIndex((one) => one.block === block && one.projection === projection);
  if (index < 0) return { a, b };
  // Above the adapter's own ranks nothing is added.
  const kept = ranksAt(packed.manifest, index, Math.min(level, rankMax));
  const pair = prefixOf(packed, modules[index]!, kept);
  a.set(pair.a);
  for (let r = 0; r < kept; r++) {
    for (let o = 0; o < out; o++) b[r * out + o] = pair.b[o * kept + r]!;
  }
  return { a, b };
}

/** Writes an adapter over a module's first ranks, so that what is trained begins as what is served. */
export function continueFrom(recipe: Recipe, module: ModuleFactors, start: PackedAdapter): void {
  const { site } = module;
  const { rankMax } = start.manifest;
  const served = servedFactors(start, site, { level: rankMax, ranks: rankMax });
  const { gates } = familyOf(recipe).pair(site, tensorsOf(module), null);
  for (let r = 0; r < rankMax; r++) {
    const a = served.a.subarray(r * site.in, (r + 1) * site.in);
    // A rank that the module does not have keeps its random A, or it would never train.
    if (a.some((value) => value !== 0)) module.a.set(a, r * site.in);
    for (let i = r * site.out; i < (r + 1) * site.out; i++) module.b[i] = served.b[i]! / gates[r]!;
  }
}

/** Throws INVALID_REQUEST for an adapter that the recipe cannot hold. */
export function checkStart(recipe: Recipe, { manifest }: PackedAdapter, baseHash: string): void {
  const { kind, rankMax, modules } = manifest;
  const other = modules.find(({ projection }) => !recipe.targets.includes(projection));
  const refuse = (what: string): never => {
    throw new GatewayError('INVALID_REQUEST', `training cannot go on from this adapter: ${what}`);
  };
  if (manifest.baseHash !== baseHash) refuse('it is of another base');
  if (!pairKinds.includes(kind)) refuse(`a ${kind} is no low-rank pair`);
  if (rankMax > recipe.rank) refuse(`it has ${rankMax} ranks, the recipe ${recipe.rank}`);
  if (other !== undefined) refuse(`it changes ${other.projection}, which targets leaves out`);
}

function tensorsOf({ site, a, b }: ModuleFactors): Tensors {
  const columns = a.length / site.in;
  return {
    a: { rows: site.in, columns, data: Float64Array.from(a) },
    b: { rows: site.out, columns, data: Float64Array.from(b) },
  };
}

export interface PublishAbout {
  readonly baseHash: string;
  readonly step: number;
  readonly from: readonly Generation[];
}

/** Throws INVALID_ADAPTER where a number is beyond what packed files hold. */
export function publishModules(
  recipe: Recipe,
  modules: Iterable<ModuleFactors>,
  { baseHash, step, from }: PublishAbout,
): Packed {
  const family = familyOf(recipe);
  const order = recipe.order === 'svd' ? bySvd : asServed;
  const sources = Array.from(modules, (module) => ({
    module: module.site,
    squeeze: () => order(family, module.site, tensorsOf(module)),
  }));
  return packPairs(sources, {
    kind: recipe.kind,
    describe: family.describe,
    baseHash,
    source: { format: 'rankgate', by: `${step} steps of training`, from: [...from] },
    levels: recipe.levels,
  });
}

/** Throws DISK_FULL. */
export async function writePublished(directory: string, { bytes }: Packed): Promise<void> {
  try {
    await mkdir(directory, { recursive: true });
    await writeFileDurably(join(directory, 'adapter_model.safetensors'), bytes);
    await writeFileDurably(join(directory, 'rankgate.json'), packedConfig);
  } catch (cause) {
    throw writeError(cause);
  }
}
