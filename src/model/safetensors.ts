// Reads and writes safetensors. The file may be hostile: the header is bounded before it is parsed, and the tensors must
// tile the data exactly (no holes, no overlap, nothing after them), so that no number in it can point outside.
//
//   u64 header length N (little endian) · N bytes of JSON · data
//   JSON: { "__metadata__"?: { string: string }, name: { dtype, shape, data_offsets: [begin, end] } }, offsets from data
//
// JSON.parse alone is no judge of the header: it rounds large integers, takes duplicate keys and deep nesting.

import { type ErrorCode, GatewayError } from '../errors.ts';
import { bf16BitsToF32, f16BitsToF32 } from '../kernels/half.ts';

export interface SafetensorsLimits {
  readonly headerBytesMax: number;
  readonly tensorsMax: number;
  /** The code of what is thrown for a file that breaks a rule. */
  readonly code: ErrorCode;
}

/** For an adapter: 10,000 tensors with names of 60 characters need about 1 MiB of header. */
export const adapterLimits: SafetensorsLimits = {
  headerBytesMax: 1024 * 1024,
  tensorsMax: 10_000,
  code: 'INVALID_ADAPTER',
};

const dtypeBytes = {
  F64: 8,
  F32: 4,
  F16: 2,
  BF16: 2,
  I64: 8,
  I32: 4,
  I16: 2,
  I8: 1,
  U8: 1,
  BOOL: 1,
} as const;
export type SafetensorsDtype = keyof typeof dtypeBytes;

export interface SafetensorsTensor {
  readonly dtype: SafetensorsDtype;
  readonly shape: readonly number[];
  /** A view of the file's bytes: borrowed, little endian, at any alignment. */
  readonly data: Uint8Array;
}

export interface SafetensorsFile {
  readonly metadata: ReadonlyMap<string, string>;
  readonly tensors: ReadonlyMap<string, SafetensorsTensor>;
}

const depthMax = 4; // {name: {data_offsets: [..]}} is 3 deep
const axesMax = 8;
const nameLengthMax = 512;
const forbiddenNames = ['__proto__', 'constructor', 'prototype'];

type Refuse = (message: string) => GatewayError;

export function readSafetensors(
  bytes: Uint8Array,
  limits: SafetensorsLimits = adapterLimits,
): SafetensorsFile {
  const refuse: Refuse = (message) => new GatewayError(limits.code, `safetensors: ${message}`);
  if (bytes.length < 8) throw refuse(`${bytes.length} bytes are too few for a header`);
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const length = view.getBigUint64(0, true); // bounded as a bigint: Number() would round it
  if (length > BigInt(limits.headerBytesMax)) {
    throw refuse(`the header has ${length} bytes, at most ${limits.headerBytesMax} are accepted`);
  }
  const headerEnd = 8 + Number(length);
  if (headerEnd > bytes.length) throw refuse('the file ends inside its header');
  const header = parseHeader(bytes.subarray(8, headerEnd), refuse);
  const data = bytes.subarray(headerEnd);
  const entries = Object.entries(header).filter(([name]) => name !== '__metadata__');
  if (entries.length > limits.tensorsMax) {
    throw refuse(`${entries.length} tensors, at most ${limits.tensorsMax} are accepted`);
  }
  const placed = entries.map(([name, value]) => readEntry(name, value, refuse));
  checkTiling(placed, data.length, refuse);
  const tensors = new Map<string, SafetensorsTensor>();
  for (const { name, dtype, shape, begin, end } of placed) {
    tensors.set(name, { dtype, shape, data: data.subarray(begin, end) });
  }
  return { metadata: readMetadata(header.__metadata__, refuse), tensors };
}

function parseHeader(bytes: Uint8Array, refuse: Refuse): Record<string, unknown> {
  let text: string;
  try {
    text = new TextDecoder('utf-8', { fatal: true, ignoreBOM: true }).decode(bytes);
  } catch {
    throw refuse('the header is not UTF-8');
  }
  if (!text.startsWith('{')) throw refuse('the header does not start with {');
  checkDepth(text, refuse);
  const names: string[] = [];
  let header: unknown;
  try {
    header = JSON.parse(text);
    collectNames(text, names);
  } catch {
    throw refuse('the header is not JSON');
  }
  if (!isRecord(header)) throw refuse('the header is not an object');
  if (new Set(names).size !== names.length) throw refuse('a tensor is named twice');
  return header;
}

/** Nesting is counted before parsing, outside strings: 5 million open brackets cost JSON.parse seconds. */
function checkDepth(text: string, refuse: Refuse): void {
  let depth = 0;
  let inString = false;
  for (let i = 0; i < text.length; i++) {
    const character = text.charCodeAt(i);
    if (inString) {
      if (character === 0x5c) i++;
      else if (character === 0x22) inString = false;
    } else if (character === 0x22) inString = true;
    else if (character === 0x7b || character === 0x5b) {
      if (++depth > depthMax) throw refuse(`the header is nested deeper than ${depthMax}`);
    } else if (character === 0x7d || character === 0x5d) depth--;
  }
}

/** The keys of the outermost object, duplicates included, from text that JSON.parse has accepted. */
function collectNames(text: string, names: string[]): void {
  let depth = 0;
  for (const match of text.matchAll(/"(?:[^"\\]|\\.)*"(\s*:)?|[{}[\]]/g)) {
    const [token, colon] = match;
    if (token === '{' || token === '[') depth++;
    else if (token === '}' || token === ']') depth--;
    else if (depth === 1 && colon !== undefined) {
      names.push(JSON.parse(token.slice(0, token.length - colon.length)) as string);
    }
  }
}

function isRecord(value: unknown): value is Record<string, unknown> {
  return typeof value === 'object' && value !== null && !Array.isArray(value);
}

function readMetadata(value: unknown, refuse: Refuse): Map<string, string> {
  const metadata = new Map<string, string>();
  if (value === undefined) return metadata;
  if (!isRecord(value)) throw refuse('__metadata__ is not an object');
  for (const [key, text] of Object.entries(value)) {
    if (typeof text !== 'string') throw refuse(`__metadata__.${key} is not a string`);
    metadata.set(key, text);
  }
  return metadata;
}

interface PlacedTensor {
  readonly name: string;
  readonly dtype: SafetensorsDtype;
  readonly shape: readonly number[];
  readonly begin: number;
  readonly end: number;
}

function isCount(value: unknown): value is number {
  return typeof value === 'number' && Number.isSafeInteger(value) && value >= 0;
}

function readEntry(name: string, value: unknown, refuse: Refuse): PlacedTensor {
  if (name.length > nameLengthMax || /\p{Surrogate}/u.test(name) || forbiddenNames.includes(name)) {
    throw refuse('a tensor has a name that is not accepted');
  }
  if (!isRecord(value)) throw refuse(`${name} is not an object`);
  const { dtype, shape, data_offsets: offsets, ...others } = value;
  if (Object.keys(others).length > 0)
    throw refuse(`${name} has the unknown field ${Object.keys(others)[0]}`);
  if (typeof dtype !== 'string' || !(dtype in dtypeBytes)) {
    throw new GatewayError('UNSUPPORTED', `safetensors: ${name} has the type ${String(dtype)}`);
  }
  if (!Array.isArray(shape) || shape.length > axesMax || !shape.every(isCount)) {
    throw refuse(`${name} has a shape that is not a list of at most ${axesMax} whole numbers`);
  }
  if (!Array.isArray(offsets) || offsets.length !== 2 || !offsets.every(isCount)) {
    throw refuse(`${name} has data_offsets that are not two whole numbers`);
  }
  const [begin, end] = offsets as [number, number];
  const bytes = shape.reduce(
    (product, size) => product * size,
    dtypeBytes[dtype as SafetensorsDtype],
  );
  if (!Number.isSafeInteger(bytes) || end - begin !== bytes) {
    throw refuse(
      `${name} is ${shape.join('×')} ${dtype}, its ${end - begin} bytes do not fit that`,
    );
  }
  return { name, dtype: dtype as SafetensorsDtype, shape, begin, end };
}

/** The tensors in order of their offsets must follow each other from 0 to the end of the data. */
function checkTiling(tensors: readonly PlacedTensor[], dataBytes: number, refuse: Refuse): void {
  let expected = 0;
  for (const { name, begin, end } of [...tensors].sort(
    (a, b) => a.begin - b.begin || a.end - b.end,
  )) {
    if (begin !== expected)
      throw refuse(`${name} starts at ${begin}, the tensors before it end at ${expected}`);
    expected = end;
  }
  if (expected !== dataBytes)
    throw refuse(`the tensors end at ${expected}, the data at ${dataBytes}`);
}

/** The numbers as f32. Throws UNSUPPORTED for integer tensors. */
export function toFloat32({ dtype, data }: SafetensorsTensor): Float32Array {
  const aligned = new Uint8Array(data).buffer; // a copy: Buffer's own slice() would be a view
  switch (dtype) {
    case 'F32':
      return new Float32Array(aligned);
    case 'F64':
      return Float32Array.from(new Float64Array(aligned));
    case 'F16':
    case 'BF16': {
      const bits = new Uint16Array(aligned);
      const values = new Float32Array(bits.length);
      if (dtype === 'F16') f16BitsToF32(bits, values);
      else bf16BitsToF32(bits, values);
      return values;
    }
    default:
      throw new GatewayError('UNSUPPORTED', `safetensors: ${dtype} is not a floating-point type`);
  }
}

/** Deterministic: names sorted, the header padded with spaces so that data starts at a multiple of 8, no holes.
 *  Tensors of wider types come first, so that each is aligned to its own type. */
export function writeSafetensors(
  tensors: ReadonlyMap<string, SafetensorsTensor>,
  metadata: ReadonlyMap<string, string> = new Map(),
): Uint8Array {
  const names = [...tensors.keys()].sort((a, b) => {
    const width = dtypeBytes[tensors.get(b)!.dtype] - dtypeBytes[tensors.get(a)!.dtype];
    return width !== 0 ? width : a < b ? -1 : 1;
  });
  const header: Record<string, unknown> = {};
  if (metadata.size > 0) header.__metadata__ = Object.fromEntries([...metadata].sort());
  let offset = 0;
  for (const name of names) {
    const { dtype, shape, data } = tensors.get(name)!;
    const bytes = shape.reduce((product, size) => product * size, dtypeBytes[dtype]);
    if (bytes !== data.byteLength) {
      throw new GatewayError(
        'SHAPE_MISMATCH',
        `safetensors: ${name} has ${data.byteLength} bytes, want ${bytes}`,
      );
    }
    header[name] = { dtype, shape, data_offsets: [offset, offset + bytes] };
    offset += bytes;
  }
  const text = Buffer.from(JSON.stringify(header));
  const headerBytes = Math.ceil(text.length / 8) * 8;
  const file = new Uint8Array(8 + headerBytes + offset);
  new DataView(file.buffer).setBigUint64(0, BigInt(headerBytes), true);
  file.fill(0x20, 8, 8 + headerBytes);
  file.set(text, 8);
  let at = 8 + headerBytes;
  for (const name of names) {
    const { data } = tensors.get(name)!;
    file.set(data, at);
    at += data.byteLength;
  }
  return file;
}
