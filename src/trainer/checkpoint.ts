// Where a job can go on from: everything that its next step depends on, in one file that is there whole or not at all (temp →
// fsync → rename → fsync of the directory) and named by its own hash. Order and draws are functions of the step, so the step
// is all there is to remember of them.

import { createHash } from 'node:crypto';
import { readdirSync, readFileSync, rmSync } from 'node:fs';
import { basename, join } from 'node:path';
import { GatewayError } from '../errors.ts';
import { writeFileDurably } from '../model/file-hash.ts';
import { readSafetensors, toFloat32, writeSafetensors } from '../model/safetensors.ts';

export interface Checkpoint {
  /** Steps that were taken. */
  readonly step: number;
  /** Whether the last one was left out because its numbers were not finite. */
  readonly skipped: boolean;
  /** Micro-batches of all steps, and how many the next one takes. */
  readonly taken: number;
  readonly accumulation: number;
  /** The rate that was decided for it. */
  readonly learningRate: number;
  /** Of all that the run depends on: a checkpoint of another recipe, base or file is refused. */
  readonly run: string;
  readonly parameters: Float32Array; // all of them, one after another
  readonly optimizer: Uint8Array;
}

const format = 'rankgate-checkpoint/1';
const namePattern = /^step-(\d{7})-([0-9a-f]{64})\.safetensors$/;
/** The last one, and the one before, which the job store may still name. */
const keptMax = 2;

/** Returns its path, in `folder`, where older ones are removed. Throws DISK_FULL. */
export async function writeCheckpoint(folder: string, checkpoint: Checkpoint): Promise<string> {
  const bytes = encode(checkpoint);
  const hash = createHash('sha256').update(bytes).digest('hex');
  const step = checkpoint.step.toString().padStart(7, '0');
  const path = join(folder, `step-${step}-${hash}.safetensors`);
  try {
    await writeFileDurably(path, bytes);
  } catch (cause) {
    throw writeError(cause);
  }
  const names = readdirSync(folder).filter((name) => namePattern.test(name));
  for (const name of names.sort().slice(0, -keptMax)) rmSync(join(folder, name), { force: true });
  return path;
}

export function writeError(cause: unknown): GatewayError {
  const code = (cause as NodeJS.ErrnoException).code ?? 'unknown error';
  if (code === 'ENOSPC' || code === 'EDQUOT') {
    return new GatewayError('DISK_FULL', 'no room left for what was trained', { cause });
  }
  return new GatewayError('INTERNAL', `what was trained cannot be written (${code})`, { cause });
}

/** One after another, as a checkpoint has them. */
export function joinValues(parts: readonly Float32Array[]): Float32Array {
  const joined = new Float32Array(parts.reduce((sum, { length }) => sum + length, 0));
  let at = 0;
  for (const values of parts) {
    joined.set(values, at);
    at += values.length;
  }
  return joined;
}

/** Into the parts that `joinValues` was given. */
export function splitValues(joined: Float32Array, parts: readonly Float32Array[]): void {
  let at = 0;
  for (const values of parts) {
    values.set(joined.subarray(at, at + values.length));
    at += values.length;
  }
}

/** Throws INVALID_REQUEST for a file that is damaged or none. */
export function readCheckpoint(path: string): Checkpoint {
  const named = namePattern.exec(basename(path));
  const bytes = readBytes(path);
  if (named === null || createHash('sha256').update(bytes).digest('hex') !== named[2]) {
    throw refused('its bytes are not those that were written');
  }
  const { metadata, tensors } = readSafetensors(bytes, { code: 'INVALID_REQUEST' });
  const parameters = tensors.get('parameters');
  const optimizer = tensors.get('optimizer');
  if (metadata.get('format') !== format || parameters === undefined || optimizer === undefined) {
    throw refused('it is none of this format');
  }
  return {
    step: Number(named[1]),
    skipped: metadata.get('skipped') === 'true',
    taken: Number(metadata.get('taken')),
    accumulation: Number(metadata.get('accumulation')),
    learningRate: Number(metadata.get('learningRate')),
    run: metadata.get('run') ?? '',
    parameters: toFloat32(parameters),
    optimizer: new Uint8Array(optimizer.data),
  };
}

function readBytes(path: string): Uint8Array {
  try {
    return new Uint8Array(readFileSync(path));
  } catch (cause) {
    const code = (cause as NodeJS.ErrnoException).code ?? 'unknown error';
    throw new GatewayError('INVALID_REQUEST', `the checkpoint cannot be read (${code})`, { cause });
  }
}

export function refused(why: string): GatewayError {
  return new GatewayError('INVALID_REQUEST', `the checkpoint cannot be gone on from: ${why}`);
}

function encode(checkpoint: Checkpoint): Uint8Array {
  const { parameters, optimizer } = checkpoint;
  const { buffer, byteOffset, byteLength } = parameters;
  const numbers = new Uint8Array(buffer, byteOffset, byteLength);
  return writeSafetensors(
    new Map([
      ['parameters', { dtype: 'F32', shape: [parameters.length], data: numbers }],
      ['optimizer', { dtype: 'U8', shape: [optimizer.length], data: optimizer }],
    ]),
    new Map([
      ['format', format],
      ...(['skipped', 'taken', 'accumulation', 'learningRate', 'run'] as const).map(
        (name) => [name, `${checkpoint[name]}`] as const,
      ),
    ]),
  );
}
