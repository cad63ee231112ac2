// A packed file's bytes, hashed as they are read. What lies at the path may be anything by now: a link, a pipe, another
// file, a half. The bytes go into memory, never a mapping: what happens to the file afterwards cannot reach the engine.

import { createHash } from 'node:crypto';
import { closeSync, constants, fstatSync, openSync, readSync } from 'node:fs';
import { GatewayError } from '../errors.ts';
import type { Generation } from './adapter.ts';

/** Largest packed file. Rank 256 on all projections of SmolLM2-135M is 156 MB. */
const packedBytesMax: number = 1024 ** 3;

export function corrupt(generation: Generation, what: string, cause?: unknown): GatewayError {
  return new GatewayError('ADAPTER_CORRUPT', `adapter ${generation}: ${what}`, { cause });
}

/** Throws ADAPTER_NOT_FOUND or ADAPTER_CORRUPT. */
export function readBlob(path: string, generation: Generation): Uint8Array {
  const { bytes, hash } = readHashed(path, generation);
  if (generation === `sha256:${hash}`) return bytes;
  throw corrupt(generation, 'its bytes have another hash');
}

/** Bytes that are hashed while the processor's caches still hold them from the reading. */
const chunkBytes = 256 * 1024;

function readHashed(path: string, generation: Generation): { bytes: Uint8Array; hash: string } {
  let file: number | null = null;
  try {
    // O_NONBLOCK: opening a pipe that took the blob's place must not wait for a writer.
    file = openSync(path, constants.O_RDONLY | constants.O_NOFOLLOW | constants.O_NONBLOCK);
    const stat = fstatSync(file);
    if (!stat.isFile()) throw corrupt(generation, 'it is not a regular file');
    if (stat.size > packedBytesMax) throw corrupt(generation, `it has ${stat.size} bytes`);
    const bytes = new Uint8Array(stat.size);
    const hash = createHash('sha256');
    for (let done = 0; done < bytes.length; ) {
      const count = readSync(file, bytes, done, Math.min(chunkBytes, bytes.length - done), done);
      if (count === 0) throw corrupt(generation, 'it was cut while it was read');
      hash.update(bytes.subarray(done, done + count));
      done += count;
    }
    return { bytes, hash: hash.digest('hex') };
  } catch (error) {
    if (error instanceof GatewayError) throw error;
    const code = (error as NodeJS.ErrnoException).code ?? 'unknown error';
    if (code === 'ENOENT') {
      throw new GatewayError('ADAPTER_NOT_FOUND', `adapter ${generation} is not stored`);
    }
    throw corrupt(generation, `it cannot be read (${code})`, error);
  } finally {
    if (file !== null) closeSync(file);
  }
}
