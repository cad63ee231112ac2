// Where packed files lie, by the hash of their bytes. A blob is there whole or not at all, whatever call fails and
// whenever the power does: temp file → fsync → rename → fsync of the directory. Paths are built here only, from ids that
// one expression has checked (faults.md B35).

import { constants, type promises, readdirSync, statSync, unlinkSync } from 'node:fs';
import { mkdir, open, rename, unlink } from 'node:fs/promises';
import { dirname, join } from 'node:path';
import { GatewayError } from '../errors.ts';
import { type Generation, isGeneration } from './adapter.ts';
import { generationOf } from './pack.ts';

export interface BlobStore {
  /** Durable when it resolves, and so is what it keeps, beside it. Idempotent. Throws DISK_FULL. */
  put(bytes: Uint8Array, kept?: Uint8Array | null): Promise<Generation>;
  /** The next three act at once, so that deciding and acting cannot be torn apart by an import that ends meanwhile. */
  has(generation: Generation): boolean;
  /** Idempotent. */
  remove(generation: Generation): void;
  /** Removes what crashes left: unfinished files, and blobs that `isKnown` denies. Nobody may `put` meanwhile. */
  sweep(isKnown: (generation: Generation) => boolean): void;
}

/** The calls that `put` makes: tests make each of them fail. */
export type BlobFiles = Pick<typeof promises, 'open' | 'rename' | 'unlink' | 'mkdir'>;

const suffix = '.safetensors';
const keptSuffix = '.coso.safetensors';
const unfinished = '.part';
const hashLength = 64;

/** Where a generation's packed file is, for the engine's readPacked. */
export function blobPath(directory: string, generation: Generation): string {
  if (!isGeneration(generation)) throw new GatewayError('INTERNAL', 'not a generation');
  return join(directory, `${generation.slice('sha256:'.length)}${suffix}`);
}

/** What training from a packed file must keep (trainer/continual.ts) is beside it, and goes with it. */
export function keptPath(packedPath: string): string {
  return packedPath.slice(0, -suffix.length) + keptSuffix;
}

export function createBlobStore(
  directory: string,
  files: BlobFiles = { open, rename, unlink, mkdir },
): BlobStore {
  return {
    async put(bytes, kept = null) {
      const generation = generationOf(bytes);
      const path = blobPath(directory, generation);
      // First: what is there has what it names.
      if (kept !== null) await putFile(files, { path: keptPath(path), bytes: kept });
      await putFile(files, { path, bytes });
      return generation;
    },
    has: (generation) => isFile(blobPath(directory, generation)),
    remove(generation) {
      const path = blobPath(directory, generation);
      for (const one of [path, keptPath(path)]) removeFile(one);
    },
    sweep(isKnown) {
      for (const name of listFiles(directory)) {
        const generation = `sha256:${name.slice(0, hashLength)}`;
        const isWhole = [suffix, keptSuffix].includes(name.slice(hashLength));
        const isBlob = isWhole && isGeneration(generation);
        const isOurs = isBlob || name.endsWith(`${suffix}${unfinished}`);
        if (isOurs && !(isBlob && isKnown(generation))) removeFile(join(directory, name));
      }
    },
  };
}

interface NewFile {
  readonly path: string;
  readonly bytes: Uint8Array;
}

async function putFile(files: BlobFiles, { path, bytes }: NewFile): Promise<void> {
  const part = `${path}${unfinished}`;
  try {
    await files.mkdir(dirname(path), { recursive: true });
    await writeWhole(files, { path: part, bytes });
    await files.rename(part, path);
    await syncDirectory(files, dirname(path));
  } catch (error) {
    await files.unlink(part).catch(() => {}); // sweep is there for what stays.
    throw storeError(error);
  }
}

async function writeWhole(files: BlobFiles, { path, bytes }: NewFile): Promise<void> {
  const { O_WRONLY, O_CREAT, O_TRUNC, O_NOFOLLOW } = constants;
  const file = await files.open(path, O_WRONLY | O_CREAT | O_TRUNC | O_NOFOLLOW, 0o600);
  try {
    await file.writeFile(bytes);
    await file.sync();
  } finally {
    await file.close();
  }
}

/** A rename is on disk when its directory is. */
async function syncDirectory(files: BlobFiles, directory: string): Promise<void> {
  const handle = await files.open(directory, constants.O_RDONLY);
  try {
    await handle.sync();
  } finally {
    await handle.close();
  }
}

function storeError(error: unknown): GatewayError {
  if (error instanceof GatewayError) return error;
  const code = (error as NodeJS.ErrnoException).code ?? 'unknown error';
  if (code === 'ENOSPC' || code === 'EDQUOT') {
    return new GatewayError('DISK_FULL', 'no room left to store the adapter', { cause: error });
  }
  return new GatewayError('INTERNAL', `the adapter cannot be stored (${code})`, { cause: error });
}

function isFile(path: string): boolean {
  return statSync(path, { throwIfNoEntry: false })?.isFile() ?? false;
}

function removeFile(path: string): void {
  try {
    unlinkSync(path);
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== 'ENOENT') throw storeError(error);
  }
}

function listFiles(directory: string): string[] {
  try {
    return readdirSync(directory);
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === 'ENOENT') return [];
    throw storeError(error);
  }
}
