// POST /v1/adapters: an adapter from an upload, from the hub, or from a directory of this machine inside the configured
// root (faults.md B36, B37). A name is checked before anything is received for it, and again after the import.

import { mkdir, open, realpath, rm } from 'node:fs/promises';
import { isAbsolute, resolve, sep } from 'node:path';
import type { Context } from 'hono';
import { z } from 'zod';
import type { Generation } from '../adapters/adapter.ts';
import { fetchHubAdapter, parseHubAdapter } from '../adapters/hub-adapter.ts';
import type { AdapterRecord } from '../adapters/registry.ts';
import { type ErrorCode, GatewayError } from '../errors.ts';
import {
  adapterName,
  describeAdapter,
  generationField,
  isReserved,
  unloadUnused,
} from './adapters.ts';
import type { ServerDeps } from './deps.ts';
import type { Env, Handle } from './env.ts';
import { readBody, unsupportedMedia } from './limits.ts';
import { boundaryOf } from './multipart.ts';
import { invalidRequest } from './problem.ts';
import { parseBody } from './schemas.ts';
import { checkMayName } from './tenancy.ts';
import { createFolders, receiveUpload, type UploadFiles } from './upload.ts';

export const directoryName: z.ZodString = z.string().min(1).max(1024);
const fields = {
  name: adapterName,
  accept_base_name: z.string().min(1).max(256).exactOptional(),
  if_generation: generationField.exactOptional(),
  levels: z.literal('uniform').exactOptional(),
};
const addSchema = z.strictObject({
  ...fields,
  source: directoryName,
  replace: z.boolean().exactOptional(),
});
const uploadSchema: z.ZodType<Addition> = z.strictObject({
  ...fields,
  replace: z
    .enum(['true', 'false'])
    .transform((text) => text === 'true')
    .exactOptional(),
});

export interface Addition {
  name: string;
  accept_base_name?: string;
  if_generation?: Generation;
  levels?: 'uniform';
  replace?: boolean;
}

export function createAddAdapter(files: UploadFiles = { mkdir, open, rm }): Handle {
  const inFolder = createFolders(files);
  return async function addAdapter(c, deps) {
    const type = c.req.header('content-type') ?? '';
    if (/^multipart\//i.test(type)) {
      const boundary = boundaryOf(type);
      if (boundary === null) throw unsupportedMedia('want multipart/form-data with a boundary');
      return inFolder(c, deps, async (folder) => {
        const { accepted: addition, ...upload } = await receiveUpload(c, deps, {
          boundary,
          folder,
          files,
          accept(texts) {
            const addition = parseBody(uploadSchema, texts);
            checkTarget(c, deps, addition);
            return addition;
          },
        });
        return answer(c, await publishAdapter(c, deps, addition, folder), { upload });
      });
    }
    const { source, ...addition } = await readBody(c, deps, addSchema);
    checkTarget(c, deps, addition);
    if (!source.startsWith('hf:')) {
      const directory = await localDirectory(c, deps, source, 'source');
      return answer(c, await publishAdapter(c, deps, addition, directory), {});
    }
    const wanted = parseHubAdapter(source);
    return inFolder(c, deps, async (folder) => {
      const commit = await fetchHubAdapter(wanted, folder, hubOptions(c, deps)).catch(hubError(c));
      return answer(c, await publishAdapter(c, deps, addition, folder), { commit });
    });
  };
}

interface Published {
  readonly adapter: object;
  readonly isNew: boolean;
}

const answer = (c: Context<Env>, { adapter, isNew }: Published, more: object): Response =>
  c.json({ ...adapter, ...more }, isNew ? 201 : 200);

/** Imports and points the name at the result. A failure leaves the name as it was. */
export async function publishAdapter(
  c: Context<Env>,
  deps: ServerDeps,
  addition: Addition,
  directory: string,
): Promise<Published> {
  const { registry, importer } = deps;
  const { name, accept_base_name: acceptBaseName, if_generation: expected = null } = addition;
  const { generation, warnings } = await importer.importPeft(directory, {
    ...(acceptBaseName === undefined ? {} : { acceptBaseName }),
    ...(addition.levels === undefined ? {} : { levels: addition.levels }),
  });
  // Again: the import took seconds, and create and swap are where a race is decided.
  const before = checkTarget(c, deps, addition);
  const record =
    before === null ? registry.create(name, generation) : registry.swap(name, generation, expected);
  if (before !== null) unloadUnused(before.generation, deps);
  return { adapter: { ...describeAdapter(record, deps), warnings }, isNew: before === null };
}

/** What the name is now, null when it is free. Throws when the addition may not have it. */
export function checkTarget(
  c: Context<Env>,
  deps: ServerDeps,
  { name, replace = false, if_generation: expected }: Addition,
): AdapterRecord | null {
  if (expected !== undefined && !replace) {
    throw invalidRequest('if_generation needs replace: true', 'if_generation');
  }
  checkMayName(name, c.get('caller'));
  const existing = deps.registry.find(name);
  if (isReserved(name, deps) || (existing !== null && !replace)) {
    throw new GatewayError('ADAPTER_EXISTS', `the name '${name}' is taken`, { param: 'name' });
  }
  if (existing === null && expected !== undefined) {
    throw new GatewayError('GENERATION_MISMATCH', `'${name}' does not exist`, { param: 'name' });
  }
  return existing;
}

/** The real path of a source inside the root. What lies outside is refused alike whether it exists or not. */
export async function localDirectory(
  c: Context<Env>,
  { config }: ServerDeps,
  source: string,
  param: string,
): Promise<string> {
  const refuse = (code: ErrorCode, message: string, cause?: unknown): never => {
    throw new GatewayError(code, message, { param, cause });
  };
  const outside = (): never => refuse('FORBIDDEN', 'the source is outside the adapters root');
  // Directories have no tenant: one could read what another put there.
  if (!c.get('caller').isOperator) refuse('FORBIDDEN', 'only the operator adds from a directory');
  if (source.includes('\0')) refuse('INVALID_REQUEST', 'a path holds no NUL');
  if (!isAbsolute(source) && /^[a-z][a-z0-9+.-]*:/i.test(source)) {
    refuse('UNSUPPORTED', 'only directories on this machine and hf: are supported');
  }
  const root = config.adaptersRoot;
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

function hubOptions(
  c: Context<Env>,
  { config }: ServerDeps,
): Parameters<typeof fetchHubAdapter>[2] {
  const { hubUrl, hubToken, uploadBytesMax, uploadMsMax } = config;
  return {
    weightsBytesMax: uploadBytesMax,
    ...(hubUrl === null ? {} : { hubUrl }),
    // The token opens the operator's private repositories, to the operator.
    ...(hubToken === null || !c.get('caller').isOperator ? {} : { hubToken }),
    signal: AbortSignal.any([c.req.raw.signal, AbortSignal.timeout(uploadMsMax)]),
  };
}

const hubError =
  (c: Context<Env>) =>
  (error: unknown): never => {
    if (error instanceof GatewayError) throw error;
    if (c.req.raw.signal.aborted) throw new GatewayError('CANCELLED', 'the client went away');
    throw new GatewayError('NO_CAPACITY', 'the hub took too long', { cause: error });
  };
