// A model file from the Hugging Face hub: `hf:org/repo/path/file.gguf`. Resumes by Range into a .part file named by the
// content's hash, so that parts of two revisions never mix; checked against the hub's LFS SHA-256 before it is published.

import { createHash } from 'node:crypto';
import { createWriteStream } from 'node:fs';
import { mkdir, open, readFile, rm, stat } from 'node:fs/promises';
import { basename, join } from 'node:path';
import { Readable, Transform } from 'node:stream';
import { pipeline } from 'node:stream/promises';
import { type FileDownloadInfoOutput, fileDownloadInfo, HubApiError } from '@huggingface/hub';
import { GatewayError } from '../errors.ts';
import { renameDurably, sha256OfFile, writeFileDurably } from './file-hash.ts';

export interface HubFile {
  readonly repo: string; // org/name
  readonly path: string;
  readonly revision?: string;
}

export interface HubAccess {
  readonly hubUrl?: string;
  readonly hubToken?: string;
  readonly onProgress?: (progress: { label: string; done: number; total: number }) => void;
  readonly signal?: AbortSignal;
}

export interface HubOptions extends HubAccess {
  readonly dir: string;
}

const fileBytesMax = 256 * 1024 ** 3; // guess: nothing larger runs on one machine of the kind this is for

interface FetchedFile {
  readonly path: string;
  readonly sha256: string;
}

// Each segment starts with a letter or digit: no `..`, no empty part, nothing that URL parsing would fold.
const hubPattern =
  /^hf:([A-Za-z0-9][\w.-]{0,95}\/[A-Za-z0-9][\w.-]{0,95})\/((?:[A-Za-z0-9][\w.-]{0,127}\/){0,4}[A-Za-z0-9][\w.-]{0,127}\.gguf)$/;

export function parseHubSource(source: string): HubFile {
  const match = hubPattern.exec(source);
  if (match === null) {
    throw new GatewayError('INVALID_REQUEST', `model: want hf:org/repo/file.gguf, got ${source}`);
  }
  return { repo: match[1]!, path: match[2]! };
}

export function hubFailure(error: unknown, file: HubFile): GatewayError {
  const status = error instanceof HubApiError ? `answered ${error.statusCode}` : 'is not reachable';
  return new GatewayError('NO_CAPACITY', `the hub ${status} for hf:${file.repo}/${file.path}`, {
    cause: error,
  });
}

/** Throws NO_CAPACITY when the hub cannot be asked, INVALID_REQUEST when it has no such file. */
export async function describeHubFile(
  file: HubFile,
  options: HubAccess,
): Promise<FileDownloadInfoOutput> {
  const info = await fileDownloadInfo({
    repo: { type: 'model', name: file.repo },
    path: file.path,
    revision: file.revision ?? 'main',
    ...(options.hubUrl === undefined ? {} : { hubUrl: options.hubUrl }),
    ...(options.hubToken === undefined ? {} : { accessToken: options.hubToken }),
    fetch: (url, init) => fetch(url, { ...init, signal: options.signal ?? null }),
  }).catch((error: unknown) => {
    if (options.signal?.aborted) throw error;
    throw hubFailure(error, file);
  });
  if (info === null) {
    throw new GatewayError('INVALID_REQUEST', `the hub has no hf:${file.repo}/${file.path}`);
  }
  return info;
}

/** Bytes of the part that are already here; a part longer than the file is of no use. */
async function partBytes(path: string, total: number): Promise<number> {
  const bytes = (await stat(path).catch(() => null))?.size ?? 0;
  if (bytes <= total) return bytes;
  await rm(path, { force: true });
  return 0;
}

/** Appends to `part` what it lacks of the file, never more than the file has. */
export async function appendRest(
  part: string,
  file: HubFile,
  info: FileDownloadInfoOutput,
  options: HubAccess,
): Promise<void> {
  let done = await partBytes(part, info.size);
  if (done === info.size) return;
  const headers: Record<string, string> = { range: `bytes=${done}-` };
  // fetch drops this header when the hub redirects to its object store.
  if (options.hubToken !== undefined) headers.authorization = `Bearer ${options.hubToken}`;
  const signal = options.signal ?? null;
  const response = await fetch(info.url, { headers, signal }).catch((error: unknown) => {
    if (options.signal?.aborted) throw error;
    throw hubFailure(error, file);
  });
  if (!response.ok || response.body === null) {
    await response.body?.cancel();
    throw new GatewayError('NO_CAPACITY', `the hub answered ${response.status} for ${file.path}`);
  }
  // A server that ignores Range sends the whole file with 200: start over rather than append it to the part.
  const range = response.headers.get('content-range') ?? '';
  const resumed = response.status === 206 && range.startsWith(`bytes ${done}-`);
  if (!resumed) done = 0;
  const count = new Transform({
    transform(chunk: Buffer, _encoding, next): void {
      done += chunk.length;
      if (done > info.size) {
        next(new GatewayError('INVALID_MODEL_FILE', `${file.path}: longer than the hub said`));
        return;
      }
      options.onProgress?.({ label: basename(file.path), done, total: info.size });
      next(null, chunk);
    },
  });
  const sink = createWriteStream(part, { flags: resumed ? 'a' : 'w' });
  const body = Readable.fromWeb(response.body as Parameters<typeof Readable.fromWeb>[0]);
  await pipeline(body, count, sink, { signal: options.signal });
}

const pathOf = (dir: string, file: HubFile, sha256: string): string =>
  join(dir, `${sha256.slice(0, 12)}-${basename(file.path)}`);

/** Where it is noted which content a name had when it was last fetched. */
function notePath(dir: string, file: HubFile): string {
  const name = `${file.repo}/${file.path}@${file.revision ?? 'main'}`;
  return join(dir, `hub-${createHash('sha256').update(name).digest('hex').slice(0, 16)}.json`);
}

/** What was fetched under this name before, if it is still here. */
async function keptFile(dir: string, file: HubFile): Promise<FetchedFile | null> {
  const note = await readFile(notePath(dir, file), 'utf8').catch(() => '');
  const sha256 = /^"([0-9a-f]{64})"$/.exec(note)?.[1];
  if (sha256 === undefined) return null; // absent or damaged: the hub is asked
  const path = pathOf(dir, file, sha256);
  return (await stat(path).catch(() => null)) === null ? null : { path, sha256 };
}

/** Downloads what is missing and returns the verified file. A connection that breaks leaves the part for the next call. */
export async function fetchHubFile(file: HubFile, options: HubOptions): Promise<FetchedFile> {
  const kept = await keptFile(options.dir, file);
  // A commit never changes; a branch is asked for, yet a hub that is down must not keep a gateway from starting.
  if (kept !== null && /^[0-9a-f]{40}$/.test(file.revision ?? '')) return kept;
  const info = await describeHubFile(file, options).catch((error: unknown) => {
    if (kept !== null && error instanceof GatewayError && error.code === 'NO_CAPACITY') return null;
    throw error;
  });
  if (info === null) return kept!;
  return downloadFile(file, info, options);
}

async function downloadFile(
  file: HubFile,
  info: FileDownloadInfoOutput,
  options: HubOptions,
): Promise<FetchedFile> {
  const sha256 = /^"?([0-9a-f]{64})"?$/.exec(info.etag)?.[1];
  if (sha256 === undefined) {
    throw new GatewayError(
      'UNSUPPORTED',
      `${file.path}: the hub states no SHA-256 for it (not an LFS file), so it cannot be checked`,
    );
  }
  if (info.size > fileBytesMax) {
    throw new GatewayError('INVALID_MODEL_FILE', `${file.path}: ${info.size} bytes is too large`);
  }
  await mkdir(options.dir, { recursive: true });
  const path = pathOf(options.dir, file, sha256);
  const present = await stat(path).catch(() => null);
  if (present?.size !== info.size) await downloadPart(file, info, { path, sha256 }, options);
  await writeFileDurably(notePath(options.dir, file), JSON.stringify(sha256));
  return { path, sha256 };
}

async function downloadPart(
  file: HubFile,
  info: FileDownloadInfoOutput,
  { path, sha256 }: FetchedFile,
  options: HubOptions,
): Promise<void> {
  const part = join(options.dir, `${sha256}.part`);
  await appendRest(part, file, info, options).catch((error: unknown) => {
    if (error instanceof GatewayError || options.signal?.aborted) throw error;
    throw hubFailure(error, file);
  });
  const have = await partBytes(part, info.size);
  if (have < info.size) {
    throw new GatewayError(
      'NO_CAPACITY',
      `${file.path}: the hub sent ${have} of ${info.size} bytes; start again to resume`,
    );
  }
  const found = await sha256OfFile(part, options.signal);
  if (found !== sha256) {
    // Kept, it would fail again at every start.
    await rm(part, { force: true });
    throw new GatewayError(
      'INVALID_MODEL_FILE',
      `${file.path}: SHA-256 is ${found}, the hub says ${sha256}`,
    );
  }
  const handle = await open(part, 'r+');
  try {
    await handle.sync();
  } finally {
    await handle.close();
  }
  await renameDurably(part, path);
}
