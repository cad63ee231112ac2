// An adapter in its family's own numbers: rankgate.json says the kind and its options, adapter_model.safetensors has
// `blk.{block}.{projection}.{tensor}` of [count, length] with the family's names, rows in the base's own order. What is a
// low-rank pair once it is published is packed like any other; what is not is packed as its family serves it. Queryable
// adapters have a bank beside them: queryable-directory.ts.

import { z } from 'zod';
import { GatewayError } from '../errors.ts';
import { projectionShape, projections } from '../model/decoder-config.ts';
import type { GgufFile } from '../model/gguf.ts';
import { readSafetensors, type SafetensorsTensor, toFloat32 } from '../model/safetensors.ts';
import {
  type FamilyOptions,
  type Generation,
  noOptions,
  type PackedKind,
  rankMaxLimit,
} from './adapter.ts';
import { numbersOf, weightName } from './extract.ts';
import { checkTensors, type Family, peftOf, type Site, type Tensors } from './families/family.ts';
import { flexmore } from './families/flexmore.ts';
import { fly } from './families/fly.ts';
import { hydra } from './families/hydra.ts';
import { matryoshka } from './families/matryoshka.ts';
import { mora } from './families/mora.ts';
import { salt } from './families/salt.ts';
import { rankAtEnergy, singularBasis } from './families/singular-basis.ts';
import { svfit, svfitBasis } from './families/svfit.ts';
import { triangular } from './families/triangular.ts';
import type { Columns } from './orthogonal.ts';
import { createPacker } from './pack.ts';
import { type LevelRule, type Packed, type PairsAbout, packPairs } from './pack-pairs.ts';
import type { AdapterBase } from './peft.ts';
import type { ServedModule } from './served.ts';
import { rankCurve, type SqueezedModule, squeezeModule } from './squeeze.ts';

export const rank: z.ZodInt = z.int().min(1).max(rankMaxLimit);
export const alpha: z.ZodNumber = z.number().positive().max(1e6);
const schema = z.discriminatedUnion('kind', [
  z.strictObject({
    kind: z.literal('matryoshka'),
    max_rank: rank,
    ranks: z.array(rank).min(1).max(rankMaxLimit),
    scaling: z.enum(['none', 'rank', 'sqrt']),
    mask: z.enum(['diag', 'binary', 'prefix']),
    order: z.enum(['svd', 'as-trained', 'as-published']).default('svd'),
  }),
  z.strictObject({
    kind: z.literal('fly'),
    rank,
    top_k: rank,
    alpha,
    seed: z.string().regex(/^[0-9a-f]{16}$/),
  }),
  z.strictObject({
    kind: z.literal('mora'),
    rank,
    top_k: rank,
    temperature: z.number().positive().max(1e6),
  }),
  z.strictObject({
    kind: z.literal('flexmore'),
    experts: z
      .array(z.strictObject({ name: z.string().min(1).max(64), rank }))
      .min(1)
      .max(64),
  }),
  z.strictObject({ kind: z.literal('triangular'), rank, alpha }),
  z.strictObject({ kind: z.literal('hydra'), rank, alpha }),
  z.strictObject({ kind: z.literal('salt'), rank, tail_rank: rank }),
  z.strictObject({ kind: z.literal('svfit'), rank }),
]);
type Options = z.infer<typeof schema>;

export interface NativeInput {
  readonly config: string;
  readonly weights: Uint8Array;
  readonly base: AdapterBase;
  /** The base's own weights, for the families that need them. */
  readonly baseFile: GgufFile;
  readonly levels: LevelRule;
  /** A stored basis that has all of these, or null. */
  readonly findBasis: (modules: readonly ServedModule[]) => Promise<Generation | null>;
  readonly storeShared: (basis: Packed) => Promise<Generation>;
}

/** Throws INVALID_ADAPTER, or what the families throw. Minutes where singular vectors of the base are wanted. */
export async function packNative(input: NativeInput): Promise<Packed> {
  const options = parseOptions(input.config, schema);
  const family = familyOf(options);
  const modules = readModules(input, family, new Map(readSafetensors(input.weights).tensors));
  const about = {
    kind: family.kind,
    describe: family.describe,
    baseHash: input.base.hash,
    source: { format: 'rankgate', by: `${family.kind}'s own numbers`, from: [] },
  } as const;
  if (options.kind === 'svfit') return packSvfit(input, modules, { about, options, family });
  if (family.route !== null) return packRouted(modules, family, about);
  const isOrdered = options.kind === 'matryoshka' && options.order !== 'svd';
  const pairs = modules.map(({ site, tensors }) => ({
    module: site,
    squeeze: () => (isOrdered ? asServed : bySvd)(family, site, tensors),
  }));
  const levels = isOrdered ? 'uniform' : input.levels;
  return packPairs(pairs, { ...about, levels });
}

/** rankgate.json as a kind has it. Throws INVALID_ADAPTER. */
export function parseOptions<T>(config: string, wanted: z.ZodType<T>): T {
  let value: unknown;
  try {
    value = JSON.parse(config);
  } catch (cause) {
    throw new GatewayError('INVALID_ADAPTER', 'rankgate.json is not JSON', { cause });
  }
  const { success, data, error } = wanted.safeParse(value);
  if (success) return data;
  const { path, message } = error.issues[0]!;
  const where = path.length === 0 ? '' : ` ${path.join('.')}`;
  throw new GatewayError('INVALID_ADAPTER', `rankgate.json${where}: ${message}`);
}

function familyOf(options: Options): Family {
  switch (options.kind) {
    case 'matryoshka':
      return matryoshka({ ...options, maxRank: options.max_rank });
    case 'fly': {
      const seed = BigInt(`0x${options.seed}`);
      return fly({ ...options, topK: options.top_k, seed, score: 'abs_plus_bias' });
    }
    case 'mora':
      return mora({ ...options, topK: options.top_k, frozen: 0 });
    case 'flexmore':
      return flexmore(options);
    case 'triangular':
      return triangular(options);
    case 'hydra':
      return hydra(options);
    case 'salt':
      return salt({ ...options, tailRank: options.tail_rank });
    case 'svfit':
      return svfit(options);
  }
}

export interface NativeModule {
  readonly site: Site;
  readonly tensors: Tensors;
}

/** Takes its tensors out of `left`, in the base's order. Every one that is there must belong to a module of the base. */
export function readModules(
  { base, baseFile }: Pick<NativeInput, 'base' | 'baseFile'>,
  family: Pick<Family, 'kind' | 'axes'>,
  left: Map<string, SafetensorsTensor>,
): NativeModule[] {
  const count = left.size;
  const modules: NativeModule[] = [];
  for (let block = 0; block < base.config.blocks; block++) {
    for (const projection of projections) {
      const prefix = `blk.${block}.${projection}.`;
      const tensors: Record<string, Columns> = {};
      for (const name of Object.keys(family.axes)) {
        const tensor = left.get(prefix + name);
        if (tensor !== undefined) tensors[name] = columnsOfTensor(prefix + name, tensor);
        left.delete(prefix + name);
      }
      if (Object.keys(tensors).length === 0) continue;
      const weight = (): Columns => weightOf(baseFile, { block, projection });
      const site = { block, projection, ...projectionShape(base.config, projection), weight };
      checkTensors(family, site, tensors);
      modules.push({ site, tensors });
    }
  }
  if (left.size === 0 && modules.length > 0) return modules;
  const [stranger = 'none is there'] = left.keys();
  const message = `${count - left.size} of ${count} tensors matched; not ${JSON.stringify(stranger.slice(0, 128))}`;
  throw new GatewayError('INVALID_ADAPTER', message);
}

function columnsOfTensor(name: string, tensor: SafetensorsTensor): Columns {
  const [count, length = 1, ...more] = tensor.shape;
  if (count === undefined || more.length > 0) {
    const message = `${name} is [${tensor.shape.join(', ')}], want one or two axes`;
    throw new GatewayError('INVALID_ADAPTER', message);
  }
  if (!['F64', 'F32', 'F16', 'BF16'].includes(tensor.dtype)) {
    throw new GatewayError('INVALID_ADAPTER', `${name} has dtype ${tensor.dtype}`);
  }
  return { rows: length, columns: count, data: Float64Array.from(toFloat32(tensor)) };
}

/** A file's row-major [out, in] is `out` columns of length `in`. */
function weightOf(file: GgufFile, module: Pick<Site, 'block' | 'projection'>): Columns {
  const name = weightName(module);
  const [width, out] = file.tensors.get(name)!.shape as [number, number];
  return { rows: width, columns: out, data: Float64Array.from(numbersOf(file, name)) };
}

// A copy of the site: what a family remembers of one (the base's singular vectors) goes when its module is done.
export function bySvd(family: Family, { ...site }: Site, tensors: Tensors): SqueezedModule {
  const { rank: r, a, b } = peftOf(family.pair(site, tensors, null));
  return squeezeModule({ rank: r, in: site.in, out: site.out, a, b, scale: 1 });
}

/** In the order of training: each rank is worth what it adds alone. */
export function asServed(family: Family, site: Site, tensors: Tensors): SqueezedModule {
  const served = family.serve(site, tensors);
  return { rank: served.rank, a: served.a!, b: served.b!, sigma: rankNorms(served) };
}

/** ‖a_i‖·‖b_i‖ of each rank. fly draws all of A from one distribution. */
function rankNorms({ rank: r, a, b, in: width, out }: ServedModule): Float64Array {
  const norm = (x: Float64Array, i: number, length: number): number =>
    Math.hypot(...x.subarray(i * length, (i + 1) * length));
  return Float64Array.from(
    { length: r },
    (_, i) => (a === null ? 1 : norm(a, i, width)) * norm(b!, i, out),
  );
}

type About = Omit<PairsAbout, 'levels'>;

/** Ranks that tokens choose: level k is k ranks of a token's choice, worth at best what the k largest are. */
export function packRouted(modules: readonly NativeModule[], family: Family, about: About): Packed {
  const packer = createPacker();
  const energies: number[] = [];
  for (const { site, tensors } of modules) {
    const served = family.serve(site, tensors);
    packer.add(served);
    const sorted = rankNorms(served).sort((x, y) => y - x);
    sorted.forEach((norm, i) => {
      energies[i] = (energies[i] ?? 0) + norm ** 2;
    });
  }
  return finish(packer, { about, energies, options: family.options });
}

interface SvfitParts {
  readonly about: About;
  readonly options: Options & { readonly kind: 'svfit' };
  readonly family: Family;
}

async function packSvfit(
  input: NativeInput,
  modules: readonly NativeModule[],
  { about, options, family }: SvfitParts,
): Promise<Packed> {
  const served = modules.map(({ site, tensors }) => family.serve(site, tensors));
  const needs =
    (await input.findBasis(served)) ??
    (await input.storeShared(packBasis(modules, options.rank, about)));
  const packer = createPacker();
  const energies: number[] = [];
  for (const module of served) {
    packer.add(module);
    module.gates!.forEach((delta, i) => {
      energies[i] = (energies[i] ?? 0) + delta ** 2; // U and V are orthonormal: δs is the singular value.
    });
  }
  return finish(packer, { about, energies, options: { ...family.options, needs } });
}

function packBasis(modules: readonly NativeModule[], rankMax: number, about: About): Packed {
  const packer = createPacker();
  const energies: number[] = [];
  const wanted: number[] = [];
  let all = 0;
  for (const { site } of modules) {
    const own = { ...site };
    packer.add(svfitBasis(own, rankMax));
    const { sigma } = singularBasis(own);
    wanted.push(rankAtEnergy(sigma, 0.99));
    sigma.forEach((value, i) => {
      all += value ** 2;
      if (i < rankMax) energies[i] = (energies[i] ?? 0) + value ** 2;
    });
  }
  const kept = energies.reduce((sum, energy) => sum + energy, 0) / all;
  const describe =
    `the base's ${rankMax} largest singular directions of ${modules.length} modules: ${(100 * kept).toFixed(1)} % of their ` +
    `energy, of which 99 % takes ${Math.min(...wanted)} to ${Math.max(...wanted)} ranks`;
  const named = { ...about, kind: 'basis', describe } as const;
  return finish(packer, { about: named, energies, options: noOptions });
}

interface Finish {
  readonly about: Omit<About, 'kind'> & { readonly kind: PackedKind };
  /** Of each rank, over all modules. */
  readonly energies: readonly number[];
  readonly options: FamilyOptions;
}

function finish(packer: ReturnType<typeof createPacker>, parts: Finish): Packed {
  const { about, energies, options } = parts;
  return packer.finish({
    ...about,
    format: 'rankgate-adapter/3',
    rankMax: energies.length,
    rankCurve: rankCurve([Float64Array.from(energies, Math.sqrt)]),
    levels: null,
    options,
  });
}
