// Which adapters answer a request, and how they are put together: `model`, `adapters` and what goes with them → leases.
// All of them or an error: a part that is missing is never left out, and never the base model's answer (design.md section
// 7). Rules across fields are here; those of one field are in schemas.ts.

import {
  type AdapterKind,
  type AdapterManifest,
  type Generation,
  pageRanks,
} from '../adapters/adapter.ts';
import { pairKinds } from '../adapters/manifest.ts';
import type { AdapterRecord, Lease, Registry } from '../adapters/registry.ts';
import type { AdapterUse, Merge } from '../engine/messages.ts';
import { GatewayError } from '../errors.ts';
import type { Plan, RouteInput } from '../router/policy.ts';
import { resolveModel } from './model-reference.ts';
import { invalidRequest } from './problem.ts';
import type { GenerationBody } from './schemas.ts';

export interface TargetPart {
  readonly lease: Lease;
  readonly weight: number;
}

export interface Target {
  /** What was asked for: `model` of the response. */
  readonly asked: string;
  readonly tier: string | null;
  /** Empty: the base model. */
  readonly parts: readonly TargetPart[];
  readonly system: Lease | null;
  /** The router chooses no more than this; null: the adapter's own. */
  readonly rankLimit: number | null;
  readonly merge: Merge;
  readonly density: number;
  readonly flyTopK: number | null;
  readonly instruction: { readonly text: string; readonly strength: number } | null;
  /** Of all leases. Idempotent. */
  release(): void;
}

interface Known {
  readonly modelName: string;
  readonly tiers: object;
  readonly systemAdapter: string | null;
}

/** λ of algorithms.md section 6. */
const strengthDefault = 0.5;
const choosingKinds: readonly string[] = ['fly', 'mora', 'queryable'] satisfies AdapterKind[];

/** Leases every adapter; the caller releases the target. */
export function resolveTarget(body: GenerationBody, known: Known, registry: Registry): Target {
  const leases: Lease[] = [];
  const release = (): void => {
    for (const lease of leases) lease.release();
  };
  try {
    const model = resolveModel(body.model, known, registry);
    if (model.lease !== null) leases.push(model.lease);
    const parts = model.lease === null ? [] : [{ lease: model.lease, weight: 1 }];
    if (body.adapters !== undefined && parts.length > 0) {
      throw invalidRequest(`adapters: '${model.lease?.name}' is a model already`, 'adapters');
    }
    for (const [i, { id, weight }] of (body.adapters ?? []).entries()) {
      const lease = leasePart(id, `adapters[${i}].id`, known, registry);
      leases.push(lease);
      parts.push({ lease, weight });
    }
    checkDistinct(parts);
    const system = leaseSystem(known.systemAdapter, parts, registry);
    if (system !== null) leases.push(system);
    return {
      asked: model.asked,
      tier: model.tier,
      parts,
      system,
      rankLimit: null,
      ...optionsOf(body, parts),
      release,
    };
  } catch (error) {
    release();
    throw error;
  }
}

function leasePart(id: string, param: string, known: Known, registry: Registry): Lease {
  const { lease, tier } = resolveModel(id, known, registry, param);
  if (lease !== null && tier === null) return lease;
  lease?.release();
  throw invalidRequest(`${param}: want an adapter's name, without a tier`, param);
}

function checkDistinct(parts: readonly TargetPart[]): void {
  const generations = parts.map(({ lease }) => lease.generation);
  const twice = generations.findIndex((one, i) => generations.indexOf(one) < i);
  if (twice < 0) return;
  const param = `adapters[${twice}].id`;
  throw invalidRequest(`${param}: is the same generation as one before it`, param);
}

/** null: it is not there, or no repair of the base. */
export function systemRecord(name: string, registry: Registry): AdapterRecord | null {
  const record = registry.find(name);
  return record?.manifest.kind === 'eora' ? record : null;
}

/** None when the request names it itself. Missing is the operator's mistake: answers without it would be others. */
function leaseSystem(
  name: string | null,
  parts: readonly TargetPart[],
  registry: Registry,
): Lease | null {
  if (name === null) return null;
  if (systemRecord(name, registry) === null) {
    const message = 'the configured system adapter is not there, or is not of kind eora';
    throw new GatewayError('NO_CAPACITY', message);
  }
  const lease = registry.lease(name);
  if (parts.every((part) => part.lease.generation !== lease.generation)) return lease;
  lease.release();
  return null;
}

function optionsOf(
  body: GenerationBody,
  parts: readonly TargetPart[],
): Pick<Target, 'merge' | 'density' | 'flyTopK' | 'instruction'> {
  const { merge, density, fly_top_k: flyTopK, instruction_prior: text, prior_strength } = body;
  const has = (kind: AdapterKind): boolean =>
    parts.some(({ lease }) => lease.manifest.kind === kind);
  const isMerged = merge !== undefined && merge !== 'linear';
  if (merge !== undefined && body.adapters === undefined) {
    throw invalidRequest('merge is for adapters', 'merge');
  }
  if (isMerged !== (density !== undefined)) {
    throw invalidRequest('density goes with ties, dare_linear and dare_ties', 'density');
  }
  const other = parts.find(({ lease }) => !pairKinds.includes(lease.manifest.kind));
  if (isMerged && other !== undefined) {
    const { name, manifest } = other.lease;
    const message = `${merge} merges plain low-rank adapters; ${name} is ${manifest.kind}`;
    throw new GatewayError('UNSUPPORTED', message, { param: 'merge' });
  }
  if (flyTopK !== undefined && !has('fly')) {
    throw invalidRequest('fly_top_k is for adapters of kind fly', 'fly_top_k');
  }
  if (text !== undefined && !has('queryable')) {
    throw invalidRequest('instruction_prior is for queryable adapters', 'instruction_prior');
  }
  if (prior_strength !== undefined && text === undefined) {
    throw invalidRequest('prior_strength needs instruction_prior', 'prior_strength');
  }
  return {
    merge: merge ?? 'linear',
    density: density ?? 1,
    flyTopK: flyTopK ?? null,
    instruction: text === undefined ? null : { text, strength: prior_strength ?? strengthDefault },
  };
}

/** What the router must know of it. A blend at rank k is every part at rank k, or at its own largest: their sum, or what
 *  they are merged into, which is as large as the largest. */
export function routedAs(target: Target): Pick<RouteInput, 'adapter' | 'system'> {
  const { parts, system, merge, rankLimit } = target;
  const underneath = system === null ? null : costOf(system.manifest, system.manifest.rankMax);
  if (parts.length === 0) return { adapter: null, system: underneath };
  const manifests = parts.map(({ lease }) => lease.manifest);
  const largest = Math.max(...manifests.map((one) => one.rankMax));
  const rankMax = Math.min(rankLimit ?? largest, largest);
  const costs = Array.from({ length: rankMax }, (_, i) =>
    manifests.map((one) => costOf(one, i + 1)),
  );
  const total = (key: 'ranks' | 'pages') =>
    costs
      .map((parts) => parts.map((one) => one[key]))
      .map((each) => (merge === 'linear' ? each.reduce((a, b) => a + b, 0) : Math.max(...each)));
  return {
    adapter: {
      name: namesOf(parts),
      rankMax,
      rankCurve: costs.map((_, i) => meanEnergy(manifests, i)),
      ranks: total('ranks'),
      pages: total('pages'),
    },
    system: underneath,
  };
}

/** At a rank ≥ 1. Where tokens choose among ranks or mix them, every rank is computed to choose from. */
function costOf(manifest: AdapterManifest, rank: number): { ranks: number; pages: number } {
  const { kind, rankMax } = manifest;
  const ranks = choosingKinds.includes(kind) ? rankMax : Math.min(rank, rankMax);
  return { ranks, pages: Math.ceil(ranksStored(manifest, ranks) / pageRanks) };
}

/** Atoms mix all of a queryable adapter's ranks: it has no prefix. */
function rankOf({ kind, rankMax }: AdapterManifest, rank: number): number {
  return kind === 'queryable' && rank > 0 ? rankMax : Math.min(rank, rankMax);
}

/** Ranks of the module that has most of them at a level. */
function ranksStored({ levels }: AdapterManifest, level: number): number {
  if (levels === null) return level;
  return Math.max(...levels.map((one) => one.filter((from) => from <= level).length));
}

/** Parts count alike: their energies are not of one scale that could be compared. */
function meanEnergy(manifests: readonly AdapterManifest[], index: number): number {
  const kept = manifests.map(({ rankCurve }) => rankCurve[index] ?? 1);
  return kept.reduce((sum, share) => sum + share, 0) / kept.length;
}

export function namesOf(parts: readonly TargetPart[]): string {
  return parts.map(({ lease }) => lease.name).join();
}

/** One adapter as it was used: what headers and the `rankgate` object tell of it. */
export interface UsedAdapter {
  readonly id: string;
  readonly generation: Generation;
  readonly rank: number;
  readonly rankMax: number;
  readonly weight: number;
}

/** The system adapter last, when the plan has it. */
export function usedAdapters({ parts, system }: Target, plan: Plan): readonly UsedAdapter[] {
  const used = ({ lease, weight }: TargetPart, rank: number): UsedAdapter => {
    const { name: id, generation, manifest } = lease;
    const { rankMax } = manifest;
    return { id, generation, rank: rankOf(manifest, rank), rankMax, weight };
  };
  const under = plan.hasSystem && system !== null ? [{ lease: system, weight: 1 }] : [];
  return [
    ...parts.map((part) => used(part, plan.rank)),
    ...under.map((part) => used(part, part.lease.manifest.rankMax)),
  ];
}

/** `prior`: the instruction in tokens. */
export function engineUse(
  target: Target,
  plan: Plan,
  prior: AdapterUse['prior'],
): AdapterUse | null {
  const used = usedAdapters(target, plan).map(({ id, rankMax, ...part }) => part);
  if (used.length === 0) return null;
  const { merge, density, flyTopK, parts } = target;
  const system = used[parts.length] ?? null;
  return { parts: used.slice(0, parts.length), merge, density, flyTopK, prior, system };
}
