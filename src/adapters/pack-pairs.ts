// Squeezed low-rank pairs → one packed file, with its levels; and a packed file's pairs back as numbers. What is done to an
// adapter after import (fewer ranks) and what makes one from weights (extract, compensate) ends here, as imports do.

import { GatewayError } from '../errors.ts';
import { f16Values } from '../kernels/half.ts';
import type { ModuleRef } from '../model/stepper.ts';
import {
  type AdaptedModule,
  type AdapterKind,
  type AdapterManifest,
  noOptions,
  pageRanks,
} from './adapter.ts';
import { planLevels } from './levels.ts';
import { pairKinds } from './manifest.ts';
import type { Columns } from './orthogonal.ts';
import { createPacker, type PackedAdapter } from './pack.ts';
import { moduleName } from './peft-names.ts';
import { servedPair } from './served.ts';
import { type LoraModule, rankCurve, type SqueezedModule, squeezeModule } from './squeeze.ts';

/** How ranks are shared out: `energy`: levels.ts; `uniform`: level k is the first k ranks of every module. */
export type LevelRule = 'energy' | 'uniform';

export interface PairsAbout extends Pick<AdapterManifest, 'describe' | 'baseHash' | 'source'> {
  readonly kind: AdapterKind;
  readonly levels: LevelRule;
}

export interface Packed {
  readonly manifest: AdapterManifest;
  readonly bytes: Uint8Array;
}

/** A module's pair, made when it is wanted: all of them at once would be gigabytes. */
export interface PairSource {
  readonly module: ModuleRef;
  squeeze(): SqueezedModule;
}

/** Takes modules one at a time. Throws INVALID_ADAPTER naming the module. */
export function packPairs(
  modules: Iterable<PairSource>,
  { levels: rule, ...about }: PairsAbout,
): Packed & { readonly isZero: boolean } {
  const packer = createPacker();
  const ranked: { sigma: Float64Array; rankBytes: number }[] = [];
  for (const { module, squeeze } of modules) {
    try {
      const { sigma, ...factors } = squeeze();
      const served = servedPair(module, factors);
      packer.add(served);
      ranked.push({ sigma, rankBytes: 2 * (served.in + served.out) });
    } catch (error) {
      if (!(error instanceof GatewayError)) throw error;
      throw new GatewayError(error.code, `${moduleName(module)}: ${error.message}`);
    }
  }
  if (ranked.length === 0) throw new GatewayError('INVALID_ADAPTER', 'no module would be changed');
  const sigmas = ranked.map(({ sigma }) => sigma);
  const plan = rule === 'energy' ? planLevels(ranked) : { levels: null, curve: rankCurve(sigmas) };
  const packed = packer.finish({
    ...about,
    format: 'rankgate-adapter/3',
    rankMax: plan.curve.length,
    rankCurve: plan.curve,
    levels: plan.levels,
    options: noOptions,
  });
  return { ...packed, isZero: sigmas.every((sigma) => sigma[0] === 0) };
}

/** Ranks that level `level` has of the manifest's module `index`: a prefix. */
export function ranksAt(
  { levels, modules }: AdapterManifest,
  index: number,
  level: number,
): number {
  const from = levels?.[index];
  return from === undefined
    ? Math.min(level, modules[index]!.rank)
    : from.filter((on) => on <= level).length;
}

/** The first `kept` ranks of a module as they are served. */
export function prefixOf(packed: PackedAdapter, module: AdaptedModule, kept: number): LoraModule {
  const { in: width, out } = module;
  const a = new Float64Array(kept * width); // [kept, in]
  const b = new Float64Array(out * kept); // [out, kept]
  for (let r = 0; r < kept; r++) {
    const page = packed.page(module, Math.floor(r / pageRanks));
    if (page === null) throw new GatewayError('INTERNAL', 'a page is missing');
    const lane = r % pageRanks;
    for (let i = 0; i < width; i++) a[r * width + i] = f16Values[page.a[lane * width + i]!]!;
    for (let o = 0; o < out; o++) b[o * kept + r] = f16Values[page.b[lane * out + o]!]!;
  }
  return { rank: kept, in: width, out, a, b, scale: 1 };
}

/** What to keep: so many ranks of each module, or of each module the fewest that hold this share of its energy. */
export type SqueezeTarget = { readonly rank: number } | { readonly variance: number };

/** The adapter with fewer ranks; the scale is in the factors, so alpha / r stays. LoRA-Squeeze's `post`: `cont` trains on
 *  afterwards, which is not served here. Throws UNSUPPORTED for kinds that are no pairs. */
export function squeezePacked(packed: PackedAdapter, target: SqueezeTarget): Packed {
  const { manifest, generation } = packed;
  const { kind, baseHash, rankMax, modules } = manifest;
  if (!pairKinds.includes(kind) || kind === 'eora') {
    const why = kind === 'eora' ? 'are ordered by a text' : 'are no plain pairs';
    const message = `an adapter of kind ${kind} cannot be squeezed: its ranks ${why}`;
    throw new GatewayError('UNSUPPORTED', message);
  }
  if ('rank' in target && target.rank > rankMax) {
    const message = `rank is ${target.rank}, the adapter has 1 … ${rankMax}`;
    throw new GatewayError('INVALID_REQUEST', message, { param: 'rank' });
  }
  const what = 'rank' in target ? `rank ${target.rank}` : `variance ${target.variance}`;
  return packPairs(
    modules.map((module) => ({
      module,
      squeeze: () => squeezeTo(prefixOf(packed, module, module.rank), target),
    })),
    {
      kind: 'lora',
      describe: `low-rank pairs of a ${kind}, squeezed to ${what}`,
      baseHash,
      source: { format: 'rankgate', by: `squeeze to ${what}`, from: [generation] },
      levels: manifest.levels === null ? 'uniform' : 'energy',
    },
  );
}

/** `covariance`, of the module's inputs: what is kept is energy in outputs. */
export function squeezeTo(
  module: LoraModule,
  target: SqueezeTarget,
  covariance?: Columns, // [in, in]
): SqueezedModule {
  const by = covariance === undefined ? {} : { covariance };
  if ('rank' in target) return squeezeModule(module, { rankMax: target.rank, ...by });
  return firstRanks(squeezeModule(module, by), target.variance);
}

/** The fewest first ranks that hold `variance` of Σσ². */
export function firstRanks(squeezed: SqueezedModule, variance: number): SqueezedModule {
  const { rank: all, a, b, sigma } = squeezed;
  const rank = rankCurve([sigma]).findIndex((share) => share >= variance) + 1;
  const cut = (x: Float64Array): Float64Array => x.slice(0, (rank * x.length) / all);
  return { rank, a: cut(a), b: cut(b), sigma: cut(sigma) };
}
