// The values of a GGUF header: a cursor that reads them forward through a window of the file, and typed access to those
// of the metadata. Nothing is allocated for a length that the file states before it has been held against a limit and
// against the bytes that are left. Little endian throughout.

import { GatewayError } from '../errors.ts';
import { type ByteSource, memorySource } from './byte-source.ts';
import { quoted } from './quoted.ts';

/** Of everything before the data. The largest vocabularies in use (262,144 tokens, 514,906 merges) need 20 MB. */
const headerBytesMax: number = 64 * 1024 * 1024;
const windowBytes = 1024 * 1024;
const stringBytesMax = 16 * 1024 * 1024;
const arrayLengthMax = 4 * 1024 * 1024;

type Scalar = number | bigint | boolean | string;
/** An array is kept as its bytes until somebody wants it. */
interface LazyArray {
  readonly type: number;
  readonly count: number;
  readonly bytes: Uint8Array;
}
export interface MetadataValue {
  readonly type: number;
  readonly value: Scalar | LazyArray;
}

export const typeU32 = 4;
const typeString = 8;
const typeArray = 9;

type ReadScalar = (view: DataView, at: number) => Exclude<Scalar, string>;
/** By GGUF value type: bytes and how to read them. Strings (8) and arrays (9) are not scalars. */
const scalarTypes = new Map<number, { readonly bytes: number; readonly read: ReadScalar }>([
  [0, { bytes: 1, read: (view, at) => view.getUint8(at) }],
  [1, { bytes: 1, read: (view, at) => view.getInt8(at) }],
  [2, { bytes: 2, read: (view, at) => view.getUint16(at, true) }],
  [3, { bytes: 2, read: (view, at) => view.getInt16(at, true) }],
  [typeU32, { bytes: 4, read: (view, at) => view.getUint32(at, true) }],
  [5, { bytes: 4, read: (view, at) => view.getInt32(at, true) }],
  [6, { bytes: 4, read: (view, at) => view.getFloat32(at, true) }],
  [7, { bytes: 1, read: readBoolean }],
  [10, { bytes: 8, read: (view, at) => view.getBigUint64(at, true) }],
  [11, { bytes: 8, read: (view, at) => view.getBigInt64(at, true) }],
  [12, { bytes: 8, read: (view, at) => view.getFloat64(at, true) }],
]);

export function invalid(message: string, cause?: unknown): GatewayError {
  const details = cause === undefined ? {} : { cause };
  return new GatewayError('INVALID_MODEL_FILE', `model file: ${message}`, details);
}

function readBoolean(view: DataView, at: number): boolean {
  const byte = view.getUint8(at);
  // The specification: anything else means that file or reader is broken.
  if (byte > 1) throw invalid(`a boolean is ${byte}, only 0 and 1 are`);
  return byte === 1;
}

function viewOf(bytes: Uint8Array): DataView {
  return new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
}

/** The same memory. */
function bufferOf(bytes: Uint8Array): Buffer {
  return Buffer.from(bytes.buffer, bytes.byteOffset, bytes.byteLength);
}

// With ignoreBOM a leading U+FEFF stays: a vocabulary may have a token that starts with it.
const utf8 = new TextDecoder('utf-8', { fatal: true, ignoreBOM: true });

export class Cursor {
  /** Where in the source the next value starts. */
  at = 0;
  readonly #source: ByteSource;
  #windowAt = 0;
  #window: Uint8Array = new Uint8Array(0);
  #view: DataView = viewOf(this.#window);
  #buffer: Buffer = bufferOf(this.#window);

  constructor(source: ByteSource) {
    this.#source = source;
  }

  get left(): number {
    return this.#source.bytes - this.at;
  }

  #skip(length: number, what: string): void {
    if (length > this.left) throw invalid(`it ends inside ${what}`);
    if (this.at + length > headerBytesMax) {
      throw invalid(`its header is larger than ${headerBytesMax} bytes`);
    }
    this.at += length;
  }

  /** Index in the window of the next `length` bytes, which the cursor then has passed. */
  #take(length: number, what: string): number {
    const start = this.at;
    this.#skip(length, what);
    if (this.at > this.#windowAt + this.#window.length) {
      const size = Math.min(this.#source.bytes - start, Math.max(length, windowBytes));
      this.#window = this.#source.read(start, size);
      this.#view = viewOf(this.#window);
      this.#buffer = bufferOf(this.#window);
      this.#windowAt = start;
    }
    return start - this.#windowAt;
  }

  u32(what: string): number {
    const index = this.#take(4, what);
    return this.#view.getUint32(index, true);
  }

  /** A 64-bit count, size or offset, at most `max`; compared as a bigint, because 2^64 - 1 as a number is 2^64. */
  count(what: string, max: number): number {
    const index = this.#take(8, what);
    const value = this.#view.getBigUint64(index, true);
    if (value > BigInt(max)) throw invalid(`${what} is ${value}, at most ${max} is accepted`);
    return Number(value);
  }

  string(what: string, bytesMax: number): string {
    const length = this.count(`the length of ${what}`, Math.min(bytesMax, this.left));
    const index = this.#take(length, what);
    // Buffer decodes short strings several times faster than TextDecoder, with U+FFFD for what is not UTF-8; only a
    // string that has one is decoded again, to learn whether it was there.
    const text = this.#buffer.toString('utf8', index, index + length);
    if (!text.includes('\ufffd')) return text;
    try {
      return utf8.decode(this.#window.subarray(index, index + length));
    } catch (cause) {
      throw invalid(`${what} is not UTF-8`, cause);
    }
  }

  value(key: string): MetadataValue {
    const what = quoted(key);
    const type = this.u32(what);
    if (type === typeArray) return { type, value: this.#array(what) };
    if (type === typeString) return { type, value: this.string(what, stringBytesMax) };
    const scalar = scalarTypes.get(type);
    if (scalar === undefined) throw invalid(`${what} has the unknown type ${type}`);
    const index = this.#take(scalar.bytes, what);
    return { type, value: scalar.read(this.#view, index) };
  }

  #array(what: string): LazyArray {
    const type = this.u32(what);
    if (type === typeArray) throw invalid(`${what} is an array of arrays`);
    const count = this.count(`the length of ${what}`, arrayLengthMax);
    const size = type === typeString ? 8 : scalarTypes.get(type)?.bytes;
    if (size === undefined) throw invalid(`${what} has elements of the unknown type ${type}`);
    if (count * size > this.left) {
      throw invalid(`${what} states ${count} elements, ${this.left} bytes are left`);
    }
    const start = this.at;
    if (type === typeString) {
      for (let i = 0; i < count; i++) {
        this.#skip(this.count(`the length of ${what}[${i}]`, stringBytesMax), what);
      }
    } else {
      this.#skip(count * size, what);
    }
    return { type, count, bytes: this.#source.read(start, this.at - start) };
  }
}

/** Each getter throws INVALID_MODEL_FILE naming the key when it is absent or of another type: a number is never read out
 *  of bytes that were declared to be something else. */
export class GgufMetadata {
  readonly #values: ReadonlyMap<string, MetadataValue>;

  constructor(values: ReadonlyMap<string, MetadataValue>) {
    this.#values = values;
  }

  get keys(): readonly string[] {
    return [...this.#values.keys()];
  }

  has(key: string): boolean {
    return this.#values.has(key);
  }

  #find(key: string, wanted: string): Scalar | LazyArray {
    const found = this.#values.get(key);
    if (found === undefined) throw invalid(`there is no ${key}, ${wanted}`);
    return found.value;
  }

  string(key: string): string {
    const value = this.#find(key, 'a string');
    if (typeof value !== 'string') throw invalid(`${key} is not a string`);
    return value;
  }

  boolean(key: string): boolean {
    const value = this.#find(key, 'a boolean');
    if (typeof value !== 'boolean') throw invalid(`${key} is not a boolean`);
    return value;
  }

  /** Any number, finite. */
  number(key: string): number {
    const value = this.#find(key, 'a number');
    const number = typeof value === 'bigint' ? Number(value) : value;
    if (typeof number !== 'number' || !Number.isFinite(number)) {
      throw invalid(`${key} is not a finite number`);
    }
    return number;
  }

  /** A whole number from 0 to 2^53 - 1, of whatever width the file gave it. */
  integer(key: string): number {
    const number = this.number(key);
    if (!Number.isSafeInteger(number) || number < 0) {
      throw invalid(`${key} is not a whole number ≥ 0`);
    }
    return number;
  }

  #array(key: string): LazyArray {
    const value = this.#find(key, 'an array');
    if (typeof value !== 'object') throw invalid(`${key} is not an array`);
    return value;
  }

  strings(key: string): string[] {
    const { type, count, bytes } = this.#array(key);
    if (type !== typeString) throw invalid(`${key} is not an array of strings`);
    const cursor = new Cursor(memorySource(bytes, 'INVALID_MODEL_FILE'));
    return Array.from({ length: count }, (_, i) =>
      cursor.string(`${quoted(key)}[${i}]`, stringBytesMax),
    );
  }

  /** Integers or floats, by their declared type. 64-bit integers must be safe. */
  numbers(key: string): number[] {
    const { type, count, bytes } = this.#array(key);
    const scalar = scalarTypes.get(type);
    if (scalar === undefined) throw invalid(`${key} is not an array of numbers`);
    const view = viewOf(bytes);
    return Array.from({ length: count }, (_, i) => {
      const value = scalar.read(view, i * scalar.bytes);
      if (typeof value === 'boolean') throw invalid(`${key} is not an array of numbers`);
      const number = Number(value);
      if (typeof value === 'bigint' && !Number.isSafeInteger(number)) {
        throw invalid(`${key}[${i}] is ${value}, which a double cannot hold`);
      }
      return number;
    });
  }
}
