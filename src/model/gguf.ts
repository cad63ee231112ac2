// Reads GGUF v2 and v3 (little endian): header, metadata, tensor table; never tensor data on its own. The file may be
// hostile: every count and size is checked against a limit and against the bytes that are left before anything is
// allocated for it, so a broken file costs an INVALID_MODEL_FILE and nothing else.
//
//   1. magic "GGUF", u32 version, u64 tensor count, u64 key count
//   2. per key: string key, u32 type, value           (string: u64 length + UTF-8; array: u32 type, u64 count, values)
//   3. per tensor: string name, u32 axes, u64 size per axis (innermost first), u32 type, u64 offset
//   4. padding to general.alignment (32), then the data; offsets count from there
//
// Arrays of strings (a vocabulary) are walked once for their bounds and decoded when asked for.

import { closeSync, fstatSync, openSync, readSync } from 'node:fs';
import { GatewayError } from '../errors.ts';

const headerBytesMax = 256 * 1024 * 1024;
const headerBytesFirst = 4 * 1024 * 1024; // the default model's header is 1.7 MB
const keysMax = 65_536;
const tensorsMax = 65_536;
const keyBytesMax = 65_535; // the specification's limit
const nameBytesMax = 63; // GGML_MAX_NAME without its terminator
const stringBytesMax = 16 * 1024 * 1024;
const arrayLengthMax = 16 * 1024 * 1024;
const axesMax = 4;
const alignmentMax = 4096; // a guess: files in the wild use 32

/** [GGUF type number, numbers per block, bytes per block]. */
const tensorTypes = {
  F32: [0, 1, 4],
  F16: [1, 1, 2],
  Q4_0: [2, 32, 18],
  Q4_1: [3, 32, 20],
  Q5_0: [6, 32, 22],
  Q5_1: [7, 32, 24],
  Q8_0: [8, 32, 34],
  Q8_1: [9, 32, 36],
  Q2_K: [10, 256, 84],
  Q3_K: [11, 256, 110],
  Q4_K: [12, 256, 144],
  Q5_K: [13, 256, 176],
  Q6_K: [14, 256, 210],
  Q8_K: [15, 256, 292],
  I8: [24, 1, 1],
  I16: [25, 1, 2],
  I32: [26, 1, 4],
  I64: [27, 1, 8],
  F64: [28, 1, 8],
  BF16: [30, 1, 2],
} as const satisfies Record<string, readonly [number, number, number]>;
export type GgufType = keyof typeof tensorTypes;

export interface GgufTensor {
  readonly name: string;
  readonly type: GgufType;
  /** Innermost axis first, as the file has it. */
  readonly shape: readonly number[];
  /** From the start of the file. */
  readonly offset: number;
  readonly bytes: number;
}

export interface GgufSource {
  readonly bytes: number;
  /** Exactly `length` bytes at `offset`; throws when the file has not that many. */
  read(offset: number, length: number): Uint8Array;
}

export interface GgufFile extends GgufSource, Disposable {
  readonly version: number;
  readonly metadata: GgufMetadata;
  readonly tensors: ReadonlyMap<string, GgufTensor>;
  close(): void;
}

function invalid(message: string, cause?: unknown): GatewayError {
  return new GatewayError(
    'INVALID_MODEL_FILE',
    `model file: ${message}`,
    cause === undefined ? {} : { cause },
  );
}

type Scalar = number | bigint | boolean | string;
/** An array is kept as its bytes until somebody wants it. */
interface LazyArray {
  readonly type: number;
  readonly count: number;
  readonly bytes: Uint8Array;
}

const scalarBytes: Readonly<Record<number, number>> = {
  0: 1, // u8
  1: 1, // i8
  2: 2, // u16
  3: 2, // i16
  4: 4, // u32
  5: 4, // i32
  6: 4, // f32
  7: 1, // bool
  10: 8, // u64
  11: 8, // i64
  12: 8, // f64
};
const typeString = 8;
const typeArray = 9;
const typeU32 = 4;

function readScalar(view: DataView, at: number, type: number): Scalar {
  switch (type) {
    case 0:
      return view.getUint8(at);
    case 1:
      return view.getInt8(at);
    case 2:
      return view.getUint16(at, true);
    case 3:
      return view.getInt16(at, true);
    case 4:
      return view.getUint32(at, true);
    case 5:
      return view.getInt32(at, true);
    case 6:
      return view.getFloat32(at, true);
    case 7:
      return view.getUint8(at) !== 0;
    case 10:
      return view.getBigUint64(at, true);
    case 11:
      return view.getBigInt64(at, true);
    default:
      return view.getFloat64(at, true);
  }
}

/** Typed access to metadata. Each getter throws INVALID_MODEL_FILE naming the key when it is absent or of another type. */
export class GgufMetadata {
  readonly #values: ReadonlyMap<string, { type: number; value: Scalar | LazyArray }>;

  constructor(values: ReadonlyMap<string, { type: number; value: Scalar | LazyArray }>) {
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
    if (found === undefined) throw invalid(`there is no ${key} (${wanted})`);
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
    if (typeof number !== 'number' || !Number.isFinite(number))
      throw invalid(`${key} is not a finite number`);
    return number;
  }

  /** A whole number from 0 to 2^53 - 1. */
  integer(key: string): number {
    const number = this.number(key);
    if (!Number.isSafeInteger(number) || number < 0)
      throw invalid(`${key} is not a whole number ≥ 0`);
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
    const cursor = new Cursor(memorySource(bytes));
    return Array.from({ length: count }, () => cursor.string(key, stringBytesMax));
  }

  /** The type's own range: booleans become 0 and 1, 64-bit values must be safe integers. */
  numbers(key: string): number[] {
    const { type, count, bytes } = this.#array(key);
    const size = scalarBytes[type];
    if (size === undefined) throw invalid(`${key} is not an array of numbers`);
    const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
    return Array.from({ length: count }, (_, i) => {
      const number = Number(readScalar(view, i * size, type));
      if ((type === 10 || type === 11) && !Number.isSafeInteger(number)) {
        throw invalid(`${key}[${i}] is not a safe integer`);
      }
      return number;
    });
  }
}

function memorySource(bytes: Uint8Array): GgufSource {
  return {
    bytes: bytes.length,
    read(offset, length) {
      if (offset + length > bytes.length) throw invalid('it ends too early');
      return bytes.subarray(offset, offset + length);
    },
  };
}

const utf8 = new TextDecoder('utf-8', { fatal: true });

/** Reads forward over a buffered start of the file, which grows as needed up to headerBytesMax. */
class Cursor {
  at = 0;
  readonly #source: GgufSource;
  #window: Uint8Array;
  #view: DataView;

  constructor(source: GgufSource) {
    this.#source = source;
    this.#window = source.read(0, Math.min(source.bytes, headerBytesFirst));
    this.#view = viewOf(this.#window);
  }

  get left(): number {
    return this.#source.bytes - this.at;
  }

  /** Start of the next `length` bytes, which are in the window afterwards. */
  take(length: number, what: string): number {
    if (length > this.left) throw invalid(`it ends inside ${what}`);
    const start = this.at;
    this.at += length;
    if (this.at > this.#window.length) {
      if (this.at > headerBytesMax)
        throw invalid(`its header is larger than ${headerBytesMax} bytes`);
      const size = Math.min(
        this.#source.bytes,
        headerBytesMax,
        Math.max(this.at, this.#window.length * 2),
      );
      this.#window = this.#source.read(0, size);
      this.#view = viewOf(this.#window);
    }
    return start;
  }

  bytes(from: number, to: number): Uint8Array {
    return this.#window.slice(from, to);
  }

  u32(what: string): number {
    const start = this.take(4, what);
    return this.#view.getUint32(start, true);
  }

  /** A 64-bit count or size, at most `max`. */
  count(what: string, max: number): number {
    const start = this.take(8, what);
    const value = this.#view.getBigUint64(start, true);
    if (value > BigInt(max)) throw invalid(`${what} is ${value}, at most ${max} is accepted`);
    return Number(value);
  }

  scalar(type: number, what: string): Scalar {
    const size = scalarBytes[type];
    if (size === undefined) throw invalid(`${what} has the unknown type ${type}`);
    const start = this.take(size, what);
    return readScalar(this.#view, start, type);
  }

  string(what: string, bytesMax: number): string {
    const length = this.count(`the length of ${what}`, Math.min(bytesMax, this.left));
    const start = this.take(length, what);
    try {
      return utf8.decode(this.#window.subarray(start, start + length));
    } catch (cause) {
      throw invalid(`${what} is not UTF-8`, cause);
    }
  }

  array(what: string): LazyArray {
    const type = this.u32(what);
    if (type === typeArray) throw invalid(`${what} is an array of arrays`);
    const count = this.count(`the length of ${what}`, arrayLengthMax);
    const size = type === typeString ? 8 : scalarBytes[type];
    if (size === undefined) throw invalid(`${what} has elements of the unknown type ${type}`);
    if (count * size > this.left)
      throw invalid(`${what} has ${count} elements, more than bytes are left`);
    const start = this.at;
    if (type === typeString) {
      for (let i = 0; i < count; i++) {
        this.take(this.count(`the length of ${what}`, Math.min(stringBytesMax, this.left)), what);
      }
    } else {
      this.take(count * size, what);
    }
    return { type, count, bytes: this.bytes(start, this.at) };
  }
}

function viewOf(bytes: Uint8Array): DataView {
  return new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
}

function readMetadata(
  cursor: Cursor,
  count: number,
): Map<string, { type: number; value: Scalar | LazyArray }> {
  const values = new Map<string, { type: number; value: Scalar | LazyArray }>();
  for (let i = 0; i < count; i++) {
    const key = cursor.string(`key ${i}`, keyBytesMax);
    if (key === '') throw invalid(`key ${i} is empty`);
    if (values.has(key)) throw invalid(`the key ${key} occurs twice`);
    const type = cursor.u32(key);
    const value =
      type === typeArray
        ? cursor.array(key)
        : type === typeString
          ? cursor.string(key, stringBytesMax)
          : cursor.scalar(type, key);
    values.set(key, { type, value });
  }
  return values;
}

function readAlignment(
  values: ReadonlyMap<string, { type: number; value: Scalar | LazyArray }>,
): number {
  const found = values.get('general.alignment');
  if (found === undefined) return 32;
  const { type, value } = found;
  const ok =
    type === typeU32 &&
    typeof value === 'number' &&
    value >= 1 &&
    value <= alignmentMax &&
    (value & (value - 1)) === 0;
  if (!ok) throw invalid(`general.alignment must be a u32 power of two from 1 to ${alignmentMax}`);
  return value;
}

const typeByNumber: ReadonlyMap<number, GgufType> = new Map(
  Object.entries(tensorTypes).map(([name, [number]]) => [number, name as GgufType]),
);

function readShape(cursor: Cursor, name: string): number[] {
  const axes = cursor.u32(`${name}: axes`);
  if (axes > axesMax) throw invalid(`${name} has ${axes} axes, at most ${axesMax} are accepted`);
  return Array.from({ length: axes }, (_, i) =>
    cursor.count(`${name}: size of axis ${i}`, Number.MAX_SAFE_INTEGER),
  );
}

/** Bytes of a tensor; the product is checked at every step, so that it can neither wrap nor lose precision. */
function tensorBytes(name: string, type: GgufType, shape: readonly number[]): number {
  const [, block, bytes] = tensorTypes[type];
  const rowLength = shape[0] ?? 1;
  if (rowLength % block !== 0)
    throw invalid(`${name}: rows of ${rowLength} are not whole blocks of ${block}`);
  const total = shape.reduce((product, size) => {
    const next = product * size;
    if (!Number.isSafeInteger(next)) throw invalid(`${name}: ${shape.join('×')} is too large`);
    return next;
  }, 1);
  const size = (total / block) * bytes;
  if (!Number.isSafeInteger(size)) throw invalid(`${name}: ${shape.join('×')} is too large`);
  return size;
}

interface TableEntry extends Omit<GgufTensor, 'offset'> {
  /** From the start of the data. */
  readonly offset: number;
}

function readTable(cursor: Cursor, count: number, alignment: number): TableEntry[] {
  const names = new Set<string>();
  let expected = 0;
  return Array.from({ length: count }, (_, i) => {
    const name = cursor.string(`the name of tensor ${i}`, nameBytesMax);
    if (names.has(name)) throw invalid(`the tensor ${name} occurs twice`);
    names.add(name);
    const shape = readShape(cursor, name);
    const number = cursor.u32(`${name}: type`);
    const type = typeByNumber.get(number);
    if (type === undefined) throw invalid(`${name} has the unknown type ${number}`);
    const offset = cursor.count(`${name}: offset`, Number.MAX_SAFE_INTEGER);
    if (offset !== expected)
      throw invalid(`${name} lies at ${offset}, the tensors before it end at ${expected}`);
    const bytes = tensorBytes(name, type, shape);
    expected = padded(offset + bytes, alignment);
    if (!Number.isSafeInteger(expected)) throw invalid(`the tensors up to ${name} are too large`);
    return { name, type, shape, offset, bytes };
  });
}

function padded(size: number, alignment: number): number {
  return Math.ceil(size / alignment) * alignment;
}

export function readGguf(
  source: GgufSource,
): Omit<GgufFile, keyof GgufSource | 'close' | typeof Symbol.dispose> {
  const cursor = new Cursor(source);
  const magic = cursor.take(4, 'the magic');
  if (utf8Ascii(cursor.bytes(magic, magic + 4)) !== 'GGUF')
    throw invalid('it does not start with GGUF');
  const version = cursor.u32('the version');
  if (version !== 2 && version !== 3)
    throw invalid(`GGUF version 2 or 3 is read, this is ${version}`);
  const tensorCount = cursor.count('the number of tensors', tensorsMax);
  const keyCount = cursor.count('the number of keys', keysMax);
  const values = readMetadata(cursor, keyCount);
  const alignment = readAlignment(values);
  const table = readTable(cursor, tensorCount, alignment);
  const base = padded(cursor.at, alignment);
  const tensors = new Map<string, GgufTensor>();
  for (const entry of table) {
    const offset = base + entry.offset;
    if (offset + entry.bytes > source.bytes) {
      throw invalid(`${entry.name} ends at ${offset + entry.bytes}, the file at ${source.bytes}`);
    }
    tensors.set(entry.name, { ...entry, offset });
  }
  return { version, metadata: new GgufMetadata(values), tensors };
}

function utf8Ascii(bytes: Uint8Array): string {
  return String.fromCharCode(...bytes);
}

/** Opens a file and reads its header. The descriptor stays open for tensor data until `close`. */
export function openGguf(path: string): GgufFile {
  const descriptor = openSync(path, 'r');
  const source: GgufSource = {
    bytes: fstatSync(descriptor).size,
    read(offset, length) {
      const bytes = Buffer.allocUnsafeSlow(length);
      let done = 0;
      while (done < length) {
        const count = readSync(descriptor, bytes, done, length - done, offset + done);
        if (count === 0) throw invalid('it ends too early');
        done += count;
      }
      return bytes;
    },
  };
  let open = true;
  const close = (): void => {
    if (open) closeSync(descriptor);
    open = false;
  };
  try {
    return { ...readGguf(source), ...source, close, [Symbol.dispose]: close };
  } catch (error) {
    close();
    throw error;
  }
}
