// A multipart upload into a folder of its own, hashed as it arrives, which is gone when its import is over, whatever happened
// in between. Uploads and downloads are few at a time, for all and for each tenant; beyond, 429.

import { createHash } from 'node:crypto';
import { constants, type promises } from 'node:fs';
import { join } from 'node:path';
import type { Context } from 'hono';
import { configBytesMax } from '../adapters/peft-config.ts';
import { GatewayError } from '../errors.ts';
import type { ServerDeps } from './deps.ts';
import type { Env } from './env.ts';
import { checkUncompressed, pacedBytes, paceOf } from './limits.ts';
import { type Part, readMultipart, readText } from './multipart.ts';
import { invalidRequest } from './problem.ts';

/** The calls that receiving makes: tests make one fail. */
export type UploadFiles = Pick<typeof promises, 'mkdir' | 'open' | 'rm'>;

/** Runs `work` with a folder of its own, which is gone when it ends. */
export function createFolders(
  files: UploadFiles,
): (
  c: Context<Env>,
  deps: ServerDeps,
  work: (folder: string) => Promise<Response>,
) => Promise<Response> {
  const open = new Map<string, number>();
  return async function inFolder(c, { config, lifecycle, random }, work) {
    const tenant = c.get('tenant');
    const own = open.get(tenant) ?? 0;
    const all = [...open.values()].reduce((sum, count) => sum + count, 0);
    if (lifecycle.isDraining) {
      throw new GatewayError('NO_CAPACITY', 'the server is shutting down', { retryAfterS: 5 });
    }
    if (all >= config.uploadsMax || own >= Math.ceil(config.uploadsMax / 2)) {
      throw new GatewayError('CONTENDED', `${own} uploads are under way`, { retryAfterS: 5 });
    }
    open.set(tenant, own + 1);
    const folder = join(config.uploadRoot, random.id());
    try {
      await files.mkdir(folder, { recursive: true, mode: 0o700 }).catch(storeError);
      return await work(folder);
    } finally {
      await files.rm(folder, { recursive: true, force: true }).catch(() => {}); // The next start empties the root.
      const left = open.get(tenant)! - 1;
      if (left > 0) open.set(tenant, left);
      else open.delete(tenant);
    }
  };
}

interface Receiving<T> {
  readonly boundary: string;
  readonly folder: string;
  readonly files: UploadFiles;
  /** Judges the fields before a file is received; throws. */
  readonly accept: (fields: Readonly<Record<string, string>>) => T;
}

interface Received<T> {
  readonly accepted: T;
  /** Of the file with the weights: the sender can tell that what arrived is what it sent. */
  readonly bytes: number;
  readonly sha256: string;
}

/** What an import reads: the weights, and one that says what they are. */
const weightsFile = 'adapter_model.safetensors';
const configFiles = ['adapter_config.json', 'rankgate.json'];

/** Fields first, so that a taken name is refused before gigabytes are sent for it; then the files. */
export async function receiveUpload<T>(
  c: Context<Env>,
  { config, clock }: ServerDeps,
  { boundary, folder, files, accept }: Receiving<T>,
): Promise<Received<T>> {
  const { uploadBytesMax } = config;
  const bytesMaxOf = new Map([
    ...configFiles.map((name) => [name, configBytesMax] as const),
    [weightsFile, uploadBytesMax] as const,
  ]);
  checkUncompressed(c.req.raw.headers);
  const body = pacedBytes(c.req.raw, clock, paceOf(uploadBytesMax + 2 * configBytesMax));
  const texts = new Map<string, string>();
  const received = new Map<string, { bytes: number; sha256: string }>();
  let accepted: { readonly value: T } | null = null;
  for await (const part of readMultipart(body, boundary)) {
    if (texts.has(part.name) || received.has(part.name)) {
      throw invalidRequest(`${part.name} is there twice`, part.name);
    }
    const bytesMax = bytesMaxOf.get(part.name);
    if (bytesMax === undefined) {
      if (accepted !== null) throw invalidRequest('fields come before files', part.name);
      texts.set(part.name, await readText(part, 1024));
      continue;
    }
    accepted ??= { value: accept(Object.fromEntries(texts)) };
    const path = join(folder, part.name);
    received.set(part.name, await writePart(part, { path, bytesMax, files }));
  }
  const weights = received.get(weightsFile);
  if (accepted === null || weights === undefined || received.size !== 2) {
    const wanted = `${configFiles.join(' or ')}, and ${weightsFile}`;
    throw invalidRequest(`the files that are wanted: ${wanted}`, weightsFile);
  }
  return { accepted: accepted.value, ...weights };
}

async function writePart(
  part: Part,
  to: { readonly path: string; readonly bytesMax: number; readonly files: UploadFiles },
): Promise<{ bytes: number; sha256: string }> {
  const flags = constants.O_WRONLY | constants.O_CREAT | constants.O_EXCL;
  const file = await to.files.open(to.path, flags, 0o600).catch(storeError);
  const hash = createHash('sha256');
  let bytes = 0;
  try {
    for await (const chunk of part.body) {
      bytes += chunk.length;
      if (bytes > to.bytesMax) {
        const message = `${part.name} is larger than ${to.bytesMax} bytes`;
        throw new GatewayError('PAYLOAD_TOO_LARGE', message, { param: part.name });
      }
      hash.update(chunk);
      await file.writeFile(chunk).catch(storeError);
    }
  } finally {
    await file.close().catch(() => {}); // Nothing here has to outlast a crash.
  }
  return { bytes, sha256: hash.digest('hex') };
}

export function storeError(cause: unknown): never {
  const code = (cause as NodeJS.ErrnoException).code;
  const isFull = code === 'ENOSPC' || code === 'EDQUOT';
  throw new GatewayError(isFull ? 'DISK_FULL' : 'INTERNAL', 'the upload cannot be kept', { cause });
}
