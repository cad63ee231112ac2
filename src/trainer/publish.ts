// Trained factors → the adapter that is served: scales folded in, ranks ordered as the recipe says (algorithms.md section 1),
// packed, and written as a directory that `adapters add` takes. And the way back: an adapter's pairs as factors to go on from.

import { mkdir } from 'node:fs/promises';
import { join } from 'node:path';
import { keptPath } from '../adapters/blobs.ts';
import { type Family, type Site, streamOf, type Tensors } from '../adapters/families/family.ts';
import { scaleOf } from '../adapters/families/matryoshka.ts';
import { createRandom, type Random } from '../adapters/families/seeded-random.ts';
import { grownTriangular } from '../adapters/families/triangular.ts';
import { pairKinds } from '../adapters/manifest.ts';
import { asServed, bySvd, packRouted } from '../adapters/native-import.ts';
import { generationOf, type PackedAdapter } from '../adapters/pack.ts';
import { type Packed, packPairs, prefixOf, ranksAt } from '../adapters/pack-pairs.ts';
import { GatewayError } from '../errors.ts';
import type { Recipe } from '../jobs/recipe.ts';
import { writeFileDurably } from '../model/file-hash.ts';
import { ranksBefore } from './annealing.ts';
import { type QueryableStart, queryableChoice } from './atom-bank.ts';
import { writeError } from './checkpoint.ts';
import { openModules } from './codyra.ts';
import type { TrainedModule } from './family-graph.ts';
import { graphOf, type TrainingChoice } from './family-training.ts';
import type { GrowthOptions } from './rank-growth.ts';

/** `start`: what queryable goes on from; `prior`: what its instruction adds. */
export function choiceOf(
  recipe: Recipe,
  start: QueryableStart | null = null,
  prior: readonly number[] | null = null,
): TrainingChoice {
  const { kind, rank, ranks, scaling, objective, order, topK, temperature, tailRank } = recipe;
  const alpha = rank * scaleOf(scaling, rank);
  switch (kind) {
    case 'lora': {
      const first = ranksBefore(recipe);
      const sizes = { rank: first, alpha: first * scaleOf(scaling, rank), rslora: false };
      const gated = recipe.rankSelection === null ? kind : 'gated-lora';
      return { kind: gated, ...sizes, order: order === 'svd' ? 'svd' : 'as-trained' };
    }
    case 'matryoshka': {
      const mask = objective === 'diag' || objective === 'binary' ? objective : 'prefix';
      return { kind, maxRank: rank, ranks, scaling, mask, order };
    }
    case 'hydra':
      return { kind, rank, alpha };
    case 'triangular': {
      const first = growthOf(recipe, 0)?.rank ?? rank;
      return { kind, rank: first, alpha: (alpha / rank) * first };
    }
    case 'salt':
      return { kind, rank, tailRank };
    case 'svfit':
      return { kind, rank };
    case 'fly':
      return { kind, rank, topK, alpha, seed: BigInt(recipe.seed), score: 'abs_plus_bias' };
    case 'mora':
      return { kind, rank, topK, temperature, frozen: 0 };
    case 'flexmore':
      return { kind, experts: recipe.experts! };
    case 'queryable':
      return queryableChoice(recipe, start, prior);
  }
}

/** From half the ranks to all of them on average, by half at a time (algorithms.md section 3); twice as many at most. */
export function growthOf({ rankGrowth, rank }: Recipe, modules: number): GrowthOptions | null {
  if (rankGrowth === null) return null;
  const { threshold: curve, interval, warmupShare } = rankGrowth;
  const half = Math.ceil(rank / 2);
  const sizes = { rank: half, rankMax: 2 * rank, quantum: half, target: rank * modules };
  return { curve, interval, warmupShare, ...sizes };
}

export function familyOf(recipe: Recipe): Family {
  return graphOf(choiceOf(recipe)).family;
}

/** What a module's first numbers are drawn from. */
export function randomOf({ seed }: Recipe, site: Site): Random {
  return createRandom(BigInt(seed), [streamOf(site), 0]);
}

/** Its numbers at the start, which add nothing. */
export function initialTensors(recipe: Recipe, site: Site): Tensors {
  const random = randomOf(recipe, site);
  const tensors = familyOf(recipe).init(site, random);
  const growth = growthOf(recipe, 0);
  if (growth === null) return tensors;
  return grownTriangular(tensors, growth.rankMax - growth.rank, random);
}

/** Ranks of the pair that a module is published as. */
export function pairRank(recipe: Recipe, tensors: Tensors): number {
  switch (recipe.kind) {
    case 'hydra':
      return 2 * tensors['parallel.a']!.columns;
    case 'salt':
      return tensors.alpha!.columns + tensors.x!.columns;
    case 'svfit':
      return tensors.deltas!.columns;
    default:
      return tensors.a!.columns;
  }
}

/** The low-rank factors of one module, as a decoder reads them. */
export interface ModuleFactors {
  readonly a: Float32Array; // [R, in]
  readonly b: Float32Array; // [R, out]
}

/** What a level of a packed adapter has of a module, as the first of `ranks` ranks, the others 0. */
export function servedFactors(
  packed: PackedAdapter,
  { block, projection, in: width, out }: Omit<Site, 'weight'>,
  { level, ranks }: { readonly level: number; readonly ranks: number },
): ModuleFactors {
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

/** The module with an adapter over its first ranks, so that what is trained begins as what is served. */
export function continuedFrom(
  recipe: Recipe,
  { site, tensors }: TrainedModule,
  start: PackedAdapter,
): TrainedModule {
  const { rankMax } = start.manifest;
  const served = servedFactors(start, site, { level: rankMax, ranks: rankMax });
  const own = Object.fromEntries(
    Object.entries(tensors).map(([name, x]) => [name, { ...x, data: x.data.slice() }]),
  );
  for (let r = 0; r < rankMax; r++) {
    const row = served.a.subarray(r * site.in, (r + 1) * site.in);
    // A rank that the module does not have keeps its random A, or it would never train.
    if (row.every((value) => value === 0)) continue;
    own.a!.data.set(row, r * site.in);
    own.b!.data.set(served.b.subarray(r * site.out, (r + 1) * site.out), r * site.out);
    own.g?.data.fill(1, r, r + 1);
  }
  const { gates } = familyOf(recipe).pair(site, own, null);
  own.b!.data.forEach((value, i, data) => {
    if (value !== 0) data[i] = value / gates[Math.floor(i / site.out)]!;
  });
  return { site, tensors: own };
}

/** Throws INVALID_REQUEST for an adapter that the recipe cannot hold. */
export function checkStart(recipe: Recipe, { manifest }: PackedAdapter, baseHash: string): void {
  const { kind, rankMax, modules } = manifest;
  const other = modules.find(({ projection }) => !recipe.targets.includes(projection));
  const refuse = (what: string): never => {
    throw new GatewayError('INVALID_REQUEST', `training cannot go on from this adapter: ${what}`);
  };
  const isQueryable = recipe.kind === 'queryable';
  if (recipe.kind !== 'lora' && recipe.kind !== 'matryoshka' && !isQueryable)
    refuse(`a ${recipe.kind} begins anew`);
  if (recipe.init.kind !== 'kaiming') refuse(`${recipe.init.kind} begins anew`);
  if (recipe.modules !== 'all') refuse(`${recipe.modules.kind} begins anew`);
  if (manifest.baseHash !== baseHash) refuse('it is of another base');
  if (isQueryable && kind !== 'queryable') refuse(`a ${kind} has no atoms`);
  if (!isQueryable && !pairKinds.includes(kind)) refuse(`a ${kind} is no low-rank pair`);
  const ranks = ranksBefore(recipe);
  if (rankMax > ranks) refuse(`it has ${rankMax} ranks, the recipe ${ranks}`);
  if (other !== undefined) refuse(`it changes ${other.projection}, which targets leaves out`);
}

export interface PublishAbout {
  readonly baseHash: string;
  readonly step: number;
  /** What training went on from. */
  readonly start: PackedAdapter | null;
  /** The bases that will be beside it. */
  readonly bases: Uint8Array | null;
}

/** Throws INVALID_ADAPTER where a number is beyond what packed files hold. svfit as a lora: without a basis of its own. */
export function publishModules(
  recipe: Recipe,
  modules: readonly TrainedModule[],
  { baseHash, step, start, bases }: PublishAbout,
): Packed {
  const family = familyOf(recipe);
  const made = {
    by: `${step} steps of training`,
    from: start === null ? [] : [start.generation],
    ...(bases === null ? {} : { keeps: generationOf(bases) }),
  };
  const about = {
    kind: recipe.kind === 'svfit' ? 'lora' : recipe.kind,
    describe: family.describe,
    baseHash,
    source: { format: 'rankgate', ...made },
  } as const;
  if (family.route !== null) return packRouted(modules, family, about);
  const order = recipe.order === 'svd' ? bySvd : asServed;
  const served = recipe.rankSelection === null ? modules : openModules(modules);
  const sources = served.map(({ site, tensors }) => ({
    module: site,
    squeeze: () => order(family, site, tensors),
  }));
  return packPairs(sources, { ...about, levels: recipe.levels });
}

/** What an import takes: rankgate.json, and adapter_model.safetensors. */
export interface AdapterFiles {
  readonly config: string;
  readonly bytes: Uint8Array;
}

/** Throws DISK_FULL. */
export async function writePublished(
  directory: string,
  { config, bytes }: AdapterFiles,
  bases: Uint8Array | null = null,
): Promise<void> {
  const path = join(directory, 'adapter_model.safetensors');
  try {
    await mkdir(directory, { recursive: true });
    await writeFileDurably(path, bytes);
    if (bases !== null) await writeFileDurably(keptPath(path), bases);
    await writeFileDurably(join(directory, 'rankgate.json'), config);
  } catch (cause) {
    throw writeError(cause);
  }
}
