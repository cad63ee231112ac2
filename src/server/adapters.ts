// The adapter calls but for adding (add-adapter.ts): list, show, swap by compare-and-swap, roll back, alias, pin, remove,
// export a prefix as PEFT. Names are registry keys, never paths.

import type { Context } from 'hono';
import { z } from 'zod';
import {
  type AdapterManifest,
  type Generation,
  isAdapterName,
  isGeneration,
} from '../adapters/adapter.ts';
import { aurac } from '../adapters/aurac.ts';
import type { AdapterRecord } from '../adapters/registry.ts';
import { GatewayError } from '../errors.ts';
import type { ServerDeps } from './deps.ts';
import type { Env } from './env.ts';
import { readBody } from './limits.ts';
import { invalidRequest } from './problem.ts';
import { packTar } from './tar.ts';

export const adapterName: z.ZodString = z
  .string()
  .refine(
    isAdapterName,
    'an adapter name is 1 to 64 of a-z 0-9 . _ - and starts with a letter or digit; before it tenant/ or nothing',
  );
export const generationField: z.ZodType<Generation> = z.custom<Generation>(
  (value) => typeof value === 'string' && isGeneration(value),
  'want sha256: and 64 hex digits',
);
const swapSchema = z.strictObject({ generation: generationField });
const aliasSchema = z.strictObject({ target: adapterName });

export function listAdapters(c: Context<Env>, deps: ServerDeps): Response {
  const data = deps.registry.list().map((record) => describeAdapter(record, deps));
  return c.json({ object: 'list', data });
}

/** One name with everything that it can be rolled back to. */
export function showAdapter(c: Context<Env>, deps: ServerDeps): Response {
  const record = recordOf(c, deps);
  const generations = [record.generation, ...record.previous].map((generation) => ({
    generation,
    ...describeGeneration(generation, deps),
  }));
  return c.json({ ...describeAdapter(record, deps), generations });
}

export function rollBackAdapter(c: Context<Env>, deps: ServerDeps): Response {
  const before = recordOf(c, deps);
  const after = deps.registry.rollback(nameOf(c));
  unloadUnused(before.generation, deps);
  return c.json(describeAdapter(after, deps));
}

export function pinAdapter(c: Context<Env>, deps: ServerDeps): Response {
  recordOf(c, deps);
  const record = deps.registry.pin(nameOf(c));
  deps.engine.pin(deps.registry.pinned());
  return c.json(describeAdapter(record, deps));
}

export function unpinAdapter(c: Context<Env>, deps: ServerDeps): Response {
  recordOf(c, deps);
  const record = deps.registry.unpin(nameOf(c));
  deps.engine.pin(deps.registry.pinned());
  return c.json(describeAdapter(record, deps));
}

export async function aliasAdapter(c: Context<Env>, deps: ServerDeps): Promise<Response> {
  const { target } = await readBody(c, deps, aliasSchema);
  const name = nameOf(c);
  if (isReserved(name, deps)) {
    throw new GatewayError('ADAPTER_EXISTS', `the name '${name}' is taken`, { param: 'name' });
  }
  return c.json(describeAdapter(deps.registry.alias(name, target), deps));
}

export function deleteAdapter(c: Context<Env>, deps: ServerDeps): Response {
  const { generation } = recordOf(c, deps);
  removeAdapter({ name: nameOf(c), generation }, expectedOf(c), deps);
  return c.json({ id: nameOf(c), object: 'adapter', deleted: true });
}

export async function swapAdapter(c: Context<Env>, deps: ServerDeps): Promise<Response> {
  const before = recordOf(c, deps);
  const { generation } = await readBody(c, deps, swapSchema);
  if (!c.get('caller').isOperator && !isReachable(generation, deps)) {
    throw new GatewayError('ADAPTER_NOT_FOUND', `no adapter has the generation ${generation}`);
  }
  const record = deps.registry.swap(nameOf(c), generation, expectedOf(c));
  unloadUnused(before.generation, deps);
  return c.json(describeAdapter(record, deps));
}

export function removeAdapter(
  { name, generation }: Pick<AdapterRecord, 'name' | 'generation'>,
  expected: Generation | null,
  deps: ServerDeps,
): void {
  deps.registry.remove(name, expected);
  unloadUnused(generation, deps);
}

/** Has or had one of the names that the caller sees it? To know a hash is not enough. */
function isReachable(generation: Generation, { registry }: ServerDeps): boolean {
  return registry
    .list()
    .some((record) => [record.generation, ...record.previous].includes(generation));
}

export async function exportAdapter(c: Context<Env>, deps: ServerDeps): Promise<Response> {
  const record = recordOf(c, deps);
  const { rankMax } = record.manifest;
  const unknown = Object.keys(c.req.query()).find((key) => key !== 'rank');
  if (unknown !== undefined) throw invalidRequest('the only parameter is rank');
  const [asked = String(rankMax), second] = c.req.queries('rank') ?? [];
  if (second !== undefined) throw invalidRequest('rank: one is wanted', 'rank');
  const rank = /^[1-9]\d{0,3}$/.test(asked) ? Number(asked) : Number.NaN;
  if (!(rank <= rankMax)) throw invalidRequest(`rank: an integer from 1 to ${rankMax}`, 'rank');
  // Leased: the blob must outlast a swap or a removal that comes in between.
  using lease = deps.registry.lease(record.name);
  const files = await deps.importer.exportPeft(lease.generation, rank);
  const folder = `${record.name.replace(/^.*\//, '')}-r${rank}`;
  const archive = packTar(
    [
      { name: `${folder}/${files.configName}`, bytes: Buffer.from(files.config) },
      { name: `${folder}/adapter_model.safetensors`, bytes: files.weights },
    ],
    record.updatedS,
  );
  c.header('content-type', 'application/x-tar');
  c.header('content-disposition', `attachment; filename="${folder}.tar"`);
  c.header('x-adapter-generation', lease.generation);
  return c.body(archive);
}

/** The base's, and a route's. */
export const isReserved = (name: string, { config }: ServerDeps): boolean =>
  name === config.modelName || name === 'archive';

/** As the caller put it: an alias, maybe. */
export const nameOf = (c: Context<Env>): string => c.req.param('name') ?? '';

export function recordOf(c: Context<Env>, { registry }: ServerDeps): AdapterRecord {
  const name = nameOf(c);
  const record = isAdapterName(name) ? registry.find(name) : null;
  if (record === null) throw new GatewayError('ADAPTER_NOT_FOUND', 'there is no such adapter');
  return record;
}

/** If-Match, with or without an entity tag's quotes. */
export function expectedOf(c: Context<Env>): Generation | null {
  const header = c.req.header('if-match');
  if (header === undefined || header === '*') return null;
  const generation = header.replace(/^"(.*)"$/, '$1');
  if (isGeneration(generation)) return generation;
  throw invalidRequest('if-match: one generation is wanted', 'if-match');
}

/** After a name left a generation: the engine forgets it when no name points at it, while sequences that run with it keep it
 *  to their end; and a pin goes with its name. */
export function unloadUnused(
  generation: Generation,
  { registry, engine }: Pick<ServerDeps, 'registry' | 'engine'>,
): void {
  engine.pin(registry.pinned());
  if (!registry.isNamed(generation)) engine.unload(generation);
}

export function describeAdapter(record: AdapterRecord, deps: ServerDeps): object {
  const { name, generation, previous, aliases, isPinned, updatedS } = record;
  return {
    object: 'adapter',
    name,
    generation,
    previous,
    aliases,
    pinned: isPinned,
    updated: updatedS,
    ...describeGeneration(generation, deps),
  };
}

function describeGeneration(generation: Generation, { registry, engine }: ServerDeps): object {
  const stored = registry.stored(generation);
  if (stored === null) throw new GatewayError('INTERNAL', `${generation} is named, not stored`);
  const { manifest, bytes } = stored;
  const { needs } = manifest.options;
  const { residents, hosted = [] } = engine.stats();
  const resident = residents.find((one) => one.generation === generation);
  return {
    kind: manifest.kind,
    describe: manifest.describe,
    rank_max: manifest.rankMax,
    rank_curve: manifest.rankCurve,
    aurac: aurac(
      manifest.rankCurve.map((_, i) => i + 1),
      manifest.rankCurve,
    ),
    levels: manifest.levels === null ? 'uniform' : 'by-module',
    modules: manifest.modules.length,
    needs,
    needs_describe: needs === null ? null : (registry.stored(needs)?.manifest.describe ?? null),
    bytes,
    leases: registry.leases(generation),
    residency:
      resident === undefined
        ? { tier: hosted.includes(generation) ? 'host' : 'disk' }
        : { tier: 'slot', rank: resident.rank, bytes: resident.bytes, uses: resident.uses },
    source: sourceView(manifest.source),
  };
}

function sourceView(source: AdapterManifest['source']): object {
  if (source.format === 'rankgate') return source;
  const { format, rank, alpha, rslora, targetModules, baseName } = source;
  return { format, rank, alpha, rslora, target_modules: targetModules, base_name: baseName };
}
