// Packed files that were read lately, in this process's memory up to a number of bytes: an adapter that left the engine's
// pages comes back without the disk. What is asked for twice at once is read once.

import { LRUCache } from 'lru-cache';
import type { PackedAdapter } from './pack.ts';
import type { ResidentKey } from './residency.ts';

export interface HostTier {
  open(key: ResidentKey): Promise<PackedAdapter<ResidentKey>>;
  has(key: ResidentKey): boolean;
  /** The keys of what it has, unless they are as they were at the call before. */
  changed(): readonly ResidentKey[] | null;
  readonly bytes: number;
}

export interface HostTierOptions {
  /** Of all files together; a larger one is read and not kept. 0 keeps none. */
  readonly bytesMax: number;
  readonly read: (key: ResidentKey) => Promise<PackedAdapter<ResidentKey>>;
  readonly onDispose?: (
    key: ResidentKey,
    reason: 'evict' | 'set' | 'delete' | 'expire' | 'fetch',
  ) => void;
}

/** A map entry and an empty adapter's objects: files without numbers must not be free. Guess. */
const entryBytes = 512;

export function createHostTier({ bytesMax, read, onDispose }: HostTierOptions): HostTier {
  const reading = new Map<ResidentKey, Promise<PackedAdapter<ResidentKey>>>();
  let isTold = true;
  const files =
    bytesMax === 0
      ? null
      : new LRUCache<ResidentKey, PackedAdapter<ResidentKey>>({
          maxSize: bytesMax,
          sizeCalculation: ({ bytes }) => bytes + entryBytes,
          dispose: (_, key, reason) => {
            isTold = false;
            onDispose?.(key, reason);
          },
        });
  const readOnce = async (key: ResidentKey): Promise<PackedAdapter<ResidentKey>> => {
    try {
      const packed = await read(key);
      files?.set(key, packed);
      isTold = false;
      return packed;
    } finally {
      reading.delete(key);
    }
  };
  return {
    async open(key) {
      const known = files?.get(key) ?? reading.get(key);
      if (known !== undefined) return known;
      const promise = readOnce(key);
      reading.set(key, promise);
      return promise;
    },
    has: (key) => files?.has(key) ?? false,
    changed() {
      if (isTold || files === null) return null;
      isTold = true;
      return [...files.keys()];
    },
    get bytes() {
      return files?.calculatedSize ?? 0;
    },
  };
}
