// The packed file of adapter.ts, written and read. Reading trusts nothing: the bytes must have the generation's hash, and
// header and manifest must agree on every tensor, before a page is handed out (faults.md S15). The file is read into
// memory, never mapped: what happens to it afterwards cannot reach the engine.

import { createHash } from 'node:crypto';
import { closeSync, constants, fstatSync, openSync, readSync } from 'node:fs';
import { GatewayError } from '../errors.ts';
import { f32ToF16Bits } from '../kernels/half.ts';
import { readSafetensors, type SafetensorsTensor, writeSafetensors } from '../model/safetensors.ts';
import type { ModuleRef, PageData } from '../model/stepper.ts';
import { type AdaptedModule, type AdapterManifest, type Generation, pageRanks } from './adapter.ts';
import { formatManifest, parseManifest } from './manifest.ts';
import type { ServedModule } from './served.ts';

/** A verified packed file in memory. Its pages are views of the file's bytes: read them, never write. */
export interface PackedAdapter {
  readonly generation: Generation;
  readonly manifest: AdapterManifest;
  /** Pages that the widest module has: ceil(rankMax / 8). */
  readonly pages: number;
  /** `a` [8, in], `b` [8, out]; null when the adapter leaves this module alone, or has no ranks left in this page. */
  page(module: ModuleRef, index: number): PageData | null;
}

/** Largest packed file. Rank 256 on all projections of SmolLM2-135M is 156 MB. */
const packedBytesMax: number = 1024 ** 3;
const headerBytesMax = 16 * 1024 * 1024;

export function generationOf(bytes: Uint8Array): Generation {
  return `sha256:${createHash('sha256').update(bytes).digest('hex')}`;
}

/** Collects modules one by one, so that their f64 factors need not all be in memory at once. */
export interface Packer {
  /** Throws INVALID_ADAPTER when a value is beyond the range of f16. */
  add(module: ServedModule): void;
  finish(manifest: Omit<AdapterManifest, 'modules'>): {
    manifest: AdapterManifest;
    bytes: Uint8Array;
  };
}

export function createPacker(): Packer {
  const modules: AdaptedModule[] = [];
  const tensors = new Map<string, SafetensorsTensor>();
  return {
    add(served) {
      const { block, projection, rank, in: width, out } = served;
      modules.push({ block, projection, rank, in: width, out });
      for (const [name, tensor] of pagesOf(served)) tensors.set(name, tensor);
    },
    finish(rest) {
      const manifest = { ...rest, modules };
      const metadata = new Map([['manifest', formatManifest(manifest)]]);
      return { manifest, bytes: writeSafetensors(tensors, metadata) };
    },
  };
}

function tensorName({ block, projection }: ModuleRef, side: 'a' | 'b'): string {
  return `blk.${block}.${projection}.${side}`;
}

function pagesOf(module: ServedModule): [string, SafetensorsTensor][] {
  const { rank, in: width, out, a, b } = module;
  if (a === null || b === null) throw new GatewayError('INTERNAL', 'a module without A or B');
  const pages = Math.ceil(rank / pageRanks);
  const pagesA = new Float32Array(pages * pageRanks * width); // [pages, 8, in]
  const pagesB = new Float32Array(pages * pageRanks * out); // [pages, 8, out]
  for (let i = 0; i < a.length; i++) pagesA[i] = roundToOdd(a[i]!);
  for (let i = 0; i < b.length; i++) pagesB[i] = roundToOdd(b[i]!);
  return [
    [
      tensorName(module, 'a'),
      f16Tensor(pagesA, [pages, pageRanks, width], tensorName(module, 'a')),
    ],
    [tensorName(module, 'b'), f16Tensor(pagesB, [pages, pageRanks, out], tensorName(module, 'b'))],
  ];
}

const word = new DataView(new ArrayBuffer(4));

/** f64 → f32 such that rounding to f16 afterwards rounds once, not twice: an inexact value gets an odd last bit, so it
 *  never looks like a tie (Boldo and Melquiond, "Emulation of a FMA and correctly rounded sums", 2008). */
export function roundToOdd(value: number): number {
  const rounded = Math.fround(value);
  if (rounded === value) return rounded;
  word.setFloat32(0, rounded);
  const bits = word.getUint32(0);
  // Toward zero first: for either sign that is one step down in the bits.
  word.setUint32(0, (Math.abs(rounded) > Math.abs(value) ? bits - 1 : bits) | 1);
  return word.getFloat32(0);
}

const f16Max = 65_504;

function f16Tensor(
  values: Float32Array,
  shape: readonly number[],
  name: string,
): SafetensorsTensor {
  // 65,520 is half way to the next step: from there on the nearest f16 is infinity.
  const bad = values.find((value) => !(Math.abs(value) < 65_520));
  if (bad !== undefined) {
    throw new GatewayError('INVALID_ADAPTER', `${name} has ${bad}, beyond ±${f16Max} of f16`);
  }
  const bits = new Uint16Array(values.length);
  f32ToF16Bits(values, bits);
  return { dtype: 'F16', shape, data: new Uint8Array(bits.buffer) };
}

/** What a packed file says, as data that can go to another thread: the pages are views of the file's bytes. */
export interface PackedContents {
  readonly manifest: AdapterManifest;
  /** By the name of the `a` tensor. */
  readonly modules: ReadonlyMap<string, PagedModule>;
}

/** Reads a blob whole and checks it. Throws ADAPTER_NOT_FOUND or ADAPTER_CORRUPT. */
export async function readPacked(path: string, generation: Generation): Promise<PackedAdapter> {
  return packedAdapter(generation, readContents(path, generation));
}

/** The same at once, for a thread that has nothing else to do (pack-worker.ts). */
export function readContents(path: string, generation: Generation): PackedContents {
  const { bytes, hash } = readBlob(path, generation);
  if (generation !== `sha256:${hash}`) throw corrupt(generation, 'its bytes have another hash');
  return parseContents(bytes, generation);
}

function corrupt(generation: Generation, what: string, cause?: unknown): GatewayError {
  return new GatewayError('ADAPTER_CORRUPT', `adapter ${generation}: ${what}`, { cause });
}

/** Bytes that are hashed while the processor's caches still hold them from the reading. */
const chunkBytes = 256 * 1024;

function readBlob(path: string, generation: Generation): { bytes: Uint8Array; hash: string } {
  let file: number | null = null;
  try {
    // O_NONBLOCK: opening a pipe that took the blob's place must not wait for a writer.
    file = openSync(path, constants.O_RDONLY | constants.O_NOFOLLOW | constants.O_NONBLOCK);
    const stat = fstatSync(file);
    if (!stat.isFile()) throw corrupt(generation, 'it is not a regular file');
    if (stat.size > packedBytesMax) throw corrupt(generation, `it has ${stat.size} bytes`);
    const bytes = new Uint8Array(stat.size);
    const hash = createHash('sha256');
    for (let done = 0; done < bytes.length; ) {
      const count = readSync(file, bytes, done, Math.min(chunkBytes, bytes.length - done), done);
      if (count === 0) throw corrupt(generation, 'it was cut while it was read');
      hash.update(bytes.subarray(done, done + count));
      done += count;
    }
    return { bytes, hash: hash.digest('hex') };
  } catch (error) {
    if (error instanceof GatewayError) throw error;
    const code = (error as NodeJS.ErrnoException).code ?? 'unknown error';
    if (code === 'ENOENT') {
      throw new GatewayError('ADAPTER_NOT_FOUND', `adapter ${generation} is not stored`);
    }
    throw corrupt(generation, `it cannot be read (${code})`, error);
  } finally {
    if (file !== null) closeSync(file);
  }
}

/** Pages of a packed file whose hash is known to be right. Borrows `bytes`. Throws ADAPTER_CORRUPT. */
export function openPacked(bytes: Uint8Array, generation: Generation): PackedAdapter {
  return packedAdapter(generation, parseContents(bytes, generation));
}

function parseContents(bytes: Uint8Array, generation: Generation): PackedContents {
  const { metadata, tensors } = readSafetensors(bytes, { headerBytesMax, code: 'ADAPTER_CORRUPT' });
  let manifest: AdapterManifest;
  try {
    manifest = parseManifest(metadata.get('manifest') ?? '');
  } catch (error) {
    throw corrupt(generation, 'its manifest is not valid', error);
  }
  if (tensors.size !== 2 * manifest.modules.length) {
    throw corrupt(generation, `${tensors.size} tensors for ${manifest.modules.length} modules`);
  }
  const modules = new Map<string, PagedModule>();
  for (const module of manifest.modules) {
    const pages = Math.ceil(module.rank / pageRanks);
    const view = (side: 'a' | 'b', shape: readonly number[]): Uint16Array => {
      const name = tensorName(module, side);
      const found = halfWords(tensors.get(name), shape);
      if (found === null) throw corrupt(generation, `${name} does not fit its manifest`);
      return found;
    };
    modules.set(tensorName(module, 'a'), {
      pages,
      a: view('a', [pages, pageRanks, module.in]),
      b: view('b', [pages, pageRanks, module.out]),
    });
  }
  return { manifest, modules };
}

export function packedAdapter(
  generation: Generation,
  { manifest, modules }: PackedContents,
): PackedAdapter {
  return {
    generation,
    manifest,
    pages: Math.ceil(manifest.rankMax / pageRanks),
    page(module, index) {
      const paged = modules.get(tensorName(module, 'a'));
      return paged === undefined || index >= paged.pages ? null : pageOf(paged, index);
    },
  };
}

export interface PagedModule {
  readonly pages: number;
  readonly a: Uint16Array; // [pages, 8, in]
  readonly b: Uint16Array; // [pages, 8, out]
}

function pageOf({ pages, a, b }: PagedModule, index: number): PageData {
  const slice = (all: Uint16Array): Uint16Array =>
    all.subarray((index * all.length) / pages, ((index + 1) * all.length) / pages);
  return { a: slice(a), b: slice(b) };
}

function halfWords(
  tensor: SafetensorsTensor | undefined,
  shape: readonly number[],
): Uint16Array | null {
  if (tensor?.dtype !== 'F16' || tensor.shape.join() !== shape.join()) return null;
  if (tensor.data.byteOffset % 2 !== 0) return null;
  return new Uint16Array(tensor.data.buffer, tensor.data.byteOffset, tensor.data.length / 2);
}
