// An adapter from the Hugging Face hub: `hf:owner/name[@revision]`. The revision becomes a commit first, so that both files
// are of one; only the two files that an import reads are fetched, within its limits, and checked against the hub's hashes.

import { createHash } from 'node:crypto';
import { createReadStream } from 'node:fs';
import { join } from 'node:path';
import { HubApiError, modelInfo } from '@huggingface/hub';
import { GatewayError } from '../errors.ts';
import { appendRest, describeHubFile, type HubAccess, hubFailure } from '../model/hub-source.ts';
import { configBytesMax } from './peft-config.ts';

export interface HubAdapter {
  readonly repo: string;
  readonly revision: string;
}

const part = '[A-Za-z0-9][\\w.-]{0,95}';
const sourcePattern = new RegExp(`^hf:(${part}/${part})(?:@([A-Za-z0-9][\\w./-]{0,127}))?$`);
const commitPattern = /^[0-9a-f]{40}$/;

/** Throws INVALID_REQUEST. */
export function parseHubAdapter(source: string): HubAdapter {
  const [, repo, revision = 'main'] = sourcePattern.exec(source) ?? [];
  if (repo === undefined || source.includes('..')) {
    const message = 'source: want hf:owner/name or hf:owner/name@revision';
    throw new GatewayError('INVALID_REQUEST', message, { param: 'source' });
  }
  return { repo, revision };
}

/** Writes the adapter's two files into an empty `folder`; answers the commit that they are of. Throws INVALID_ADAPTER,
 *  INVALID_REQUEST when the hub has none or refuses it, PAYLOAD_TOO_LARGE, DISK_FULL, or NO_CAPACITY when the hub does not answer. */
export async function fetchHubAdapter(
  { repo, revision }: HubAdapter,
  folder: string,
  options: HubAccess & { readonly weightsBytesMax: number },
): Promise<string> {
  const commit = await commitOf(repo, revision, options);
  for (const [path, bytesMax] of [
    ['adapter_config.json', configBytesMax],
    ['adapter_model.safetensors', options.weightsBytesMax],
  ] as const) {
    const file = { repo, path, revision: commit };
    const info = await describeHubFile(file, options).catch((error: unknown) => {
      const isMissing = error instanceof GatewayError && error.code === 'INVALID_REQUEST';
      throw isMissing ? invalid(`${path} is missing`, error) : refusal(error);
    });
    if (info.size > bytesMax) {
      const message = `${path} has ${info.size} bytes, at most ${bytesMax}`;
      throw new GatewayError('PAYLOAD_TOO_LARGE', message);
    }
    const to = join(folder, path);
    await appendRest(to, file, info, options).catch((error: unknown) => {
      throw downloadError(error, path, options.signal);
    });
    await checkContent(to, path, info);
  }
  return commit;
}

async function commitOf(repo: string, revision: string, options: HubAccess): Promise<string> {
  if (commitPattern.test(revision)) return revision;
  const file = { repo, path: '' };
  const info = await modelInfo({
    name: repo,
    revision,
    additionalFields: ['sha'],
    ...(options.hubUrl === undefined ? {} : { hubUrl: options.hubUrl }),
    ...(options.hubToken === undefined ? {} : { accessToken: options.hubToken }),
    fetch: (url, init) => fetch(url, { ...init, signal: options.signal ?? null }),
  }).catch((error: unknown) => {
    throw options.signal?.aborted ? error : refusal(hubFailure(error, file));
  });
  if (commitPattern.test(info.sha)) return info.sha;
  throw hubFailure(new Error('no commit'), file);
}

/** A hub that says no is not one that is down. */
function refusal(error: unknown): unknown {
  const cause = error instanceof GatewayError ? error.cause : null;
  const status = cause instanceof HubApiError ? cause.statusCode : 0;
  if (status < 400 || status >= 500 || status === 429) return error;
  const message = `the hub answered ${status}: it has no such adapter, or not for this server`;
  return new GatewayError('INVALID_REQUEST', message, { param: 'source', cause });
}

/** The hub's entity tag is the SHA-256 of a large file, and git's hash of a small one. */
async function checkContent(
  file: string,
  name: string,
  { etag, size }: { readonly etag: string; readonly size: number },
): Promise<void> {
  const wanted = /^(?:W\/)?"?([0-9a-f]{64}|[0-9a-f]{40})"?$/.exec(etag)?.[1];
  if (wanted === undefined) throw invalid(`${name}: the hub states no hash to check it by`);
  const hash = createHash(wanted.length === 64 ? 'sha256' : 'sha1');
  if (wanted.length === 40) hash.update(`blob ${size}\0`);
  for await (const chunk of createReadStream(file)) hash.update(chunk as Buffer);
  if (hash.digest('hex') !== wanted) throw invalid(`${name}: its bytes are not what the hub says`);
}

function downloadError(error: unknown, name: string, signal: AbortSignal | undefined): unknown {
  if (signal?.aborted) return error;
  const code = (error as NodeJS.ErrnoException).code;
  if (code === 'INVALID_MODEL_FILE') return invalid(`${name}: longer than the hub said`, error);
  if (error instanceof GatewayError) return error;
  if (code === 'ENOSPC' || code === 'EDQUOT') {
    return new GatewayError('DISK_FULL', 'no room left for the download', { cause: error });
  }
  return new GatewayError('NO_CAPACITY', `the hub did not send all of ${name}`, { cause: error });
}

function invalid(message: string, cause?: unknown): GatewayError {
  return new GatewayError('INVALID_ADAPTER', message, { cause });
}
