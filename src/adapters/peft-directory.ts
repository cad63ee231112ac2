// The two files of an adapter's directory, PEFT's or our own, read with bounds. Links and anything but regular files are refused; whether the
// directory itself may be read is the caller's business.

import { constants } from 'node:fs';
import { access, type FileHandle, lstat, open } from 'node:fs/promises';
import { join } from 'node:path';
import { GatewayError } from '../errors.ts';
import { keptPath } from './blobs.ts';
import { configBytesMax } from './peft-config.ts';

/** Largest adapter_model.safetensors. */
const weightsBytesMax: number = 2 * 1024 ** 3;
const weightsName = 'adapter_model.safetensors';
/** A read of 2 GiB or more at once is refused by Node 20. */
const readBytesMax = 256 * 1024 * 1024;

export interface PeftDirectory {
  /** Whether `config` is adapter_config.json or rankgate.json. */
  readonly format: 'peft' | 'rankgate';
  readonly config: string;
  readonly weights: Uint8Array;
  /** What a trainer left beside a packed file. */
  readonly kept: Uint8Array | null;
}

/** Throws INVALID_ADAPTER. */
export async function readPeftDirectory(directory: string): Promise<PeftDirectory> {
  const stat = await lstat(directory).catch(() => null);
  if (stat?.isDirectory() !== true) {
    throw new GatewayError('INVALID_ADAPTER', 'the adapter is not a directory');
  }
  const isOurs = await has(directory, 'rankgate.json');
  if (isOurs && (await has(directory, 'adapter_config.json'))) {
    const message = 'there is a rankgate.json beside adapter_config.json: one is wanted';
    throw new GatewayError('INVALID_ADAPTER', message);
  }
  const configName = isOurs ? 'rankgate.json' : 'adapter_config.json';
  const config = await readBounded(directory, configName, configBytesMax);
  await refusePickle(directory);
  const weights = await readBounded(directory, weightsName, weightsBytesMax);
  const keptName = keptPath(weightsName);
  const hasKept = isOurs && (await has(directory, keptName));
  const kept = hasKept ? await readBounded(directory, keptName, weightsBytesMax) : null;
  try {
    const text = new TextDecoder('utf-8', { fatal: true }).decode(config);
    return { format: isOurs ? 'rankgate' : 'peft', config: text, weights, kept };
  } catch (cause) {
    throw new GatewayError('INVALID_ADAPTER', `${configName} is not UTF-8`, { cause });
  }
}

/** The file that older PEFT wrote instead; it is a program, and is never opened. */
async function refusePickle(directory: string): Promise<void> {
  if (await has(directory, 'adapter_model.safetensors')) return;
  for (const name of ['adapter_model.bin', 'adapter_model.pt', 'adapter_model.ckpt']) {
    if (await has(directory, name)) {
      throw new GatewayError('INVALID_ADAPTER', `${name} is a pickle: safetensors only`);
    }
  }
}

function has(directory: string, name: string): Promise<boolean> {
  return access(join(directory, name)).then(
    () => true,
    () => false,
  );
}

async function readBounded(
  directory: string,
  name: string,
  bytesMax: number,
): Promise<Uint8Array<ArrayBuffer>> {
  let file: FileHandle | null = null;
  try {
    // O_NONBLOCK: a pipe must not hold the worker; it is refused below.
    const flags = constants.O_RDONLY | constants.O_NOFOLLOW | constants.O_NONBLOCK;
    file = await open(join(directory, name), flags);
    const stat = await file.stat();
    if (!stat.isFile()) throw invalid(name, 'is not a regular file');
    if (stat.size > bytesMax) throw invalid(name, `has ${stat.size} bytes, at most ${bytesMax}`);
    return await readWhole(file, stat.size, name);
  } catch (error) {
    if (error instanceof GatewayError) throw error;
    const code = (error as NodeJS.ErrnoException).code ?? 'unknown error';
    if (code === 'ENOENT') throw invalid(name, 'is missing');
    if (code === 'ELOOP') throw invalid(name, 'is a link');
    throw new GatewayError('INVALID_ADAPTER', `${name} cannot be read (${code})`, { cause: error });
  } finally {
    await file?.close();
  }
}

async function readWhole(
  file: FileHandle,
  size: number,
  name: string,
): Promise<Uint8Array<ArrayBuffer>> {
  const bytes = new Uint8Array(size);
  for (let done = 0; done < size; ) {
    const length = Math.min(readBytesMax, size - done);
    const { bytesRead } = await file.read(bytes, done, length, done);
    if (bytesRead === 0) throw invalid(name, 'was cut while it was read');
    done += bytesRead;
  }
  return bytes;
}

function invalid(name: string, what: string): GatewayError {
  return new GatewayError('INVALID_ADAPTER', `${name} ${what}`);
}
