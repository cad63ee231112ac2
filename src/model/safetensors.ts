// Reads and writes safetensors: u64 header length (little endian), JSON header, data. The file may be hostile: the
// length is bounded before it becomes a number or an allocation, and the tensors must tile the data exactly: no overlap,
// no hole, nothing behind them. Then no byte has two meanings and none is hidden.

import { type ErrorCode, GatewayError } from '../errors.ts';
import { bf16BitsToF32, f16BitsToF32 } from '../kernels/half.ts';
import { quoted } from './quoted.ts';
import { badName, type HeaderEntry, parseHeader } from './safetensors-header.ts';

const dtypeBytes = {
  F64: 8,
  I64: 8,
  U64: 8,
  F32: 4,
  I32: 4,
  U32: 4,
  F16: 2,
  BF16: 2,
  I16: 2,
  U16: 2,
  I8: 1,
  U8: 1,
  BOOL: 1,
} as const;
export type SafetensorsDtype = keyof typeof dtypeBytes;
/** In the format, not in this build: floats and complex numbers that no adapter needs. */
const refusedDtype = /^(F8_|F6_|F4|C64|C128)/;

export interface SafetensorsLimits {
  readonly headerBytesMax?: number;
  /** What a broken file is thrown as. */
  readonly code?: ErrorCode;
}

const headerBytesMax = 1024 * 1024; // faults.md B15: 36 MB of header blocked the event loop for a second

export interface SafetensorsTensor {
  readonly dtype: SafetensorsDtype;
  readonly shape: readonly number[];
  /** Little endian, outermost axis first; may start at any byte of its buffer. */
  readonly data: Uint8Array;
}

export interface SafetensorsFile {
  readonly metadata: ReadonlyMap<string, string>;
  readonly tensors: ReadonlyMap<string, SafetensorsTensor>;
}

/** Each tensor's `data` is a view of `bytes`. Throws INVALID_ADAPTER (or `limits.code`), or UNSUPPORTED for a dtype of the
 *  format that this build does not read. */
export function readSafetensors(
  bytes: Uint8Array,
  limits: SafetensorsLimits = {},
): SafetensorsFile {
  try {
    return readFile(bytes, limits.headerBytesMax ?? headerBytesMax);
  } catch (error) {
    if (!(error instanceof GatewayError)) throw error;
    const code = error.code === 'INVALID_ADAPTER' ? (limits.code ?? error.code) : error.code;
    throw new GatewayError(code, `safetensors: ${error.message}`, { cause: error });
  }
}

function invalid(message: string): GatewayError {
  return new GatewayError('INVALID_ADAPTER', message);
}

function readFile(bytes: Uint8Array, max: number): SafetensorsFile {
  if (bytes.length < 8) throw invalid(`${bytes.length} bytes are too few for a header`);
  // A bigint: 2^63 as a number would pass for a smaller one.
  const length = new DataView(bytes.buffer, bytes.byteOffset, 8).getBigUint64(0, true);
  if (length > BigInt(max)) {
    if (isPickle(bytes)) throw invalid('this is a pickle or an archive; only safetensors are read');
    throw invalid(`a header of ${length} bytes, at most ${max} are read`);
  }
  const dataStart = 8 + Number(length);
  if (dataStart > bytes.length) {
    throw invalid(`the header ends at ${dataStart}, the file at ${bytes.length}`);
  }
  const data = bytes.subarray(dataStart);
  const { metadata, entries } = parseHeader(bytes.subarray(8, dataStart));
  const tensors = new Map<string, SafetensorsTensor>();
  for (const [name, entry] of entries) {
    const { begin, end, shape } = entry;
    tensors.set(name, { dtype: checkedEntry(name, entry), shape, data: data.subarray(begin, end) });
  }
  checkTiling(entries, data.length);
  return { metadata, tensors };
}

/** torch.save writes a zip of pickles, or a pickle of protocol 2 to 5. Read as a length both are far above any limit, so
 *  this only picks the message that helps. */
function isPickle(start: Uint8Array): boolean {
  if (start[0] === 0x50 && start[1] === 0x4b) return true;
  return start[0] === 0x80 && start[1]! >= 2 && start[1]! <= 5;
}

function checkedEntry(name: string, { dtype, shape, begin, end }: HeaderEntry): SafetensorsDtype {
  if (!Object.hasOwn(dtypeBytes, dtype)) {
    const message = `${quoted(name)} has the dtype ${quoted(dtype)}`;
    if (refusedDtype.test(dtype)) {
      throw new GatewayError('UNSUPPORTED', `${message}, which is not supported`);
    }
    throw invalid(`${message}, which does not exist`);
  }
  const known = dtype as SafetensorsDtype;
  const wanted = tensorBytes(name, known, shape);
  if (end < begin || end - begin !== wanted) {
    const got = `[${begin}, ${end}]`;
    throw invalid(`${quoted(name)}: ${known} ${shapeText(shape)} is ${wanted} bytes, not ${got}`);
  }
  return known;
}

function tensorBytes(name: string, dtype: SafetensorsDtype, shape: readonly number[]): number {
  return shape.reduce((product, size) => {
    const next = product * size;
    if (Number.isSafeInteger(next)) return next;
    throw invalid(`${quoted(name)}: ${shapeText(shape)} is too large`);
  }, dtypeBytes[dtype]);
}

function shapeText(shape: readonly number[]): string {
  return `[${shape.join(', ')}]`;
}

function checkTiling(entries: ReadonlyMap<string, HeaderEntry>, dataBytes: number): void {
  const ordered = [...entries].sort(([, a], [, b]) => a.begin - b.begin || a.end - b.end);
  let at = 0;
  for (const [name, { begin, end }] of ordered) {
    if (begin !== at) {
      const what = begin < at ? 'overlaps the tensor before it' : 'leaves a hole before it';
      throw invalid(`${quoted(name)} ${what}: it begins at ${begin}, want ${at}`);
    }
    at = end;
  }
  if (at !== dataBytes)
    throw invalid(`the tensors take ${at} bytes of ${dataBytes} behind the header`);
}

/** A copy as f32: widened exactly, or rounded from F64. Values may be infinite or NaN: that is the caller's to judge. */
export function toFloat32({ dtype, data }: SafetensorsTensor): Float32Array {
  // A typed view needs an offset that is a multiple of its element. Not slice(): on a Buffer that is no copy.
  const aligned = new Uint8Array(data).buffer;
  switch (dtype) {
    case 'F32':
      return new Float32Array(aligned);
    case 'F64':
      return Float32Array.from(new Float64Array(aligned));
    case 'F16':
    case 'BF16': {
      const values = new Float32Array(data.length / 2);
      const widen = dtype === 'F16' ? f16BitsToF32 : bf16BitsToF32;
      widen(new Uint16Array(aligned), values);
      return values;
    }
    default:
      throw new GatewayError('UNSUPPORTED', `a tensor of ${dtype} is not one of floats`);
  }
}

/** The same input gives the same bytes, in whatever order it comes: larger dtypes first, then by name, so that every
 *  tensor is aligned without a hole. The data starts at a multiple of 8. */
export function writeSafetensors(
  tensors: ReadonlyMap<string, SafetensorsTensor>,
  metadata: ReadonlyMap<string, string> = new Map(),
): Uint8Array {
  const ordered = [...tensors].sort(
    ([nameA, a], [nameB, b]) => dtypeBytes[b.dtype] - dtypeBytes[a.dtype] || order(nameA, nameB),
  );
  const fields: string[] = [];
  if (metadata.size > 0) {
    const texts = [...metadata].sort(([a], [b]) => order(a, b));
    fields.push(`"__metadata__":{${texts.map((text) => text.map(jsonText).join(':')).join(',')}}`);
  }
  let at = 0;
  for (const [name, { dtype, shape, data }] of ordered) {
    const bad = name === '__metadata__' ? 'a tensor is named __metadata__' : badName(name);
    if (bad !== null) throw invalid(bad);
    if (tensorBytes(name, dtype, shape) !== data.length) {
      const got = `${data.length} bytes for ${dtype} ${shapeText(shape)}`;
      throw new GatewayError('SHAPE_MISMATCH', `${quoted(name)} has ${got}`);
    }
    const offsets = [at, at + data.length];
    fields.push(`${jsonText(name)}:${JSON.stringify({ dtype, shape, data_offsets: offsets })}`);
    at += data.length;
  }
  const json = new TextEncoder().encode(`{${fields.join(',')}}`);
  const headerBytes = Math.ceil(json.length / 8) * 8;
  const file = new Uint8Array(8 + headerBytes + at).fill(0x20, 8, 8 + headerBytes);
  new DataView(file.buffer).setBigUint64(0, BigInt(headerBytes), true);
  file.set(json, 8);
  let to = 8 + headerBytes;
  for (const [, { data }] of ordered) {
    file.set(data, to);
    to += data.length;
  }
  return file;
}

/** By code units: a locale would make the bytes depend on the machine. */
function order(a: string, b: string): number {
  return a < b ? -1 : Number(a > b);
}

function jsonText(text: string): string {
  if (/\p{Surrogate}/u.test(text)) throw invalid('a name or text is not well-formed Unicode');
  return JSON.stringify(text);
}
