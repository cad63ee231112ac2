// The thread of one import or export: it reads a tenant's files, computes for seconds and may run out of memory; the
// gateway's event loop does none of that, and outlives it. Started by importer.ts, answers once, ends.

import { parentPort, workerData } from 'node:worker_threads';
import { asGatewayError, type ErrorCode, GatewayError } from '../errors.ts';
import type { DecoderConfig } from '../model/decoder-config.ts';
import { openGguf } from '../model/gguf.ts';
import type { Generation } from './adapter.ts';
import { blobPath, createBlobStore } from './blobs.ts';
import { packNative } from './native-import.ts';
import { type PackedAdapter, readPacked } from './pack.ts';
import { type LevelRule, type Packed, type SqueezeTarget, squeezePacked } from './pack-pairs.ts';
import { packPeft, unpackPeft } from './pack-peft.ts';
import { checkKept, importPacked, packedConfig } from './packed-import.ts';
import { isCovered } from './page-writing.ts';
import type { AdapterBase } from './peft.ts';
import { readPeftDirectory } from './peft-directory.ts';
import { exportQueryable, isQueryable, packQueryable } from './queryable-directory.ts';
import type { ExportedFiles, ImportedAdapter } from './registry.ts';

export type ImportJob =
  | {
      readonly kind: 'import';
      readonly directory: string;
      readonly blobDirectory: string;
      readonly base: AdapterBase;
      readonly acceptBaseName: string | null;
      readonly levels: LevelRule;
      readonly modelPath: string | null;
      /** Stored, and each needed by some svfit adapter. */
      readonly bases: readonly Generation[];
    }
  | {
      readonly kind: 'export';
      readonly blobDirectory: string;
      readonly generation: Generation;
      readonly rank: number;
      readonly base: DecoderConfig;
    }
  | {
      readonly kind: 'squeeze';
      readonly blobDirectory: string;
      readonly generation: Generation;
      readonly target: SqueezeTarget;
    };

export type ImportAnswer =
  | {
      readonly kind: 'imported';
      readonly adapter: ImportedAdapter;
      /** What it needs, when that is new: to be registered first. */
      readonly shared: Omit<ImportedAdapter, 'warnings'> | null;
    }
  | { readonly kind: 'exported'; readonly files: ExportedFiles }
  | {
      readonly kind: 'failed';
      readonly code: ErrorCode;
      readonly message: string;
      readonly param: string | undefined;
      /** Of an error that is not ours: for the log. */
      readonly stack: string | undefined;
    };

async function answer(job: ImportJob): Promise<ImportAnswer> {
  const { blobDirectory } = job;
  if (job.kind === 'import') return importDirectory(job);
  const read = readerOf(blobDirectory);
  const packed = await read(job.generation);
  if (job.kind === 'squeeze') {
    const squeezed = squeezePacked(packed, job.target);
    const adapter = { ...(await store(squeezed, blobDirectory)), warnings: [] };
    return { kind: 'imported', adapter, shared: null };
  }
  const { kind, options, rankMax } = packed.manifest;
  if (kind !== 'queryable') {
    return { kind: 'exported', files: unpackPeft(packed, job.rank, job.base) };
  }
  if (job.rank !== rankMax) {
    const message = `rank is ${job.rank}; a queryable adapter mixes all of its ${rankMax}`;
    throw new GatewayError('INVALID_REQUEST', message, { param: 'rank' });
  }
  return { kind: 'exported', files: exportQueryable(packed, await read(options.needs!)) };
}

function readerOf(directory: string): (generation: Generation) => Promise<PackedAdapter> {
  return (generation) => readPacked(blobPath(directory, generation), generation);
}

type DirectoryJob = ImportJob & { readonly kind: 'import' };

async function importDirectory(job: DirectoryJob): Promise<ImportAnswer> {
  const { base, acceptBaseName, levels, blobDirectory } = job;
  const { format, ...input } = await readPeftDirectory(job.directory);
  if (format === 'peft') {
    const { warnings, ...packed } = packPeft({ ...input, base, acceptBaseName }, levels);
    const adapter = { ...(await store(packed, blobDirectory)), warnings };
    return { kind: 'imported', adapter, shared: null };
  }
  if (input.config.trim() === packedConfig.trim()) {
    const packed = importPacked(input.config, input.weights, base);
    checkKept(packed, input.kept);
    const adapter = { ...(await store(packed, blobDirectory, input.kept)), warnings: [] };
    return { kind: 'imported', adapter, shared: null };
  }
  return importNative(job, input);
}

async function importNative(
  { base, levels, blobDirectory, modelPath, bases }: DirectoryJob,
  input: { readonly config: string; readonly weights: Uint8Array },
): Promise<ImportAnswer> {
  if (modelPath === null) {
    throw new GatewayError('UNSUPPORTED', 'rankgate.json: the base file is not at hand');
  }
  using baseFile = openGguf(modelPath);
  let shared: Omit<ImportedAdapter, 'warnings'> | null = null;
  const read = readerOf(blobDirectory);
  const storeShared = async (made: Packed): Promise<Generation> => {
    shared = await store(made, blobDirectory);
    return shared.generation;
  };
  const native = { ...input, base, baseFile, storeShared };
  const packed = isQueryable(input.config)
    ? await packQueryable({
        ...native,
        async readBank(generation) {
          const bank = await read(generation).catch(noneWhenAbsent);
          const isOurs = bank?.manifest.kind === 'bank' && bank.manifest.baseHash === base.hash;
          return isOurs ? bank : null;
        },
      })
    : await packNative({
        ...{ ...native, levels },
        async findBasis(modules) {
          for (const generation of bases) {
            const { manifest } = await read(generation);
            if (manifest.baseHash === base.hash && isCovered(modules, manifest)) return generation;
          }
          return null;
        },
      });
  const adapter = { ...(await store(packed, blobDirectory)), warnings: [] };
  return { kind: 'imported', adapter, shared };
}

function noneWhenAbsent(error: unknown): null {
  if (error instanceof GatewayError && error.code === 'ADAPTER_NOT_FOUND') return null;
  throw error;
}

async function store(
  { manifest, bytes }: Packed,
  blobDirectory: string,
  kept: Uint8Array | null = null,
): Promise<Omit<ImportedAdapter, 'warnings'>> {
  const generation = await createBlobStore(blobDirectory).put(bytes, kept);
  return { manifest, generation, bytes: bytes.length };
}

function failed(error: unknown): ImportAnswer {
  const { code, message, param, cause } = asGatewayError(error);
  const stack = cause instanceof Error ? cause.stack : undefined;
  return { kind: 'failed', code, message, param, stack };
}

const result = await answer(workerData as ImportJob).catch(failed);
parentPort?.postMessage(result);
