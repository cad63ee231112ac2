// Takes one file out of a zip archive (APPNOTE.TXT 6.3: end of central directory, central directory, local header).
// The wanted name is matched whole and the caller says where the bytes go: nothing in the archive names a path. Stored
// and deflated entries; not covered: zip64, encryption, archives in parts. Whoever calls has checked the archive's
// SHA-256 and checks the file's: what is checked here keeps a wrong pin from filling the disk.

import { createReadStream, createWriteStream } from 'node:fs';
import { open } from 'node:fs/promises';
import { PassThrough } from 'node:stream';
import { pipeline } from 'node:stream/promises';
import { crc32, createInflateRaw } from 'node:zlib';
import { GatewayError } from '../errors.ts';

const endBytes = 22;
const tailBytesMax = endBytes + 0xffff + 1024 * 1024; // comment and directory; guess: 10,000 entries

interface ZipEntry {
  readonly method: number;
  readonly crc: number;
  readonly packedBytes: number;
  readonly bytes: number;
  readonly headerOffset: number;
}

export interface ExtractOptions {
  /** What the entry must have. */
  readonly bytes: number;
  readonly onBytes: (done: number) => void;
  readonly signal?: AbortSignal | undefined;
}

function refuse(what: string, cause?: unknown): never {
  throw new GatewayError('INVALID_MODEL_FILE', `zip archive: ${what}`, { cause });
}

/** The directory's one entry of that name. `tail` ends where the archive does. */
function findEntry(tail: Buffer, archiveBytes: number, name: string): ZipEntry {
  // The record counts only when its comment ends the file: a comment may contain the signature.
  let end = tail.length - endBytes;
  while (
    tail.readUInt32LE(end) !== 0x06054b50 ||
    end + 22 + tail.readUInt16LE(end + 20) !== tail.length
  )
    end--;
  let at = tail.readUInt32LE(end + 16) - (archiveBytes - tail.length);
  let found: ZipEntry | null = null;
  for (let left = tail.readUInt16LE(end + 10); left > 0; left--) {
    if (tail.readUInt32LE(at) !== 0x02014b50) refuse('has a broken directory entry');
    const nameBytes = tail.readUInt16LE(at + 28);
    if (tail.toString('utf8', at + 46, at + 46 + nameBytes) === name) {
      if (found !== null) refuse(`names ${name} twice`);
      if ((tail.readUInt16LE(at + 8) & 1) !== 0) refuse(`${name} is encrypted`);
      found = {
        method: tail.readUInt16LE(at + 10),
        crc: tail.readUInt32LE(at + 16),
        packedBytes: tail.readUInt32LE(at + 20),
        bytes: tail.readUInt32LE(at + 24),
        headerOffset: tail.readUInt32LE(at + 42),
      };
    }
    at += 46 + nameBytes + tail.readUInt16LE(at + 30) + tail.readUInt16LE(at + 32);
  }
  return found ?? refuse(`holds no ${name}`);
}

/** The entry and where its data starts. */
async function locate(path: string, name: string): Promise<{ entry: ZipEntry; start: number }> {
  await using file = await open(path, 'r');
  const { size } = await file.stat();
  const readAt = async (offset: number, length: number): Promise<Buffer> => {
    const { buffer, bytesRead } = await file.read(Buffer.alloc(length), 0, length, offset);
    return buffer.subarray(0, bytesRead);
  };
  try {
    const tailBytes = Math.min(size, tailBytesMax);
    const entry = findEntry(await readAt(size - tailBytes, tailBytes), size, name);
    const header = await readAt(entry.headerOffset, 30);
    const names = header.readUInt16LE(26) + header.readUInt16LE(28);
    return { entry, start: entry.headerOffset + 30 + names };
  } catch (error) {
    // Every number was read with a bound check: a RangeError is an archive that points outside itself.
    if (error instanceof RangeError) refuse('is truncated or not a zip', error);
    throw error;
  }
}

/** Writes entry `name` of the archive to `targetPath` and syncs it. Leaves an incomplete file behind when it throws. */
export async function extractZipEntry(
  archivePath: string,
  name: string,
  targetPath: string,
  { bytes, onBytes, signal }: ExtractOptions,
): Promise<void> {
  const { entry, start } = await locate(archivePath, name);
  if (entry.bytes !== bytes) refuse(`${name} has ${entry.bytes} bytes, want ${bytes}`);
  if (entry.method !== 0 && entry.method !== 8) refuse(`${name}: compression ${entry.method}`);
  let [done, crc] = [0, 0];
  async function* check(chunks: AsyncIterable<Buffer>): AsyncGenerator<Buffer> {
    for await (const chunk of chunks) {
      done += chunk.length;
      if (done > bytes) refuse(`${name} is longer than declared`); // a deflate bomb ends here
      crc = crc32(chunk, crc);
      onBytes(done);
      yield chunk;
    }
  }
  try {
    await pipeline(
      createReadStream(archivePath, { start, end: start + entry.packedBytes - 1 }),
      entry.method === 8 ? createInflateRaw() : new PassThrough(),
      check,
      createWriteStream(targetPath, { flush: true }),
      { signal },
    );
  } catch (error) {
    const isZlib = error instanceof Error && 'code' in error && String(error.code).startsWith('Z_');
    if (isZlib) refuse(`${name} does not inflate`, error);
    throw error;
  }
  if (done !== bytes || crc !== entry.crc) refuse(`${name} fails its CRC-32 or its length`);
}
