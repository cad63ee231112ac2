// Builds small zip archives, and broken ones: each field that a reader must check can be overridden.

import { crc32, deflateRawSync } from 'node:zlib';

export interface ZipPart {
  readonly name: string;
  readonly data: Uint8Array;
  readonly stored?: boolean;
  readonly crc?: number;
  readonly bytes?: number; // declared size
  readonly method?: number;
  readonly flags?: number;
  readonly headerOffset?: number;
}

export function buildZip(parts: readonly ZipPart[], comment = ''): Buffer {
  const locals: Buffer[] = [];
  const directory: Buffer[] = [];
  let offset = 0;
  for (const part of parts) {
    const name = Buffer.from(part.name);
    const packed = part.stored ? Buffer.from(part.data) : deflateRawSync(part.data);
    const fields = Buffer.alloc(26); // what local header and directory entry share, from "version needed" on
    fields.writeUInt16LE(20, 0);
    fields.writeUInt16LE(part.flags ?? 0, 2);
    fields.writeUInt16LE(part.method ?? (part.stored ? 0 : 8), 4);
    fields.writeUInt32LE(part.crc ?? crc32(part.data), 10);
    fields.writeUInt32LE(packed.length, 14);
    fields.writeUInt32LE(part.bytes ?? part.data.length, 18);
    fields.writeUInt16LE(name.length, 22);
    const local = Buffer.concat([Buffer.from('PK\x03\x04', 'latin1'), fields, name, packed]);
    const tail = Buffer.alloc(14); // comment, disk, attributes, offset
    tail.writeUInt32LE(part.headerOffset ?? offset, 10);
    directory.push(
      Buffer.concat([Buffer.from('PK\x01\x02\x14\x00', 'latin1'), fields, tail, name]),
    );
    locals.push(local);
    offset += local.length;
  }
  const entries = Buffer.concat(directory);
  const end = Buffer.alloc(22);
  end.write('PK\x05\x06', 'latin1');
  end.writeUInt16LE(parts.length, 8);
  end.writeUInt16LE(parts.length, 10);
  end.writeUInt32LE(entries.length, 12);
  end.writeUInt32LE(offset, 16);
  end.writeUInt16LE(comment.length, 20);
  return Buffer.concat([...locals, entries, end, Buffer.from(comment, 'latin1')]);
}
