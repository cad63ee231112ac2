// Takes one file out of a zip archive (APPNOTE.TXT 6.3: end of central directory, central directory, local header).
// The wanted name is matched whole and the caller says where the bytes go: nothing in the archive names a path. Stored
// and deflated entries; not covered: zip64, encryption, archives in parts. CRC-32 and size must match the directory.

import { createReadStream, createWriteStream } from 'node:fs';
import { type FileHandle, open } from 'node:fs/promises';
import { Transform } from 'node:stream';
import { pipeline } from 'node:stream/promises';
import { crc32, createInflateRaw } from 'node:zlib';
import { GatewayError } from '../errors.ts';

const endBytes = 22;
const commentBytesMax = 0xffff;
const directoryBytesMax = 16 * 1024 * 1024; // guess: 100,000 entries with long names

interface ZipEntry {
  readonly deflated: boolean;
  readonly crc: number;
  readonly packedBytes: number;
  readonly bytes: number;
  readonly headerOffset: number;
}

export interface ExtractOptions {
  readonly bytesMax: number;
  readonly onBytes?: (done: number, total: number) => void;
  readonly signal?: AbortSignal;
}

function refuse(what: string): never {
  throw new GatewayError('INVALID_MODEL_FILE', `zip archive: ${what}`);
}

async function readAt(file: FileHandle, offset: number, length: number): Promise<Buffer> {
  const buffer = Buffer.alloc(length);
  const { bytesRead } = await file.read(buffer, 0, length, offset);
  if (bytesRead !== length) refuse(`ends early: wanted ${length} bytes at ${offset}`);
  return buffer;
}

async function readDirectory(file: FileHandle, archiveBytes: number): Promise<Buffer> {
  if (archiveBytes < endBytes) refuse('too short to be one');
  const tailBytes = Math.min(archiveBytes, endBytes + commentBytesMax);
  const tail = await readAt(file, archiveBytes - tailBytes, tailBytes);
  for (let at = tailBytes - endBytes; at >= 0; at--) {
    // The record counts only when its comment ends the file: a comment may contain the signature.
    if (tail.readUInt32LE(at) !== 0x06054b50) continue;
    if (at + endBytes + tail.readUInt16LE(at + 20) !== tailBytes) continue;
    const size = tail.readUInt32LE(at + 12);
    const offset = tail.readUInt32LE(at + 16);
    if (tail.readUInt16LE(at + 4) !== 0) refuse('has several parts');
    if (size === 0xffffffff || offset === 0xffffffff) refuse('is zip64, which is not supported');
    if (size > directoryBytesMax)
      refuse(`directory has ${size} bytes, at most ${directoryBytesMax}`);
    if (offset + size > archiveBytes - tailBytes + at) refuse('directory lies outside the file');
    return readAt(file, offset, size);
  }
  return refuse('has no end record: truncated or not a zip');
}

function findEntry(directory: Buffer, name: string): ZipEntry {
  let found: ZipEntry | null = null;
  for (let at = 0; at < directory.length; ) {
    if (at + 46 > directory.length || directory.readUInt32LE(at) !== 0x02014b50) {
      refuse('has a broken directory entry');
    }
    const nameBytes = directory.readUInt16LE(at + 28);
    const next =
      at + 46 + nameBytes + directory.readUInt16LE(at + 30) + directory.readUInt16LE(at + 32);
    if (next > directory.length) refuse('has a directory entry that runs over its end');
    if (directory.toString('utf8', at + 46, at + 46 + nameBytes) === name) {
      if (found !== null) refuse(`names ${name} twice`);
      const method = directory.readUInt16LE(at + 10);
      if ((directory.readUInt16LE(at + 8) & 1) !== 0) refuse(`${name} is encrypted`);
      if (method !== 0 && method !== 8) refuse(`${name} uses compression method ${method}`);
      found = {
        deflated: method === 8,
        crc: directory.readUInt32LE(at + 16),
        packedBytes: directory.readUInt32LE(at + 20),
        bytes: directory.readUInt32LE(at + 24),
        headerOffset: directory.readUInt32LE(at + 42),
      };
    }
    at = next;
  }
  return found ?? refuse(`holds no ${name}`);
}

async function dataOffset(
  file: FileHandle,
  entry: ZipEntry,
  archiveBytes: number,
): Promise<number> {
  if (entry.headerOffset + 30 > archiveBytes) refuse('entry lies outside the file');
  const header = await readAt(file, entry.headerOffset, 30);
  if (header.readUInt32LE(0) !== 0x04034b50) refuse('entry has no local header');
  const start = entry.headerOffset + 30 + header.readUInt16LE(26) + header.readUInt16LE(28);
  if (start + entry.packedBytes > archiveBytes) refuse('entry runs over the end of the file');
  return start;
}

/** Counts and sums what passes, and stops a deflate bomb at the declared size instead of at the end of the disk. */
function createCheck(name: string, entry: ZipEntry, onBytes: ExtractOptions['onBytes']): Transform {
  let done = 0;
  let crc = 0;
  return new Transform({
    transform(chunk: Buffer, _encoding, next): void {
      done += chunk.length;
      if (done > entry.bytes) {
        next(
          new GatewayError('INVALID_MODEL_FILE', `zip archive: ${name} is longer than declared`),
        );
        return;
      }
      crc = crc32(chunk, crc);
      onBytes?.(done, entry.bytes);
      next(null, chunk);
    },
    flush(next): void {
      const wrong =
        done !== entry.bytes ? `has ${done} bytes, declared ${entry.bytes}` : 'fails its CRC-32';
      const good = done === entry.bytes && crc === entry.crc;
      next(good ? null : new GatewayError('INVALID_MODEL_FILE', `zip archive: ${name} ${wrong}`));
    },
  });
}

/** Writes entry `name` of the archive to `targetPath` and syncs it. Leaves an incomplete file behind when it throws. */
export async function extractZipEntry(
  archivePath: string,
  name: string,
  targetPath: string,
  options: ExtractOptions,
): Promise<void> {
  const file = await open(archivePath, 'r');
  let entry: ZipEntry;
  let start: number;
  try {
    const archiveBytes = (await file.stat()).size;
    entry = findEntry(await readDirectory(file, archiveBytes), name);
    if (entry.bytes > options.bytesMax) refuse(`${name} has ${entry.bytes} bytes, too many`);
    start = await dataOffset(file, entry, archiveBytes);
  } finally {
    await file.close();
  }
  const source = createReadStream(archivePath, { start, end: start + entry.packedBytes - 1 });
  const sink = createWriteStream(targetPath, { flush: true });
  const check = createCheck(name, entry, options.onBytes);
  const end = options.signal === undefined ? {} : { signal: options.signal };
  try {
    await (entry.deflated
      ? pipeline(source, createInflateRaw(), check, sink, end)
      : pipeline(source, check, sink, end));
  } catch (error) {
    if (error instanceof Error && 'code' in error && String(error.code).startsWith('Z_')) {
      throw new GatewayError('INVALID_MODEL_FILE', `zip archive: ${name} does not inflate`, {
        cause: error,
      });
    }
    throw error;
  }
}
