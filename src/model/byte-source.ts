// Random access to bytes that may be far larger than memory: a file, or an array in tests. Readers of file formats take
// one of these, so that reading a header never pulls in the data behind it.

import { closeSync, constants, fstatSync, openSync, readSync } from 'node:fs';
import { type ErrorCode, GatewayError } from '../errors.ts';

export interface ByteSource {
  /** Size of the whole. */
  readonly bytes: number;
  /** Exactly `length` bytes at `offset`; throws when there are not that many. Read the result, never write to it. */
  read(offset: number, length: number): Uint8Array;
}

export interface FileSource extends ByteSource, Disposable {
  close(): void;
}

export function memorySource(bytes: Uint8Array, code: ErrorCode): ByteSource {
  return {
    bytes: bytes.length,
    read(offset, length) {
      if (offset + length > bytes.length) throw new GatewayError(code, 'the file ends too early');
      return bytes.subarray(offset, offset + length);
    },
  };
}

/** Opens a regular file; its size is taken once. `code` is the error for a file that cannot be read or has shrunk. */
export function openFileSource(path: string, code: ErrorCode): FileSource {
  const descriptor = openRegular(path, code);
  let open = true;
  const close = (): void => {
    if (open) closeSync(descriptor);
    open = false;
  };
  const read = (offset: number, length: number): Uint8Array => {
    if (!open) throw new GatewayError('INTERNAL', 'read from a file that is closed');
    const bytes = new Uint8Array(length);
    for (let done = 0; done < length; ) {
      const count = readSync(descriptor, bytes, done, length - done, offset + done);
      if (count === 0) throw new GatewayError(code, 'the file ends too early');
      done += count;
    }
    return bytes;
  };
  return { bytes: fstatSync(descriptor).size, read, close, [Symbol.dispose]: close };
}

function openRegular(path: string, code: ErrorCode): number {
  let descriptor: number;
  try {
    // Opening a pipe for reading would wait for a writer; with O_NONBLOCK it is opened and then refused.
    descriptor = openSync(path, constants.O_RDONLY | (constants.O_NONBLOCK ?? 0));
  } catch (cause) {
    // The system's message holds the path, which callers must not see; its code is enough.
    const reason = (cause as NodeJS.ErrnoException).code ?? 'unknown error';
    throw new GatewayError(code, `the file cannot be opened (${reason})`, { cause });
  }
  if (fstatSync(descriptor).isFile()) return descriptor;
  closeSync(descriptor);
  throw new GatewayError(code, 'it is not a regular file');
}
