// `bench tenants`: a thousand tenants of one base, each with an adapter of its own that is mostly shared: svfit (a number a
// rank; the base's singular directions are one file for all) and fly (A is made from a seed). What a tenant takes on disk and
// in memory, and what traffic that names every tenant costs against the same traffic for one.

import { statSync } from 'node:fs';
import {
  type FamilyOptions,
  type Generation,
  noOptions,
  type PackedKind,
} from '../src/adapters/adapter.ts';
import { blobPath, createBlobStore } from '../src/adapters/blobs.ts';
import { createPacker } from '../src/adapters/pack.ts';
import type { ServedModule } from '../src/adapters/served.ts';
import { type Projection, projectionShape, projections } from '../src/model/decoder-config.ts';
import { createRandom } from './adapter-numbers.ts';
import type { EngineSizes, JobResult, ServedRequest, ServeJob } from './job.ts';
import {
  type Entrant,
  median,
  type Report,
  round,
  runRounds,
  type Series,
  seriesOf,
} from './measure.ts';
import { type PackedBase, readBase } from './packed-adapters.ts';
import { takeTokens } from './prompts.ts';
import type { EngineSettings } from './residency.ts';
import { SideProcess } from './side-process.ts';

export interface TenantsSizes {
  readonly tenants: number;
  readonly svfitRank: number;
  readonly flyRank: number;
  readonly flyTopK: number;
  /** Fly adapters that fit in memory at once: each has pages of its own. */
  readonly flyRoom: number;
  readonly streams: number;
  readonly requests: number;
  readonly promptTokens: number;
  readonly newTokens: number;
}

const fullTenants: TenantsSizes = {
  tenants: 1000,
  svfitRank: 64,
  flyRank: 32,
  flyTopK: 8,
  flyRoom: 24,
  streams: 8,
  requests: 64,
  promptTokens: 32,
  newTokens: 64,
};

type Kind = 'svfit' | 'fly';
const flyTargets = ['attn_q', 'attn_v'] as const; // a thousand on all seven are 10 GB

export async function benchTenants(
  settings: EngineSettings,
  rounds: number,
  sizes: TenantsSizes = fullTenants,
): Promise<Report> {
  const { folder, ...common } = settings;
  const base = await readBase(settings.modelPath);
  const stored: Record<Kind, readonly Generation[]> = {
    svfit: await storeSvfit(folder, base, sizes),
    fly: await storeFly(folder, base, sizes),
  };
  const bytesOf = (generation: Generation): number => statSync(blobPath(folder, generation)).size;
  const random = createRandom(3);
  const drawn = Array.from({ length: sizes.requests }, () => random() % sizes.tenants);
  const lengths = drawn.map(() => Math.ceil(sizes.newTokens / 2) + (random() % sizes.newTokens));
  const job = (tenantOf: (i: number) => number): ServeJob => ({
    kind: 'serve',
    streams: sizes.streams,
    newTokens: lengths,
    requests: drawn.map(
      (_, i): ServedRequest => ({
        adapter: tenantOf(i),
        prompt: takeTokens(sizes.promptTokens, 7 * i),
      }),
    ),
  });
  const sides: SideProcess[] = [];
  try {
    const entrants: Entrant[] = [];
    for (const kind of ['svfit', 'fly'] as const) {
      const rank = kind === 'svfit' ? sizes.svfitRank : sizes.flyRank;
      const pages = kind === 'svfit' ? rank / 8 : (sizes.flyRoom * rank) / 8;
      const engine: EngineSizes = {
        ...{ modelHash: base.hash, blobDirectory: folder },
        ...{ generations: stored[kind], rank, pages },
      };
      const streamTokensMax = sizes.promptTokens + 2 * sizes.newTokens;
      const own = { adapters: [], streamsMax: sizes.streams, streamTokensMax, engine };
      const side = await SideProcess.open('engine', { ...common, ...own });
      sides.push(side);
      entrants.push({ name: `${kind}_one`, side, job: job(() => 0) });
      entrants.push({ name: `${kind}_all`, side, job: job((i) => drawn[i]!) });
    }
    const summary = summariseTenants(await runRounds(entrants, rounds), {
      svfit: bytesOf(stored.svfit[0]!),
      fly: bytesOf(stored.fly[0]!),
      svfitLora: loraBytes(base, 16, projections),
      flyLora: loraBytes(base, sizes.flyRank, flyTargets),
    });
    return {
      ...summary,
      sides: Object.fromEntries(entrants.map(({ name, side }) => [name, side.description])),
    };
  } finally {
    for (const side of sides) await side.close();
  }
}

function summariseTenants(
  results: ReadonlyMap<string, readonly JobResult[]>,
  bytes: Readonly<Record<Kind | 'svfitLora' | 'flyLora', number>>,
): Omit<Report, 'sides'> {
  const rates = (name: string): number[] =>
    results.get(name)!.map(({ samples }) => (1000 * samples.tokens![0]!) / samples.busyMs![0]!);
  const series: Record<string, Series> = {};
  const figures: Record<string, number> = {};
  for (const kind of ['svfit', 'fly'] as const) {
    const [one, all] = [rates(`${kind}_one`), rates(`${kind}_all`)];
    series[`${kind}_one`] = seriesOf('tokens/s', one);
    series[`${kind}_all`] = seriesOf('tokens/s', all);
    figures[`bytes_per_tenant_${kind}`] = bytes[kind];
    figures[`bytes_to_lora_${kind}`] = round(bytes[kind] / bytes[`${kind}Lora`]);
    figures[`throughput_ratio_${kind}`] = round(median(all) / median(one));
  }
  return {
    bench: 'tenants',
    figures,
    series,
    notes: [
      'bytes_per_tenant: the packed file of one tenant; what all share (svfit: a basis) is one file more',
      'bytes_to_lora: over a LoRA, of rank 16 on all seven projections for svfit (rank 64 of the base), of the same rank on q and v for fly',
      'throughput_ratio: tokens/s while every request names a tenant drawn from all, over the same requests for one tenant; both while every stream has a request',
      'the basis has seeded numbers in place of the base’s singular vectors, and no fly adapter was trained: nothing that is measured depends on either',
    ],
  };
}

type Numbers = Pick<ServedModule, 'rank' | 'a' | 'b' | 'gates' | 'bias'>;
/** Uniform in [-1, 1). */
type Draw = () => number;

function uniform(draw: Draw, count: number, deviation: number): Float64Array {
  return Float64Array.from({ length: count }, () => draw() * deviation * Math.sqrt(3));
}

/** A packed file of modules of seeded numbers. */
function pack(
  base: PackedBase,
  { kind, rank, targets = projections, options = {}, seed }: PackedShape,
  make: (draw: Draw, width: number, out: number) => Numbers,
): Uint8Array {
  const packer = createPacker();
  const random = createRandom(seed);
  for (let block = 0; block < base.config.blocks; block++) {
    for (const projection of targets) {
      const sizes = projectionShape(base.config, projection);
      packer.add({
        block,
        projection,
        ...sizes,
        ...make(() => random() / 2 ** 31 - 1, sizes.in, sizes.out),
      });
    }
  }
  return packer.finish({
    ...{ format: 'rankgate-adapter/3', kind, describe: '', levels: null, baseHash: base.hash },
    options: { ...noOptions, ...options },
    rankMax: rank,
    rankCurve: Array.from({ length: rank }, (_, k) => (k + 1) / rank),
    source: { format: 'rankgate', by: 'bench tenants', from: [] },
  }).bytes;
}

interface PackedShape {
  readonly kind: PackedKind;
  readonly rank: number;
  readonly seed: number;
  readonly targets?: readonly Projection[];
  readonly options?: Partial<FamilyOptions>;
}

const pairOf =
  (rank: number) =>
  (draw: Draw, width: number, out: number): Numbers => ({
    rank,
    a: uniform(draw, rank * width, 1 / Math.sqrt(width)),
    b: uniform(draw, rank * out, 0.02),
    gates: null,
    bias: null,
  });

/** A LoRA of the rank and the modules that a tenant's adapter has: what it would take without sharing. */
function loraBytes(base: PackedBase, rank: number, targets: readonly Projection[]): number {
  return pack(base, { kind: 'lora', rank, seed: 1, targets }, pairOf(rank)).length;
}

async function storeSvfit(
  folder: string,
  base: PackedBase,
  { tenants, svfitRank: rank }: TenantsSizes,
): Promise<Generation[]> {
  const blobs = createBlobStore(folder);
  const needs = await blobs.put(pack(base, { kind: 'basis', rank, seed: 1 }, pairOf(rank)));
  const generations: Generation[] = [];
  for (let seed = 1; seed <= tenants; seed++) {
    const shape = { kind: 'svfit', rank, seed, options: { needs } } as const;
    const bytes = pack(base, shape, (draw) => {
      const gates = Float32Array.from(uniform(draw, rank, 0.1));
      return { rank, a: null, b: null, gates, bias: null };
    });
    generations.push(await blobs.put(bytes));
  }
  return generations;
}

async function storeFly(
  folder: string,
  base: PackedBase,
  { tenants, flyRank: rank, flyTopK: topK }: TenantsSizes,
): Promise<Generation[]> {
  const blobs = createBlobStore(folder);
  const generations: Generation[] = [];
  for (let seed = 1; seed <= tenants; seed++) {
    const options = { topK, seed: seed.toString(16).padStart(16, '0') };
    const shape = { kind: 'fly', rank, seed, targets: flyTargets, options } as const;
    const bytes = pack(base, shape, (draw, _, out) => ({
      ...{ rank, a: null, gates: null },
      b: uniform(draw, rank * out, 0.5),
      bias: Float32Array.from(uniform(draw, rank, 0.01)),
    }));
    generations.push(await blobs.put(bytes));
  }
  return generations;
}
