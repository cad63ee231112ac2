// A tar archive in memory, POSIX.1-1988 ustar: per file one 512-byte header, its bytes, zeros to the next multiple of 512;
// two zero blocks end it. Regular files with names of at most 100 ASCII bytes, which is what an export needs.

export interface TarEntry {
  readonly name: string;
  readonly bytes: Uint8Array;
}

const blockBytes = 512;
const sizeMax = 8 ** 11 - 1; // eleven octal digits

/** `modifiedS` is every entry's time in Unix seconds: the same input gives the same bytes. */
export function packTar(entries: readonly TarEntry[], modifiedS: number): Uint8Array<ArrayBuffer> {
  const total = entries.reduce((sum, entry) => sum + blockBytes + padded(entry.bytes.length), 0);
  const archive = new Uint8Array(total + 2 * blockBytes);
  let at = 0;
  for (const entry of entries) {
    archive.set(header(entry, modifiedS), at);
    archive.set(entry.bytes, at + blockBytes);
    at += blockBytes + padded(entry.bytes.length);
  }
  return archive;
}

function header(entry: TarEntry, modifiedS: number): Uint8Array {
  if (!/^[\x21-\x7e]{1,100}$/.test(entry.name) || entry.bytes.length > sizeMax) {
    throw new RangeError('a tar entry needs an ASCII name of 1 to 100 bytes and less than 8 GiB');
  }
  const block = Buffer.alloc(blockBytes);
  block.write(entry.name, 0, 'latin1');
  writeOctal(block, 0o644, 100, 8); // mode
  writeOctal(block, 0, 108, 8); // owner
  writeOctal(block, 0, 116, 8); // group
  writeOctal(block, entry.bytes.length, 124, 12);
  writeOctal(block, modifiedS, 136, 12);
  block.write('        ', 148, 'latin1'); // the checksum counts its own field as spaces
  block.write('0', 156, 'latin1'); // a regular file
  block.write('ustar\x0000', 257, 'latin1');
  const sum = block.reduce((total, byte) => total + byte, 0);
  block.write(`${sum.toString(8).padStart(6, '0')}\0 `, 148, 'latin1');
  return block;
}

function writeOctal(block: Buffer, value: number, offset: number, width: number): void {
  block.write(`${value.toString(8).padStart(width - 1, '0')}\0`, offset, 'latin1');
}

function padded(bytes: number): number {
  return Math.ceil(bytes / blockBytes) * blockBytes;
}
