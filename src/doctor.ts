// What this machine can run and why, for `rankgate doctor`: configuration as it was resolved, and the native library loaded
// for real, since only that says which variant it picks. Runs apart from the gateway, which never loads native code.

import { stat } from 'node:fs/promises';
import { arch, cpus, freemem, platform, totalmem } from 'node:os';
import { join } from 'node:path';
import type { Config } from './config.ts';
import { drawUniform } from './engine/random-draw.ts';
import { createKernels } from './kernels/create-kernels.ts';
import type { Ops, StoredTensor, Tensor } from './kernels/kernels.ts';
import { openGguf } from './model/gguf.ts';
import {
  type FidelityOptions,
  keepFidelity,
  keptFidelity,
  measureFidelity,
} from './model/mode-fidelity.ts';
import { defaultSource, type ModelFile } from './model/model-source.ts';
import { readTokenizerSource } from './model/tokenizer.ts';
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

const [costRows, costWidth, costRuns] = [8, 1024, 20];

/** CPU milliseconds of one run on one thread: a linear over q4_1, and the delta of eight adapters of rank 16. */
async function kernelCosts(native: boolean): Promise<readonly [number, number]> {
  using kernels = await createKernels('ggml', { threads: 1, native });
  const way = native ? 'int16' : 'library';
  const pool = { dtype: 'bf16', width: costWidth } as const;
  const [a, b] = kernels.storePages(1 + 2 * costRows, [
    { use: 'shrink', ...pool },
    { use: 'expand', ...pool },
  ]) as [StoredTensor, StoredTensor];
  for (const pages of [a, b]) kernels.write(pages, new Uint8Array(pages.bytes), 0);
  const shape = [costWidth, costWidth];
  const w = kernels.storeWeight?.('q4_1', shape, way) ?? kernels.store('q4_1', shape);
  kernels.write(w, new Uint8Array(w.bytes), 0);
  const cost = (build: (ops: Ops, inputs: [Tensor, Tensor, Tensor, Tensor]) => Tensor): number => {
    const inputs = (ops: Ops): [Tensor, Tensor, Tensor, Tensor] => [
      ops.input('x', 'f32', [costRows, costWidth]),
      ops.input('pages', 'i32', [costRows, 2]),
      ops.input('gate', 'f32', [1, 16]),
      ops.input('uses', 'i32', [costRows]),
    ];
    using program = kernels.compile((ops) => ({ y: build(ops, inputs(ops)) }), { segments: 0 });
    program.write('x', new Float32Array(costRows * costWidth));
    program.write('gate', new Float32Array(16).fill(1));
    program.write('uses', new Int32Array(costRows));
    program.write(
      'pages',
      Int32Array.from({ length: 2 * costRows }, (_, i) => 1 + i),
    );
    program.run([]);
    const start = process.cpuUsage();
    for (let i = 0; i < costRuns; i++) program.run([]);
    const { user, system } = process.cpuUsage(start);
    return (user + system) / 1000 / costRuns;
  };
  return [
    cost((ops, [x]) => ops.linear(x, w)),
    cost((ops, [x, pages, gate, uses]) => {
      const [h] = ops.shrink(x, pages, [{ a, gate }], uses);
      return ops.expand(pages, [{ y: ops.add(x, x), h: h!, b }])[0]!;
    }),
  ];
}

/** What it costs here to be without our own kernels. */
async function ownKernels({ backend }: Config): Promise<string> {
  if (backend !== 'ggml') return 'not used by this backend';
  try {
    const [own, composed] = [await kernelCosts(true), await kernelCosts(false)];
    const told = ['linear q4_1', 'adapters of rank 16'].map((what, i) => {
      const [ms, without] = [own[i]!, composed[i]!];
      return `${what} ${ms.toFixed(3)} ms, composed of ggml's ops ${without.toFixed(3)} ms (${(without / ms).toFixed(1)} ×)`;
    });
    return `8 rows of 1024 on one core: ${told.join('; ')}`;
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

const [measuredTokens, measuredSeed] = [192, 1];

function fidelityOptions(config: Config, { path, sha256 }: ModelFile): FidelityOptions {
  const { weights: mode, backend, threads, dataDir } = config;
  const cacheDirectory = join(dataDir, 'cache');
  return { modelPath: path, modelHash: sha256, mode, backend, threads, cacheDirectory };
}

/** Seconds to minutes: the model runs in f32 once, token by token. */
export async function measureWeights(config: Config, model: ModelFile): Promise<void> {
  const options = fidelityOptions(config, model);
  using file = openGguf(model.path);
  const { bos } = readTokenizerSource(file.metadata);
  let drawn = 0;
  const draw = (): number => drawUniform(measuredSeed, drawn++);
  const text = { start: bos ?? 0, tokens: measuredTokens, draw };
  await keepFidelity(options, await measureFidelity(options, text));
}

async function weightsState(config: Config, model: ModelFile | null): Promise<string> {
  const kept = model === null ? null : keptFidelity(fidelityOptions(config, model));
  if (kept === null) return `${config.weights} (its distance to f32: rankgate doctor --measure)`;
  const { kl, tokens, description } = kept;
  return `${config.weights}: KL ${kl.toPrecision(2)} nats to the same file in f32, mean of ${tokens} tokens; ${description}`;
}

export async function examine(
  config: Config,
  model: ModelFile | null = null,
): Promise<Record<string, string>> {
  return {
    node: `${process.version} ${platform()} ${arch()}`,
    cpu: `${cpus()[0]?.model.trim() ?? 'unknown'}, ${cpus().length} present`,
    memory: `${gigabytes(freemem())} free of ${gigabytes(totalmem())}`,
    threads: `${config.threads} (usable cores: ${usableCores().why})`,
    backend: await backendOf(config),
    kernels: await ownKernels(config),
    weights: await weightsState(config, model),
    model: await modelState(config),
    data: config.dataDir,
    adapters: config.adaptersRoot,
    listen: `${config.host}:${config.port}`,
    keys: `${config.apiKeys.length} (without any, inference is open and admin calls are for this machine)`,
  };
}
