// Reads GGUF v2 and v3 (little endian): header, metadata, tensor table; never tensor data on its own. The file may be
// hostile: a broken one costs an INVALID_MODEL_FILE and nothing else.
//
//   1. magic "GGUF", u32 version, u64 tensor count, u64 key count
//   2. per key: string key, u32 type, value           (string: u64 length + UTF-8; array: u32 type, u64 count, values)
//   3. per tensor: string name, u32 axes, u64 size per axis (innermost first), u32 type, u64 offset
//   4. padding to general.alignment (32), then the data; offsets count from there, each tensor padded likewise

import { GatewayError } from '../errors.ts';
import { type ByteSource, type FileSource, openFileSource } from './byte-source.ts';
import { Cursor, GgufMetadata, invalid, type MetadataValue, typeU32 } from './gguf-values.ts';
import { quoted } from './quoted.ts';

const magic = 0x46554747; // "GGUF"
const keysMax = 65_536;
const tensorsMax = 65_536;
const keyBytesMax = 65_535; // the specification's limit
const nameBytesMax = 63; // GGML_MAX_NAME without its terminator
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
} as const;
export type GgufType = keyof typeof tensorTypes;
const typeByNumber: ReadonlyMap<number, GgufType> = new Map(
  Object.entries(tensorTypes).map(([name, [number]]) => [number, name as GgufType]),
);
/** Types of ggml that this build does not read: the file is good, the reader is not. */
const unreadTypes: ReadonlyMap<number, string> = new Map(
  (
    '16:IQ2_XXS 17:IQ2_XS 18:IQ3_XXS 19:IQ1_S 20:IQ4_NL 21:IQ3_S 22:IQ2_S 23:IQ4_XS 29:IQ1_M ' +
    '34:TQ1_0 35:TQ2_0 39:MXFP4'
  )
    .split(' ')
    .map((type) => [Number(type.slice(0, 2)), type.slice(3)]),
);

export interface GgufTensor {
  readonly name: string;
  readonly type: GgufType;
  /** Innermost axis first, as the file has it. */
  readonly shape: readonly number[];
  /** From the start of the file. */
  readonly offset: number;
  readonly bytes: number;
}

export interface GgufHeader {
  readonly version: number;
  readonly alignment: number;
  readonly metadata: GgufMetadata;
  readonly tensors: ReadonlyMap<string, GgufTensor>;
}

export interface GgufFile extends GgufHeader, FileSource {}

/** Throws INVALID_MODEL_FILE, or UNSUPPORTED for a tensor type that exists and is not read. */
export function readGguf(source: ByteSource): GgufHeader {
  const cursor = new Cursor(source);
  if (cursor.u32('the magic') !== magic) throw invalid('it does not start with GGUF');
  const version = cursor.u32('the version');
  if (version === 0x02000000 || version === 0x03000000) {
    throw new GatewayError('UNSUPPORTED', 'model file: big-endian GGUF is not supported');
  }
  if (version !== 2 && version !== 3) throw invalid(`GGUF 2 and 3 are read, this is ${version}`);
  const tensorCount = cursor.count('the number of tensors', tensorsMax);
  const keyCount = cursor.count('the number of keys', keysMax);
  const values = readMetadata(cursor, keyCount);
  const alignment = readAlignment(values);
  const table = readTable(cursor, tensorCount, alignment);
  const dataAt = padded(cursor.at, alignment);
  const tensors = new Map<string, GgufTensor>();
  for (const entry of table) {
    const offset = dataAt + entry.offset;
    const end = offset + entry.bytes;
    // An empty tensor has no bytes that could be missing: the padding before it may be.
    if (entry.bytes > 0 && end > source.bytes) {
      throw invalid(`${quoted(entry.name)} ends at ${end}, the file at ${source.bytes}`);
    }
    tensors.set(entry.name, { ...entry, offset });
  }
  return { version, alignment, metadata: new GgufMetadata(values), tensors };
}

/** Opens a file and reads its header. The descriptor stays open for tensor data until `close`. */
export function openGguf(path: string): GgufFile {
  const source = openFileSource(path, 'INVALID_MODEL_FILE');
  try {
    return { ...readGguf(source), ...source };
  } catch (error) {
    source.close();
    throw error;
  }
}

function readMetadata(cursor: Cursor, count: number): Map<string, MetadataValue> {
  const values = new Map<string, MetadataValue>();
  for (let i = 0; i < count; i++) {
    const key = cursor.string(`key ${i}`, keyBytesMax);
    if (key === '') throw invalid(`key ${i} is empty`);
    if (values.has(key)) throw invalid(`the key ${quoted(key)} occurs twice`);
    values.set(key, cursor.value(key));
  }
  return values;
}

function readAlignment(values: ReadonlyMap<string, MetadataValue>): number {
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

function padded(size: number, alignment: number): number {
  return Math.ceil(size / alignment) * alignment;
}

/** Offsets of the entries count from the start of the data. */
function readTable(cursor: Cursor, count: number, alignment: number): GgufTensor[] {
  const names = new Set<string>();
  let expected = 0;
  return Array.from({ length: count }, (_, i) => {
    const name = cursor.string(`the name of tensor ${i}`, nameBytesMax);
    const what = quoted(name);
    if (names.has(name)) throw invalid(`the tensor ${what} occurs twice`);
    names.add(name);
    const shape = readShape(cursor, what);
    const type = readType(cursor, what);
    const offset = cursor.count(`the offset of ${what}`, Number.MAX_SAFE_INTEGER);
    if (offset !== expected) {
      throw invalid(`${what} lies at ${offset}, the tensors before it end at ${expected}`);
    }
    const bytes = tensorBytes(what, type, shape);
    expected = padded(offset + bytes, alignment);
    if (!Number.isSafeInteger(expected)) throw invalid(`the tensors up to ${what} are too large`);
    return { name, type, shape, offset, bytes };
  });
}

function readShape(cursor: Cursor, what: string): number[] {
  const axes = cursor.u32(`the axes of ${what}`);
  if (axes > axesMax) throw invalid(`${what} has ${axes} axes, at most ${axesMax} are accepted`);
  return Array.from({ length: axes }, (_, i) =>
    cursor.count(`axis ${i} of ${what}`, Number.MAX_SAFE_INTEGER),
  );
}

function readType(cursor: Cursor, what: string): GgufType {
  const number = cursor.u32(`the type of ${what}`);
  const type = typeByNumber.get(number);
  if (type !== undefined) return type;
  const unread = unreadTypes.get(number);
  if (unread === undefined) throw invalid(`${what} has the unknown type ${number}`);
  throw new GatewayError('UNSUPPORTED', `model file: ${what} is ${unread}, which is not supported`);
}

/** The product is checked at every step, so that it can neither wrap nor lose precision. */
function tensorBytes(what: string, type: GgufType, shape: readonly number[]): number {
  const [, block, bytes] = tensorTypes[type];
  const rowLength = shape[0] ?? 1;
  if (rowLength % block !== 0) {
    throw invalid(`${what}: rows of ${rowLength} are not whole ${type} blocks of ${block}`);
  }
  const checked = (size: number): number => {
    if (Number.isSafeInteger(size)) return size;
    throw invalid(`${what}: ${type} ${shape.join('×')} is too large`);
  };
  const numbers = shape.reduce((product, size) => checked(product * size), 1);
  return checked((numbers / block) * bytes);
}
