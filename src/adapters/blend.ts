// Adapters merged into one by TIES (arXiv 2306.01708) and DARE (arXiv 2311.03099), as PEFT 0.21 merges them and LoRAX names
// them: A and B each on their own, weighted by √|w| with w's sign on A. Unlike a linear blend, which is the sum of the deltas
// (rows.ts), that is no function of the deltas: it depends on how each adapter's ranks are ordered and signed, and here they
// are as import ordered them. Seconds of compute for large ranks: not for an event loop.

import { createHash } from 'node:crypto';
import { GatewayError } from '../errors.ts';
import { f16Values } from '../kernels/half.ts';
import { moduleIndex } from '../model/decoder-config.ts';
import type { ModuleRef } from '../model/stepper.ts';
import { type AdapterManifest, noOptions, pageRanks } from './adapter.ts';
import { type BlendKey, type BlendSpec, parseBlendKey } from './blend-key.ts';
import { createRandom } from './families/seeded-random.ts';
import { pairKinds } from './manifest.ts';
import type { PackedContents, PagedModule } from './pack.ts';
import { halvesOf } from './pack-numbers.ts';
import { ranksAt } from './pack-pairs.ts';

export interface MergeRule extends Pick<BlendSpec, 'merge' | 'density'> {
  readonly weights: readonly number[];
  /** DARE's coin: whether number i of a part stays. */
  readonly keeps: (part: number, i: number) => boolean;
}

/** One number for each of the longest tensor's; a shorter one ends in zeros. */
export function mergeTensors(tensors: readonly Float64Array[], rule: MergeRule): Float64Array {
  const { merge, density, weights, keeps } = rule;
  const pruned = tensors.map((tensor, part) => {
    if (density >= 1) return tensor;
    if (merge === 'ties') return trimmed(tensor, density);
    return tensor.map((value, i) => (keeps(part, i) ? value / density : 0));
  });
  const merged = new Float64Array(Math.max(...tensors.map(({ length }) => length)));
  for (let i = 0; i < merged.length; i++) {
    let sum = 0;
    for (const tensor of pruned) sum += tensor[i] ?? 0;
    const elected = sum >= 0 ? 1 : -1;
    let [total, count] = [0, 0];
    for (let part = 0; part < pruned.length; part++) {
      const value = pruned[part]![i] ?? 0;
      if (merge !== 'dare_linear' && Math.sign(value) !== elected) continue;
      total += weights[part]! * value;
      count += 1;
    }
    merged[i] = merge === 'dare_linear' ? total : total / Math.max(1, count);
  }
  return merged;
}

/** The ⌊density·n⌋ largest by size; of equal ones the first. */
function trimmed(tensor: Float64Array, density: number): Float64Array {
  const count = Math.floor(density * tensor.length);
  const sizes = tensor.map(Math.abs).sort();
  const least = sizes[tensor.length - count] ?? Number.POSITIVE_INFINITY;
  let ties = count - (tensor.length - (sizes.findLastIndex((size) => size <= least) + 1));
  return tensor.map((value) => {
    const size = Math.abs(value);
    return size > least || (size === least && ties-- > 0) ? value : 0;
  });
}

/** `parts` in the order of the key's. Throws UNSUPPORTED for kinds that are more than a pair of factors. */
export function blendContents(key: BlendKey, parts: readonly PackedContents[]): PackedContents {
  const spec = parseBlendKey(key);
  const seed = createHash('sha256').update(key).digest().readBigUInt64LE();
  const sites = new Map<string, AdapterManifest['modules'][number]>();
  for (const { manifest } of parts) {
    const { kind, baseHash } = manifest;
    if (!pairKinds.includes(kind)) {
      throw new GatewayError('UNSUPPORTED', `${spec.merge} of a ${kind} adapter; linear is served`);
    }
    if (baseHash !== parts[0]!.manifest.baseHash) {
      throw new GatewayError('BASE_MISMATCH', 'the adapters of a blend are for different bases');
    }
    for (const module of manifest.modules) sites.set(nameOf(module), module);
  }
  const modules: AdapterManifest['modules'][number][] = [];
  const paged = new Map<string, PagedModule>();
  for (const [name, site] of sites) {
    const ranks = parts.map(({ manifest }, i) => rankOf(manifest, site, spec.parts[i]!.rank));
    const rank = Math.max(...ranks);
    if (rank === 0) continue;
    const merged = (side: 'a' | 'b', width: number): Uint16Array => {
      const tensors = parts.map(({ modules: own }, i) =>
        numbersOf(own.get(`${name}.a`), side, ranks[i]! * width),
      );
      const stream = 2 * moduleIndex(site.block, site.projection) + Number(side === 'b');
      const rule = { ...spec, weights: spec.parts.map(({ weight }) => factorOf(weight, side)) };
      const size = Math.ceil(rank / pageRanks) * pageRanks * width;
      const values = mergeTensors(tensors, { ...rule, keeps: coins(seed, stream, spec) });
      return halvesOf(values, size, name);
    };
    modules.push({ ...site, rank });
    const pages = Math.ceil(rank / pageRanks);
    paged.set(`${name}.a`, { pages, a: merged('a', site.in), b: merged('b', site.out) });
  }
  return { manifest: manifestOf(spec, parts, modules), modules: paged, floats: new Map() };
}

function nameOf({ block, projection }: ModuleRef): string {
  return `blk.${block}.${projection}`;
}

function rankOf(manifest: AdapterManifest, site: ModuleRef, rank: number): number {
  const index = manifest.modules.findIndex((module) => nameOf(module) === nameOf(site));
  return index < 0 ? 0 : ranksAt(manifest, index, rank);
}

function numbersOf(module: PagedModule | undefined, side: 'a' | 'b', count: number): Float64Array {
  const bits = module?.[side].subarray(0, count) ?? new Uint16Array(0);
  return Float64Array.from(bits, (half) => f16Values[half]!);
}

function factorOf(weight: number, side: 'a' | 'b'): number {
  const root = Math.sqrt(Math.abs(weight));
  return side === 'a' && weight < 0 ? -root : root;
}

/** Asked for in order, number after number of part after part. */
function coins(seed: bigint, stream: number, { density }: BlendSpec): MergeRule['keeps'] {
  let [part, random] = [-1, createRandom(seed)];
  return (wanted) => {
    if (wanted !== part) [part, random] = [wanted, createRandom(seed, [stream, wanted])];
    return random.uniform() < density;
  };
}

function manifestOf(
  { merge, density, parts: given }: BlendSpec,
  parts: readonly PackedContents[],
  modules: AdapterManifest['modules'],
): AdapterManifest {
  if (modules.length === 0) throw new GatewayError('INVALID_REQUEST', 'a blend of no ranks');
  return {
    format: 'rankgate-adapter/3',
    kind: 'lora',
    describe: `${merge} of ${given.length} adapters at density ${density}`,
    baseHash: parts[0]!.manifest.baseHash,
    rankMax: Math.max(...modules.map(({ rank }) => rank)),
    modules,
    rankCurve: [], // Nobody has measured it, and it is served whole.
    levels: null,
    options: noOptions,
    source: { format: 'rankgate', by: merge, from: given.map(({ generation }) => generation) },
  };
}
