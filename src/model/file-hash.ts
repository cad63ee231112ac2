// SHA-256 of large files, remembered: hashing 92 MB at each start would cost more than loading it. A remembered hash
// counts only while size, modification time and inode are the same; the memory is one bounded JSON file.

import { createHash } from 'node:crypto';
import { createReadStream } from 'node:fs';
import { mkdir, open, readFile, realpath, rename, rm, stat } from 'node:fs/promises';
import { dirname, join } from 'node:path';
import { z } from 'zod';

const rememberedMax = 64;
const memorySchema = z.array(
  z.strictObject({
    path: z.string(),
    bytes: z.number(),
    modifiedMs: z.number(),
    inode: z.number(),
    sha256: z.string().regex(/^[0-9a-f]{64}$/),
  }),
);
type Memory = z.infer<typeof memorySchema>;

export async function sha256OfFile(path: string, signal?: AbortSignal): Promise<string> {
  const hash = createHash('sha256');
  for await (const chunk of createReadStream(path, { highWaterMark: 1 << 20, signal })) {
    hash.update(chunk as Buffer);
  }
  return hash.digest('hex');
}

let writes = 0; // so that two writers of one file do not share what is unfinished

/** temp → fsync → rename → fsync of the directory: after a crash the old file or the new one, never a half. A write that
 *  fails leaves nothing behind. */
export async function writeFileDurably(path: string, contents: string | Uint8Array): Promise<void> {
  writes += 1;
  const partial = `${path}.${process.pid}.${writes}.partial`;
  try {
    const file = await open(partial, 'w');
    try {
      await file.writeFile(contents);
      await file.sync();
    } finally {
      await file.close();
    }
    await renameDurably(partial, path);
  } catch (error) {
    await rm(partial, { force: true }).catch(() => {});
    throw error;
  }
}

export async function renameDurably(from: string, to: string): Promise<void> {
  await rename(from, to);
  // Windows has no directory handles to sync; the rename itself is journaled there.
  const folder = await open(dirname(to), 'r').catch(() => null);
  if (folder === null) return;
  try {
    await folder.sync();
  } finally {
    await folder.close();
  }
}

async function readMemory(path: string): Promise<Memory> {
  try {
    return memorySchema.parse(JSON.parse(await readFile(path, 'utf8')));
  } catch {
    // Absent or damaged: the cost is one more pass over the file.
    await rm(path, { force: true }).catch(() => {});
    return [];
  }
}

export async function rememberedSha256(
  path: string,
  memoryDir: string,
  signal?: AbortSignal,
): Promise<string> {
  const memoryPath = join(memoryDir, 'hashes.json');
  const real = await realpath(path);
  const { size: bytes, mtimeMs: modifiedMs, ino: inode } = await stat(real);
  const memory = await readMemory(memoryPath);
  const known = memory.find(
    (one) =>
      one.path === real &&
      one.bytes === bytes &&
      one.modifiedMs === modifiedMs &&
      one.inode === inode,
  );
  if (known !== undefined) return known.sha256;
  const sha256 = await sha256OfFile(real, signal);
  const others = memory.filter((one) => one.path !== real).slice(0, rememberedMax - 1);
  try {
    await mkdir(memoryDir, { recursive: true });
    await writeFileDurably(
      memoryPath,
      JSON.stringify([{ path: real, bytes, modifiedMs, inode, sha256 }, ...others]),
    );
  } catch {
    // A full or read-only disk: the cost is one more pass over the file.
  }
  return sha256;
}
