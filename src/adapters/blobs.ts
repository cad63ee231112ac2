// Where packed files lie, by the hash of their bytes. A blob is there whole or not at all, whatever call fails and
// whenever the power does: temp file → fsync → rename → fsync of the directory. Paths are built here only, from ids that
// one expression has checked (faults.md B35).

import { constants, type promises, readdirSync, statSync, unlinkSync } from 'node:fs';
import { mkdir, open, rename, unlink } from 'node:fs/promises';
import { join } from 'node:path';
import { GatewayError } from '../errors.ts';
import { type Generation, isGeneration } from './adapter.ts';
import { generationOf } from './pack.ts';

export interface BlobStore {
  /** Durable when it resolves. Idempotent. Throws DISK_FULL. */
  put(bytes: Uint8Array): Promise<Generation>;
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
const unfinished = '.part';

/** Where a generation's packed file is, for the engine's readPacked. */
export function blobPath(directory: string, generation: Generation): string {
  if (!isGeneration(generation)) throw new GatewayError('INTERNAL', 'not a generation');
  return join(directory, `${generation.slice('sha256:'.length)}${suffix}`);
}

export function createBlobStore(
  directory: string,
  files: BlobFiles = { open, rename, unlink, mkdir },
): BlobStore {
  return {
    async put(bytes) {
      const generation = generationOf(bytes);
      const path = blobPath(directory, generation);
      try {
        await files.mkdir(directory, { recursive: true });
        await writeWhole(files, { path: `${path}${unfinished}`, bytes });
        await files.rename(`${path}${unfinished}`, path);
        await syncDirectory(files, directory);
      } catch (error) {
        await files.unlink(`${path}${unfinished}`).catch(() => {}); // sweep is there for what stays.
        throw storeError(error);
      }
      return generation;
    },
    has: (generation) => isFile(blobPath(directory, generation)),
    remove(generation) {
      removeFile(blobPath(directory, generation));
    },
    sweep(isKnown) {
      for (const name of listFiles(directory)) {
        const generation = `sha256:${name.slice(0, -suffix.length)}`;
        const isBlob = name.endsWith(suffix) && isGeneration(generation);
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
