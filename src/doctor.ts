// What this machine can run and why, for `rankgate doctor`: configuration as it was resolved, and the native library loaded
// for real, since only that says which variant it picks. Runs apart from the gateway, which never loads native code.

import { stat } from 'node:fs/promises';
import { arch, cpus, freemem, platform, totalmem } from 'node:os';
import { join } from 'node:path';
import type { Config } from './config.ts';
import { createKernels } from './kernels/create-kernels.ts';
import { defaultSource } from './model/model-source.ts';
import { usableCores } from './usable-cores.ts';

const gigabytes = (bytes: number): string => `${(bytes / 1e9).toFixed(1)} GB`;

async function backendOf({ backend, threads }: Config): Promise<string> {
  try {
    using kernels = await createKernels(backend, { threads });
    return kernels.description;
  } catch (error) {
    return `not usable: ${error instanceof Error ? error.message : String(error)}`;
  }
}

async function modelState(config: Config): Promise<string> {
  if (config.model === defaultSource || config.model.startsWith('hf:')) {
    const kept = await stat(join(config.dataDir, 'models')).catch(() => null);
    return `${config.model} (${kept === null ? 'nothing fetched yet' : 'fetched or in part, see the data directory'})`;
  }
  const file = await stat(config.model).catch(() => null);
  return file === null
    ? `${config.model} (no such file)`
    : `${config.model} (${gigabytes(file.size)})`;
}

export async function examine(config: Config): Promise<Record<string, string>> {
  return {
    node: `${process.version} ${platform()} ${arch()}`,
    cpu: `${cpus()[0]?.model.trim() ?? 'unknown'}, ${cpus().length} present`,
    memory: `${gigabytes(freemem())} free of ${gigabytes(totalmem())}`,
    threads: `${config.threads} (usable cores: ${usableCores().why})`,
    backend: await backendOf(config),
    weights: config.weights,
    model: await modelState(config),
    data: config.dataDir,
    adapters: config.adaptersRoot,
    listen: `${config.host}:${config.port}`,
    keys: `${config.apiKeys.length} (without any, inference is open and admin calls are for this machine)`,
  };
}
