// A packed file's bytes, hashed as they are read. What lies at the path may be anything by now: a link, a pipe, another
// file, a half. The bytes go into memory, never a mapping: what happens to the file afterwards cannot reach the engine.
//
// Hashing and checking are three quarters of a load's work on a thread that takes its time from the steps (16 of 21 ms for
// 10 MB, measured), so a file that was found right is not checked again while the system says that it is the same one.

import { createHash } from 'node:crypto';
import { type BigIntStats, closeSync, constants, fstatSync, openSync, readSync } from 'node:fs';
import { LRUCache } from 'lru-cache';
import { GatewayError } from '../errors.ts';
import type { Generation } from './adapter.ts';

/** Largest packed file. Rank 256 on all projections of SmolLM2-135M is 156 MB. */
const packedBytesMax: number = 1024 ** 3;

export function corrupt(generation: Generation, what: string, cause?: unknown): GatewayError {
  return new GatewayError('ADAPTER_CORRUPT', `adapter ${generation}: ${what}`, { cause });
}

/** The state of a file: a write to it, or another file in its place, changes one of these. */
function stateOf({ dev, ino, size, mtimeNs, ctimeNs }: BigIntStats): string {
  return [dev, ino, size, mtimeNs, ctimeNs].join();
}

/** A change within the same tick of the file system's clock would not show: files this young are not remembered. */
const settledMs = 2000;
const filesMax = 4096; // 200 bytes each

/** The files that one reader has checked: their bytes are those of their generation, and these are a packed adapter. */
export class CheckedFiles {
  readonly #states: LRUCache<Generation, string> = new LRUCache({ max: filesMax });
  readonly #nowMs: () => number;

  /** Unix time, as the file system's. */
  constructor(nowMs: () => number) {
    this.#nowMs = nowMs;
  }

  isSame(generation: Generation, stat: BigIntStats): boolean {
    return this.#states.get(generation) === stateOf(stat);
  }

  add(generation: Generation, stat: BigIntStats): void {
    if (this.#nowMs() - Number(stat.ctimeMs) < settledMs) return;
    this.#states.set(generation, stateOf(stat));
  }
}

export interface Blob {
  readonly bytes: Uint8Array;
  /** Were found to be a packed adapter before. */
  readonly isChecked: boolean;
  /** To be called when they have been found to be one. */
  checked(): void;
}

/** Throws ADAPTER_NOT_FOUND or ADAPTER_CORRUPT. */
export function readBlob(
  path: string,
  generation: Generation,
  files: CheckedFiles | null = null,
): Blob {
  let file: number | null = null;
  try {
    // O_NONBLOCK: opening a pipe that took the blob's place must not wait for a writer.
    file = openSync(path, constants.O_RDONLY | constants.O_NOFOLLOW | constants.O_NONBLOCK);
    const stat = fstatSync(file, { bigint: true });
    if (!stat.isFile()) throw corrupt(generation, 'it is not a regular file');
    if (stat.size > packedBytesMax) throw corrupt(generation, `it has ${stat.size} bytes`);
    const bytes = new Uint8Array(Number(stat.size));
    const isChecked = files?.isSame(generation, stat) ?? false;
    readInto(bytes, { file, generation, isHashed: !isChecked });
    const isUnchanged = stateOf(fstatSync(file, { bigint: true })) === stateOf(stat);
    if (isChecked && !isUnchanged) throw corrupt(generation, 'it changed while it was read');
    const checked = (): void => (isUnchanged ? files?.add(generation, stat) : undefined);
    return { bytes, isChecked, checked };
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

/** Bytes that are hashed while the processor's caches still hold them from the reading. */
const chunkBytes = 256 * 1024;

interface Reading {
  readonly file: number;
  readonly generation: Generation;
  readonly isHashed: boolean;
}

function readInto(bytes: Uint8Array, { file, generation, isHashed }: Reading): void {
  const hash = isHashed ? createHash('sha256') : null;
  for (let done = 0; done < bytes.length; ) {
    const count = readSync(file, bytes, done, Math.min(chunkBytes, bytes.length - done), done);
    if (count === 0) throw corrupt(generation, 'it was cut while it was read');
    hash?.update(bytes.subarray(done, done + count));
    done += count;
  }
  if (hash !== null && generation !== `sha256:${hash.digest('hex')}`) {
    throw corrupt(generation, 'its bytes have another hash');
  }
}
