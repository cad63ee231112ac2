// The packed file of adapter.ts, written and read. Reading trusts nothing: the bytes must have the generation's hash, and
// header and manifest must agree on every tensor, and every number be finite, before a page is handed out (faults.md S15).

import { createHash } from 'node:crypto';
import { GatewayError } from '../errors.ts';
import { f16Values } from '../kernels/half.ts';
import { moduleIndex } from '../model/decoder-config.ts';
import { readSafetensors, type SafetensorsTensor, writeSafetensors } from '../model/safetensors.ts';
import type { ModuleRef, PageData } from '../model/stepper.ts';
import {
  type AdaptedModule,
  type AdapterManifest,
  type Generation,
  type PackedKind,
  pageRanks,
} from './adapter.ts';
import type { BlendKey } from './blend-key.ts';
import { sparseA } from './families/fly.ts';
import { formatManifest, parseManifest } from './manifest.ts';
import { type CheckedFiles, corrupt, readBlob } from './pack-file.ts';
import {
  floatTensor,
  halfTensor,
  halvesOf,
  isServable,
  readFloats,
  viewHalves,
} from './pack-numbers.ts';
import type { ServedModule } from './served.ts';

/** What is stored per module's rank or once per adapter, besides A and B (adapter.ts). */
export type FloatName =
  | 'gates'
  | 'bias'
  | 'keys'
  | 'labels'
  | 'atoms'
  | 'query'
  | 'summary'
  | 'context';

export interface Floats {
  readonly shape: readonly number[];
  readonly values: Float32Array;
}

/** A verified packed file in memory. Its pages are views of the file's bytes: read them, never write. */
export interface PackedAdapter<Key extends Generation | BlendKey = Generation> {
  readonly generation: Key;
  readonly manifest: AdapterManifest;
  /** Pages that the widest module has: ceil(rankMax / 8). 0 when it has none of its own (svfit, a bank). */
  readonly pages: number;
  /** mora's `bias`, 1/‖a_i‖, is made when the file is read. */
  readonly floats: ReadonlyMap<FloatName, Floats>;
  /** Of memory, all together. */
  readonly bytes: number;
  /** `a` [8, in], `b` [8, out]; null when the adapter leaves this module alone, or has no ranks left in this page. */
  page(module: ModuleRef, index: number): PageData | null;
}

/** What a few bytes of a fly file may grow to. */
const seededBytesMax: number = 1024 ** 3;
const headerBytesMax = 16 * 1024 * 1024;

export function generationOf(bytes: Uint8Array): Generation {
  return `sha256:${createHash('sha256').update(bytes).digest('hex')}`;
}

/** Collects modules one by one, so that their f64 factors need not all be in memory at once. */
export interface Packer {
  /** Throws INVALID_ADAPTER when a value is beyond the range of f16. */
  add(module: ServedModule): void;
  /** `floats`: what the adapter has once. Throws INVALID_ADAPTER when manifest and numbers do not fit the kind. */
  finish(
    manifest: Omit<AdapterManifest, 'modules'>,
    floats?: ReadonlyMap<FloatName, Floats>,
  ): { manifest: AdapterManifest; bytes: Uint8Array };
}

export function createPacker(): Packer {
  const modules: AdaptedModule[] = [];
  const tensors = new Map<string, SafetensorsTensor>();
  const gates: number[] = [];
  const bias: number[] = [];
  return {
    add(served) {
      const { block, projection, rank, in: width, out } = served;
      modules.push({ block, projection, rank, in: width, out });
      gates.push(...(served.gates ?? []));
      bias.push(...(served.bias ?? []));
      const size = Math.ceil(rank / pageRanks) * pageRanks;
      for (const side of ['a', 'b'] as const) {
        const values = served[side];
        if (values === null) continue;
        const name = tensorName(served, side);
        const shape = pagedShape(rank, side === 'a' ? width : out);
        tensors.set(name, halfTensor(halvesOf(values, size * shape[2]!, name), shape));
      }
    },
    finish(rest, floats = new Map()) {
      const manifest = { ...rest, modules };
      for (const [name, { shape, values }] of floats) tensors.set(name, floatTensor(values, shape));
      for (const [name, values] of [['gates', gates] as const, ['bias', bias] as const]) {
        const all = Float32Array.from(values);
        if (all.length > 0) tensors.set(name, floatTensor(all, [all.length]));
      }
      const bytes = writeSafetensors(tensors, new Map([['manifest', formatManifest(manifest)]]));
      // Whoever reads it would refuse it: better now.
      checkContents(bytes, invalidAdapter, 'unknown');
      return { manifest, bytes };
    },
  };
}

function tensorName({ block, projection }: ModuleRef, side: 'a' | 'b'): string {
  return `blk.${block}.${projection}.${side}`;
}

function pagedShape(rank: number, width: number): readonly number[] {
  return [Math.ceil(rank / pageRanks), pageRanks, width];
}

/** What a packed file says, as data that can go to another thread: the pages are views of a few buffers. */
export interface PackedContents {
  readonly manifest: AdapterManifest;
  /** By the name of the `a` tensor. */
  readonly modules: ReadonlyMap<string, PagedModule>;
  readonly floats: ReadonlyMap<FloatName, Floats>;
}

/** Reads a blob whole and checks it. Throws ADAPTER_NOT_FOUND or ADAPTER_CORRUPT. */
export async function readPacked(path: string, generation: Generation): Promise<PackedAdapter> {
  return packedAdapter(generation, readContents(path, generation));
}

/** The same at once, for a thread that has nothing else to do (pack-worker.ts). */
export function readContents(
  path: string,
  generation: Generation,
  files: CheckedFiles | null = null,
): PackedContents {
  const blob = readBlob(path, generation, files);
  const refuse: Refuse = (what, cause) => corrupt(generation, what, cause);
  const contents = parseContents(blob.bytes, refuse, blob.isChecked ? 'checked' : 'unknown');
  blob.checked();
  return contents;
}

/** Pages of a packed file whose hash is known to be right. Borrows `bytes`. Throws ADAPTER_CORRUPT. */
export function openPacked(bytes: Uint8Array, generation: Generation): PackedAdapter {
  const fail: Refuse = (what, cause) => corrupt(generation, what, cause);
  return packedAdapter(generation, parseContents(bytes, fail, 'unknown'));
}

interface CheckedContents extends PackedContents {
  readonly floats: Map<FloatName, Floats>;
}

type Refuse = (what: string, cause?: unknown) => GatewayError;

function invalidAdapter(what: string, cause?: unknown): GatewayError {
  const detail = cause instanceof Error ? `: ${cause.message}` : '';
  return new GatewayError('INVALID_ADAPTER', `the adapter cannot be packed: ${what}${detail}`, {
    cause,
  });
}

/** Numbers that were checked before are not looked at again. */
type Numbers = 'unknown' | 'checked';

function parseContents(bytes: Uint8Array, refuse: Refuse, numbers: Numbers): PackedContents {
  const checked = checkContents(bytes, refuse, numbers);
  const { manifest, modules, floats } = checked;
  if (manifest.kind === 'mora') floats.set('bias', normsOf(manifest, modules));
  if (manifest.kind !== 'fly') return checked;
  const made = manifest.modules.map((module) => {
    const name = tensorName(module, 'a');
    return [name, { ...modules.get(name)!, a: seededHalves(manifest, module) }] as const;
  });
  return { manifest, modules: new Map(made), floats };
}

/** What the file itself says: fly's A is empty. */
function checkContents(bytes: Uint8Array, refuse: Refuse, numbers: Numbers): CheckedContents {
  const { metadata, tensors } = readSafetensors(bytes, { headerBytesMax, code: 'ADAPTER_CORRUPT' });
  let manifest: AdapterManifest;
  try {
    manifest = parseManifest(metadata.get('manifest') ?? '');
  } catch (error) {
    throw refuse('its manifest is not valid', error);
  }
  const { sides, once } = storedOf(manifest.kind);
  const count = sides.length * manifest.modules.length + once.length;
  if (tensors.size !== count) throw refuse(`${tensors.size} tensors, want ${count}`);
  const floats = readOnce(manifest, tensors, refuse);
  if (sides.length === 0) return { manifest, modules: new Map(), floats };
  const seededBytes = manifest.modules.reduce((sum, m) => sum + 2 * m.rank * m.in, 0);
  if (!sides.includes('a') && seededBytes > seededBytesMax) {
    throw refuse(`its A would take ${seededBytes} bytes`);
  }
  const modules = new Map<string, PagedModule>();
  for (const module of manifest.modules) {
    const view = (side: 'a' | 'b', width: number): Uint16Array => {
      if (!sides.includes(side)) return new Uint16Array(0);
      const name = tensorName(module, side);
      const found = viewHalves(tensors.get(name), pagedShape(module.rank, width));
      // Ranks beyond the module's own would be served with the ranks of others.
      const fits =
        numbers === 'checked' || (found !== null && isServable(found, module.rank * width));
      if (found === null || !fits) throw refuse(`${name} does not fit its manifest`);
      return found;
    };
    const pages = Math.ceil(module.rank / pageRanks);
    const paged = { pages, a: view('a', module.in), b: view('b', module.out) };
    modules.set(tensorName(module, 'a'), paged);
  }
  return { manifest, modules, floats };
}

/** Which tensors a kind has: of every module, and once. */
function storedOf(kind: PackedKind): {
  readonly sides: readonly ('a' | 'b')[];
  readonly once: readonly FloatName[];
} {
  switch (kind) {
    case 'fly':
      return { sides: ['b'], once: ['bias'] };
    case 'svfit':
      return { sides: [], once: ['gates'] };
    case 'queryable':
      return { sides: ['a', 'b'], once: ['keys', 'labels'] };
    case 'bank':
      return { sides: [], once: ['atoms', 'query', 'summary', 'context'] };
    default:
      return { sides: ['a', 'b'], once: [] };
  }
}

/** fly's A, made again. */
function seededHalves({ options }: AdapterManifest, module: AdaptedModule): Uint16Array {
  const { block, projection, rank, in: width } = module;
  const shape = { module: moduleIndex(block, projection), rank, in: width };
  const seed = BigInt(`0x${options.seed}`);
  const a = sparseA({ ...shape, seed, topK: options.topK ?? rank });
  return halvesOf(a, Math.ceil(rank / pageRanks) * pageRanks * width, tensorName(module, 'a'));
}

/** mora scores a rank by |a_i·x| / ‖a_i‖: the norms are of A as it is stored. */
function normsOf({ modules }: AdapterManifest, paged: ReadonlyMap<string, PagedModule>): Floats {
  const bias = modules.flatMap((module) => {
    const { a } = paged.get(tensorName(module, 'a'))!;
    return Array.from({ length: module.rank }, (_, r) => {
      const row = a.subarray(r * module.in, (r + 1) * module.in);
      const norm = Math.sqrt(row.reduce((sum, bits) => sum + f16Values[bits]! ** 2, 0));
      return norm === 0 ? 0 : 1 / norm;
    });
  });
  return { shape: [bias.length], values: Float32Array.from(bias) };
}

/** Sizes that are free (K, dq, the width of a label) are what the first tensor says. */
function readOnce(
  { kind, modules, rankMax: r, options }: AdapterManifest,
  tensors: ReadonlyMap<string, SafetensorsTensor>,
  refuse: Refuse,
): Map<FloatName, Floats> {
  const ranks = modules.reduce((sum, { rank }) => sum + rank, 0);
  const size = (name: FloatName, axis: number): number => tensors.get(name)?.shape[axis] ?? 0;
  const shapes: Record<FloatName, readonly number[]> = {
    gates: [ranks],
    bias: [ranks],
    keys: [options.labels?.length ?? 0, size('keys', 1)],
    labels: [options.labels?.length ?? 0, size('labels', 1)],
    atoms: [size('atoms', 0), r, r],
    query: [size('query', 0), r],
    summary: [r, r],
    context: [size('query', 0), r],
  };
  const floats = new Map<FloatName, Floats>();
  for (const name of storedOf(kind).once) {
    const values = readFloats(tensors.get(name), shapes[name]);
    if (values === null || values.length === 0) throw refuse(`${name} does not fit its manifest`);
    floats.set(name, { shape: shapes[name], values });
  }
  return floats;
}

export function packedAdapter<Key extends Generation | BlendKey>(
  generation: Key,
  contents: PackedContents,
): PackedAdapter<Key> {
  const { manifest, modules, floats } = contents;
  let bytes = 0;
  for (const { values } of floats.values()) bytes += values.byteLength;
  for (const { a, b } of modules.values()) bytes += a.byteLength + b.byteLength;
  return {
    generation,
    manifest,
    floats,
    bytes,
    pages: modules.size === 0 ? 0 : Math.ceil(manifest.rankMax / pageRanks),
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
