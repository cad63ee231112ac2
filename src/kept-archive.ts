// The archive's file in the data directory: read at the start, written whole and durably. A file that is no archive is set
// aside, never written over: somebody's evaluations are in it.

import { readFileSync, renameSync } from 'node:fs';
import { GatewayError } from './errors.ts';
import { writeFileDurably } from './model/file-hash.ts';
import { Archive } from './router/archive.ts';
import { ArchiveScores } from './router/archive-scores.ts';
import type { ArchiveDeps } from './server/archive.ts';

export function openArchive(path: string, warn: (message: string) => void): ArchiveDeps {
  const map = new Archive();
  let kept = readKept(path);
  if (kept !== null && !map.restore(kept)) {
    renameSync(path, `${path}.unreadable`);
    warn(`${path} is no archive: set aside as ${path}.unreadable`);
    kept = null;
  }
  const write = async (): Promise<void> => {
    const text = map.save();
    if (text === kept) return;
    await writeFileDurably(path, text).catch(refuse);
    kept = text;
  };
  let last: Promise<void> = Promise.resolve();
  return {
    map,
    scores: new ArchiveScores(),
    /** One after the other: two writers would share the unfinished file. */
    save() {
      last = last.then(write, write);
      return last;
    },
  };
}

function readKept(path: string): string | null {
  try {
    return readFileSync(path, 'utf8');
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === 'ENOENT') return null;
    throw new GatewayError('INTERNAL', 'the archive cannot be read', { cause: error });
  }
}

function refuse(cause: unknown): never {
  const { code } = cause as NodeJS.ErrnoException;
  const isFull = code === 'ENOSPC' || code === 'EDQUOT';
  const message = isFull ? 'no room left for the archive' : `the archive cannot be kept (${code})`;
  throw new GatewayError(isFull ? 'DISK_FULL' : 'INTERNAL', message, { cause });
}
