// The adapter calls: add from a directory inside the configured root, list, show, swap by compare-and-swap, roll back,
// remove, export a prefix as PEFT. Names are registry keys; the only path a client can give is jailed (faults.md B36, B37).

import { realpath } from 'node:fs/promises';
import { isAbsolute, resolve, sep } from 'node:path';
import type { Context } from 'hono';
import { z } from 'zod';
import {
  type AdapterManifest,
  type Generation,
  isAdapterName,
  isGeneration,
} from '../adapters/adapter.ts';
import type { AdapterRecord } from '../adapters/registry.ts';
import { type ErrorCode, GatewayError } from '../errors.ts';
import type { ServerDeps } from './deps.ts';
import type { Env } from './env.ts';
import { readBody } from './limits.ts';
import { invalidRequest } from './problem.ts';
import { packTar } from './tar.ts';

export const adapterName: z.ZodString = z
  .string()
  .refine(
    isAdapterName,
    'an adapter name is 1 to 64 of a-z 0-9 . _ - and starts with a letter or digit',
  );
export const directoryName: z.ZodString = z.string().min(1).max(1024);
const generation = z.custom<Generation>(
  (value) => typeof value === 'string' && isGeneration(value),
  'want sha256: and 64 hex digits',
);
const swapSchema = z.strictObject({ generation });
const addSchema: z.ZodType<Addition> = z.strictObject({
  name: adapterName,
  source: directoryName,
  accept_base_name: z.string().min(1).max(256).exactOptional(),
  if_generation: generation.exactOptional(),
  replace: z.boolean().exactOptional(),
});

export interface Addition {
  name: string;
  source: string;
  accept_base_name?: string;
  if_generation?: Generation;
  replace?: boolean;
}

export function listAdapters(c: Context<Env>, deps: ServerDeps): Response {
  const data = deps.registry.list().map((record) => describeAdapter(record, deps));
  return c.json({ object: 'list', data });
}

export function showAdapter(c: Context<Env>, deps: ServerDeps): Response {
  return c.json(describeAdapter(recordOf(c, deps), deps));
}

export function rollBackAdapter(c: Context<Env>, deps: ServerDeps): Response {
  const before = recordOf(c, deps);
  const after = deps.registry.rollback(before.name);
  unloadUnused(before.generation, deps);
  return c.json(describeAdapter(after, deps));
}

export function deleteAdapter(c: Context<Env>, deps: ServerDeps): Response {
  const record = recordOf(c, deps);
  removeAdapter(record, expectedOf(c), deps);
  return c.json({ id: record.name, object: 'adapter', deleted: true });
}

export async function addAdapter(c: Context<Env>, deps: ServerDeps): Promise<Response> {
  const body = await readBody(c, deps, addSchema);
  if (body.if_generation !== undefined && body.replace !== true) {
    throw invalidRequest('if_generation needs replace: true', 'if_generation');
  }
  const { record, warnings, isNew } = await publishAdapter(deps, body, 'source');
  return c.json({ ...describeAdapter(record, deps), warnings }, isNew ? 201 : 200);
}

/** Imports and points the name at the result. A failure leaves the name as it was. `sourceParam` is the field that errors
 *  about the source name. */
export async function publishAdapter(
  deps: ServerDeps,
  addition: Addition,
  sourceParam: string,
): Promise<{ record: AdapterRecord; warnings: readonly string[]; isNew: boolean }> {
  const { registry, importer, config } = deps;
  const { name, accept_base_name: acceptBaseName, if_generation: expected = null } = addition;
  const toReplace = (): AdapterRecord | null => {
    const existing = registry.find(name);
    if (name !== config.modelName && (existing === null || addition.replace)) return existing;
    throw new GatewayError('ADAPTER_EXISTS', `the name '${name}' is taken`, { param: 'name' });
  };
  toReplace();
  const directory = await jailedDirectory(addition.source, config.adaptersRoot, sourceParam);
  const options = acceptBaseName === undefined ? {} : { acceptBaseName };
  const { generation, warnings } = await importer.importPeft(directory, options);
  // Read again: the import took seconds, and create and swap are where a race is decided.
  const before = toReplace();
  if (before !== null) {
    const record = registry.swap(name, generation, expected);
    unloadUnused(before.generation, deps);
    return { record, warnings, isNew: false };
  }
  if (expected !== null) {
    throw new GatewayError('GENERATION_MISMATCH', `'${name}' does not exist`, { param: 'name' });
  }
  return { record: registry.create(name, generation), warnings, isNew: true };
}

/** The real path of a source inside the root. What lies outside is refused alike whether it exists or not. */
async function jailedDirectory(source: string, root: string, param: string): Promise<string> {
  const refuse = (code: ErrorCode, message: string, cause?: unknown): never => {
    throw new GatewayError(code, message, { param, cause });
  };
  const outside = (): never => refuse('FORBIDDEN', 'the source is outside the adapters root');
  if (source.includes('\0')) refuse('INVALID_REQUEST', 'a path holds no NUL');
  if (!isAbsolute(source) && /^[a-z][a-z0-9+.-]*:/i.test(source)) {
    refuse('UNSUPPORTED', 'only directories on this machine are supported');
  }
  const realRoot = await realpath(root).catch((cause: unknown) =>
    refuse('FORBIDDEN', 'the adapters root does not exist', cause),
  );
  const lexical = resolve(root, source);
  if (![resolve(root), realRoot].some((jail) => lexical.startsWith(jail + sep))) outside();
  const real = await realpath(lexical).catch((cause: unknown) =>
    refuse('INVALID_ADAPTER', 'there is no adapter directory at the source', cause),
  );
  return real.startsWith(realRoot + sep) ? real : outside();
}

export async function swapAdapter(c: Context<Env>, deps: ServerDeps): Promise<Response> {
  const before = recordOf(c, deps);
  const body = await readBody(c, deps, swapSchema);
  const record = deps.registry.swap(before.name, body.generation, expectedOf(c));
  unloadUnused(before.generation, deps);
  return c.json(describeAdapter(record, deps));
}

export function removeAdapter(
  record: AdapterRecord,
  expected: Generation | null,
  deps: ServerDeps,
): void {
  deps.registry.remove(record.name, expected);
  unloadUnused(record.generation, deps);
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
  const folder = `${record.name}-r${rank}`;
  const archive = packTar(
    [
      { name: `${folder}/adapter_config.json`, bytes: Buffer.from(files.config) },
      { name: `${folder}/adapter_model.safetensors`, bytes: files.weights },
    ],
    record.updatedS,
  );
  c.header('content-type', 'application/x-tar');
  c.header('content-disposition', `attachment; filename="${folder}.tar"`);
  c.header('x-adapter-generation', lease.generation);
  return c.body(archive);
}

function recordOf(c: Context<Env>, { registry }: ServerDeps): AdapterRecord {
  const name = c.req.param('name') ?? '';
  const record = isAdapterName(name) ? registry.find(name) : null;
  if (record === null) throw new GatewayError('ADAPTER_NOT_FOUND', 'there is no such adapter');
  return record;
}

/** If-Match, with or without an entity tag's quotes. */
function expectedOf(c: Context<Env>): Generation | null {
  const header = c.req.header('if-match');
  if (header === undefined || header === '*') return null;
  const generation = header.replace(/^"(.*)"$/, '$1');
  if (isGeneration(generation)) return generation;
  throw invalidRequest('if-match: one generation is wanted', 'if-match');
}

/** The engine forgets a generation that no name points at; sequences that run with it keep it to their end. */
function unloadUnused(generation: Generation, { registry, engine }: ServerDeps): void {
  if (registry.list().every((record) => record.generation !== generation)) {
    engine.unload(generation);
  }
}

function describeAdapter(record: AdapterRecord, { registry, engine }: ServerDeps): object {
  const { manifest } = record;
  const resident = engine.stats().residents.find((one) => one.generation === record.generation);
  return {
    object: 'adapter',
    name: record.name,
    generation: record.generation,
    previous: record.previous,
    kind: manifest.kind,
    rank_max: manifest.rankMax,
    rank_curve: manifest.rankCurve,
    modules: manifest.modules.length,
    bytes: record.bytes,
    updated: record.updatedS,
    leases: registry.leases(record.generation),
    residency:
      resident === undefined
        ? { tier: 'disk' }
        : { tier: 'slot', rank: resident.rank, bytes: resident.bytes, uses: resident.uses },
    source: sourceView(manifest.source),
  };
}

function sourceView(source: AdapterManifest['source']): object {
  if (source.format === 'rankgate') return source;
  const { format, rank, alpha, rslora, targetModules, baseName } = source;
  return { format, rank, alpha, rslora, target_modules: targetModules, base_name: baseName };
}
