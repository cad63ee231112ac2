// The thread of one import or export: it reads a tenant's files, computes for seconds and may run out of memory; the
// gateway's event loop does none of that, and outlives it. Started by importer.ts, answers once, ends.

import { parentPort, workerData } from 'node:worker_threads';
import { asGatewayError, type ErrorCode } from '../errors.ts';
import type { DecoderConfig } from '../model/decoder-config.ts';
import type { Generation } from './adapter.ts';
import { blobPath, createBlobStore } from './blobs.ts';
import { readPacked } from './pack.ts';
import { type LevelRule, type SqueezeTarget, squeezePacked } from './pack-pairs.ts';
import { type PackedPeft, packPeft, unpackPeft } from './pack-peft.ts';
import { importPacked } from './packed-import.ts';
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
  | { readonly kind: 'imported'; readonly adapter: ImportedAdapter }
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
  if (job.kind === 'import') return store(await packDirectory(job), blobDirectory);
  const packed = await readPacked(blobPath(blobDirectory, job.generation), job.generation);
  if (job.kind === 'squeeze') {
    return store({ ...squeezePacked(packed, job.target), warnings: [] }, blobDirectory);
  }
  return { kind: 'exported', files: unpackPeft(packed, job.rank, job.base) };
}

async function packDirectory(job: ImportJob & { readonly kind: 'import' }): Promise<PackedPeft> {
  const { base, acceptBaseName, levels } = job;
  const { format, ...input } = await readPeftDirectory(job.directory);
  if (format === 'peft') return packPeft({ ...input, base, acceptBaseName }, levels);
  return { ...importPacked(input.config, input.weights, base), warnings: [] };
}

async function store(
  { manifest, bytes, warnings }: PackedPeft,
  blobDirectory: string,
): Promise<ImportAnswer> {
  const generation = await createBlobStore(blobDirectory).put(bytes);
  const adapter = { manifest, generation, bytes: bytes.length, warnings };
  return { kind: 'imported', adapter };
}

function failed(error: unknown): ImportAnswer {
  const { code, message, param, cause } = asGatewayError(error);
  const stack = cause instanceof Error ? cause.stack : undefined;
  return { kind: 'failed', code, message, param, stack };
}

const result = await answer(workerData as ImportJob).catch(failed);
parentPort?.postMessage(result);
