// The thread of one import or export: it reads a tenant's files, computes for seconds and may run out of memory; the
// gateway's event loop does none of that, and outlives it. Started by importer.ts, answers once, ends.

import { parentPort, workerData } from 'node:worker_threads';
import { asGatewayError, type ErrorCode, GatewayError } from '../errors.ts';
import type { DecoderConfig } from '../model/decoder-config.ts';
import { openGguf } from '../model/gguf.ts';
import type { Generation } from './adapter.ts';
import { blobPath, createBlobStore } from './blobs.ts';
import { packNative } from './native-import.ts';
import { readPacked } from './pack.ts';
import { type LevelRule, type Packed, type SqueezeTarget, squeezePacked } from './pack-pairs.ts';
import { type PackedPeft, packPeft, unpackPeft } from './pack-peft.ts';
import { importPacked, packedConfig } from './packed-import.ts';
import { isCovered } from './page-writing.ts';
import type { AdapterBase } from './peft.ts';
import { readPeftDirectory } from './peft-directory.ts';
import type { ImportedAdapter, PeftFiles } from './registry.ts';

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
      readonly basis: Omit<ImportedAdapter, 'warnings'> | null;
    }
  | { readonly kind: 'exported'; readonly files: PeftFiles }
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
  const packed = await readPacked(blobPath(blobDirectory, job.generation), job.generation);
  if (job.kind === 'squeeze') {
    const squeezed = squeezePacked(packed, job.target);
    const adapter = { ...(await store(squeezed, blobDirectory)), warnings: [] };
    return { kind: 'imported', adapter, basis: null };
  }
  return { kind: 'exported', files: unpackPeft(packed, job.rank, job.base) };
}

type DirectoryJob = ImportJob & { readonly kind: 'import' };

async function importDirectory(job: DirectoryJob): Promise<ImportAnswer> {
  const { base, acceptBaseName, levels, blobDirectory } = job;
  const { format, ...input } = await readPeftDirectory(job.directory);
  const put = async ({ warnings, ...packed }: PackedPeft): Promise<ImportedAdapter> => ({
    ...(await store(packed, blobDirectory)),
    warnings,
  });
  if (format === 'peft') {
    const adapter = await put(packPeft({ ...input, base, acceptBaseName }, levels));
    return { kind: 'imported', adapter, basis: null };
  }
  if (input.config.trim() === packedConfig.trim()) {
    const packed = importPacked(input.config, input.weights, base);
    return { kind: 'imported', adapter: await put({ ...packed, warnings: [] }), basis: null };
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
  let basis: Omit<ImportedAdapter, 'warnings'> | null = null;
  const native = { ...input, base, baseFile, levels };
  const packed = await packNative({
    ...native,
    async findBasis(modules) {
      for (const generation of bases) {
        const { manifest } = await readPacked(blobPath(blobDirectory, generation), generation);
        if (manifest.baseHash === base.hash && isCovered(modules, manifest)) return generation;
      }
      return null;
    },
    async storeBasis(made) {
      basis = await store(made, blobDirectory);
      return basis.generation;
    },
  });
  const adapter = { ...(await store(packed, blobDirectory)), warnings: [] };
  return { kind: 'imported', adapter, basis };
}

async function store(
  { manifest, bytes }: Packed,
  blobDirectory: string,
): Promise<Omit<ImportedAdapter, 'warnings'>> {
  const generation = await createBlobStore(blobDirectory).put(bytes);
  return { manifest, generation, bytes: bytes.length };
}

function failed(error: unknown): ImportAnswer {
  const { code, message, param, cause } = asGatewayError(error);
  const stack = cause instanceof Error ? cause.stack : undefined;
  return { kind: 'failed', code, message, param, stack };
}

const result = await answer(workerData as ImportJob).catch(failed);
parentPort?.postMessage(result);
