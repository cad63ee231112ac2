// Re-encoded weights on disk, so that only the first start of a model pays for converting them (1.1 s for the default
// model, measured). One file per model and mode: the converted tensors one after another, a JSON index with a CRC-32 of
// each, and a trailer. Written to a temporary name, synced and renamed: a reader sees a whole file or none. A file that
// is damaged or of another version is rebuilt, never trusted.

import {
  closeSync,
  fstatSync,
  fsyncSync,
  mkdirSync,
  openSync,
  readdirSync,
  readSync,
  renameSync,
  rmSync,
  writeSync,
} from 'node:fs';
import { join } from 'node:path';
import { crc32 } from 'node:zlib';

const magic = 'RGWC0001';
const trailerBytes = 16; // u64 index length, 8 bytes of magic
const indexBytesMax = 16 * 1024 * 1024;

interface CachedTensor {
  readonly offset: number;
  readonly bytes: number;
  readonly crc: number;
}

export interface WeightCache extends Disposable {
  /** The converted bytes of a tensor, or null when it has to be converted (and then given to `put`). */
  get(name: string, bytes: number): Uint8Array | null;
  put(name: string, data: Uint8Array): void;
  /** Makes what was put durable; does nothing when everything came from the cache. */
  finish(): void;
}

/** Opens the cache of one model file and mode. `key` names it: model hash, mode and format of the conversion. */
export function openWeightCache(directory: string, key: string): WeightCache {
  mkdirSync(directory, { recursive: true });
  const path = join(directory, `${key}.weights`);
  removeLeftovers(directory, key);
  return openExisting(path) ?? createNew(path);
}

function openExisting(path: string): WeightCache | null {
  let descriptor: number;
  try {
    descriptor = openSync(path, 'r');
  } catch {
    return null; // not written yet
  }
  const index = readIndex(descriptor);
  if (index === null) {
    closeSync(descriptor);
    return null;
  }
  return new ReadCache(descriptor, path, index);
}

function readExactly(descriptor: number, offset: number, length: number): Buffer {
  const bytes = Buffer.allocUnsafeSlow(length);
  let done = 0;
  while (done < length) {
    const count = readSync(descriptor, bytes, done, length - done, offset + done);
    if (count === 0) return bytes.subarray(0, done);
    done += count;
  }
  return bytes;
}

function readIndex(descriptor: number): ReadonlyMap<string, CachedTensor> | null {
  const size = fstatSync(descriptor).size;
  if (size < trailerBytes) return null;
  const trailer = readExactly(descriptor, size - trailerBytes, trailerBytes);
  const length = Number(trailer.readBigUInt64LE(0));
  if (trailer.toString('latin1', 8) !== magic || length > Math.min(indexBytesMax, size))
    return null;
  const text = readExactly(descriptor, size - trailerBytes - length, length).toString('utf8');
  try {
    return new Map(JSON.parse(text) as Array<[string, CachedTensor]>);
  } catch {
    return null;
  }
}

class ReadCache implements WeightCache {
  readonly #descriptor: number;
  readonly #path: string;
  readonly #index: ReadonlyMap<string, CachedTensor>;

  constructor(descriptor: number, path: string, index: ReadonlyMap<string, CachedTensor>) {
    this.#descriptor = descriptor;
    this.#path = path;
    this.#index = index;
  }

  get(name: string, bytes: number): Uint8Array | null {
    const entry = this.#index.get(name);
    if (entry === undefined || entry.bytes !== bytes) return this.#damaged();
    const data = readExactly(this.#descriptor, entry.offset, bytes);
    return data.length === bytes && crc32(data) === entry.crc ? data : this.#damaged();
  }

  /** The next start rebuilds the file; this one converts what it could not read. */
  #damaged(): null {
    rmSync(this.#path, { force: true });
    return null;
  }

  put(): void {
    // The file is gone by now: there is nothing to add to.
  }

  finish(): void {
    // Everything was there.
  }

  [Symbol.dispose](): void {
    closeSync(this.#descriptor);
  }
}

/** What killed processes left: each as large as the model. A living one that loses its file writes none, which it takes
 *  for a full disk. */
function removeLeftovers(directory: string, key: string): void {
  for (const name of readdirSync(directory)) {
    if (name.startsWith(`${key}.weights.`) && name.endsWith('.tmp')) {
      rmSync(join(directory, name), { force: true });
    }
  }
}

function createNew(path: string): WeightCache {
  const temporary = `${path}.${process.pid}.tmp`;
  const descriptor = openSync(temporary, 'w', 0o600);
  const index: Array<[string, CachedTensor]> = [];
  let offset = 0;
  let open = true;
  let isBroken = false;
  // A full disk costs the next start a second, not this start its model.
  const attempt = (act: () => void): void => {
    try {
      if (!isBroken) act();
    } catch {
      isBroken = true;
    }
  };
  const append = (data: Uint8Array): void => {
    for (let done = 0; done < data.length; ) done += writeSync(descriptor, data, done);
    offset += data.length;
  };
  const close = (): void => {
    if (open) closeSync(descriptor);
    open = false;
    rmSync(temporary, { force: true });
  };
  return {
    get: () => null,
    put(name, data) {
      index.push([name, { offset, bytes: data.length, crc: crc32(data) }]);
      attempt(() => append(data));
    },
    finish() {
      const text = Buffer.from(JSON.stringify(index));
      const trailer = Buffer.alloc(trailerBytes);
      trailer.writeBigUInt64LE(BigInt(text.length), 0);
      trailer.write(magic, 8, 'latin1');
      attempt(() => {
        append(text);
        append(trailer);
        fsyncSync(descriptor);
        renameSync(temporary, path);
      });
    },
    [Symbol.dispose]: close,
  };
}
