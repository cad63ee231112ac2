// A model file on disk → a decoder that can step: reads the header, makes the kernels, loads the weights, sizes memory.

import { GatewayError } from '../errors.ts';
import { type BackendName, createKernels } from '../kernels/create-kernels.ts';
import type { DeviceWish } from '../kernels/ggml/select-device.ts';
import { type Kernels, type LinearWay, ranksPerPage, type WeightType } from '../kernels/kernels.ts';
import { Decoder } from './decoder.ts';
import {
  type DecoderConfig,
  projectionShape,
  projections,
  readDecoderConfig,
} from './decoder-config.ts';
import { type GgufFile, openGguf } from './gguf.ts';
import { openWeightCache } from './weight-cache.ts';
import { explainChoice, fastestWay, keptTimes, timeWays, type WayTimes } from './weight-choice.ts';
import { loadWeights, type WeightMode, waysOf, weightTypes } from './weights.ts';

export interface OpenDecoderOptions {
  readonly modelPath: string;
  /** SHA-256 of the model file, hex: names its converted weights. */
  readonly modelHash: string;
  readonly mode: WeightMode;
  readonly backend: BackendName;
  readonly threads: number;
  readonly libraryDirectory?: string;
  /** What holds the model; the CPU by default. */
  readonly device?: DeviceWish;
  /** false: no kernels of our own; true by default. */
  readonly native?: boolean;
  /** Where converted weights are kept; null: nowhere. */
  readonly cacheDirectory: string | null;
  readonly cells: number;
  readonly pages: number;
  readonly tokensMax: number;
  readonly segmentsMax: number;
}

export interface OpenedDecoder {
  readonly decoder: Decoder;
  readonly config: DecoderConfig;
  /** What computes, for logs and system_fingerprint: `ggml 0.23.0, AMD EPYC, 2 threads, faithful: q4_1 int16 (f32 1.97 ×)`. */
  readonly description: string;
  /** kernels.ts; none where the backend cannot. */
  readonly setThreads: ((threads: number) => void) | null;
}

/** TensorFlow.js computes in f32 whatever is stored: rounding weights to bf16 would save nothing, and it has no int8. */
function modeOf({ backend, mode }: OpenDecoderOptions): WeightMode {
  if (backend !== 'tfjs') return mode;
  if (mode !== 'parity') return 'exact';
  throw new GatewayError(
    'UNSUPPORTED',
    'weights parity are ggml’s kernels; tfjs has faithful only',
  );
}

/** Memory for the weights in their widest form, the cells and the adapter pages; intermediate values come on top. */
function bytesNeeded(
  file: GgufFile,
  config: DecoderConfig,
  { mode, cells, pages }: OpenDecoderOptions,
): number {
  const numberBytes = mode === 'exact' ? 4 : 2;
  const weights = [...file.tensors.values()].reduce((sum, { bytes, shape }) => {
    const converted = numberBytes * shape.reduce((product, size) => product * size, 1);
    return sum + (mode === 'parity' ? bytes : Math.max(bytes, converted));
  }, 0);
  const cellBytes = 2 * numberBytes * config.kvHeads * config.headSize;
  const pageBytes = projections
    .map((projection) => projectionShape(config, projection))
    .reduce((sum, shape) => sum + ranksPerPage * 2 * (shape.in + shape.out), 0);
  return weights + config.blocks * (cells * cellBytes + pages * pageBytes);
}

/** How long each way within the mode's bound takes here, for each type of the file: none where all is left to a library. */
async function timesOf(
  kernels: Kernels,
  mode: WeightMode,
  file: GgufFile,
  options: OpenDecoderOptions,
): Promise<WayTimes> {
  const [types, ways] = [weightTypes(file), waysOf[mode]];
  if (!kernels.f32Activations || ways.length === 0) return {};
  const dependsOn = [kernels.description, ...ways, ...types];
  return keptTimes(options.cacheDirectory, dependsOn, async () => {
    using throwaway = await createKernels(options.backend, { threads: 1 });
    return Object.fromEntries(types.map((type) => [type, timeWays(throwaway, type, ways)]));
  });
}

/** A step reads all of its rows' pages, and is as slow as memory: q8_0 has half the bytes. Rounding them to it moves the
 *  distributions by less than f16 cells do (docs/benchmarks.md, fidelity). */
function pageTypeOf(mode: WeightMode, { f32Activations }: Kernels): 'f16' | 'q8_0' {
  return f32Activations && (mode === 'faithful' || mode === 'fast') ? 'q8_0' : 'f16';
}

function waysIn(times: WayTimes): Partial<Record<WeightType, LinearWay>> {
  const entries = Object.entries(times).filter(([, ways]) => ways.length > 0);
  return Object.fromEntries(entries.map(([type, ways]) => [type, fastestWay(ways)]));
}

/** Throws INVALID_MODEL_FILE or UNSUPPORTED, with everything that was opened closed again. */
export async function openDecoder(options: OpenDecoderOptions): Promise<OpenedDecoder> {
  using file = openGguf(options.modelPath);
  const config = readDecoderConfig(file);
  const { threads, libraryDirectory, device = 'cpu' } = options;
  const mode = modeOf(options);
  const kernels = await createKernels(options.backend, {
    threads,
    device,
    bytesNeeded: bytesNeeded(file, config, options),
    f32Activations: mode === 'faithful' || mode === 'fast',
    native: options.native ?? true,
    ...(libraryDirectory === undefined ? {} : { libraryDirectory }),
  });
  try {
    using cache =
      options.cacheDirectory === null || mode !== 'faithful' || kernels.f32Activations
        ? null
        : openWeightCache(options.cacheDirectory, `${options.modelHash.slice(0, 32)}-bf16`);
    const times = await timesOf(kernels, mode, file, options);
    const weights = loadWeights(file, config, { kernels, mode, cache, ways: waysIn(times) });
    const { cells, pages, tokensMax, segmentsMax } = options;
    // f16 cells: KL 1.5e-6 to f32 cells on the default model, at half the memory.
    const cellType = mode === 'exact' ? 'f32' : 'f16';
    const cellsAndPages = { cells, cellType, pages, pageType: pageTypeOf(mode, kernels) } as const;
    const memory = { ...cellsAndPages, tokensMax, segmentsMax };
    const decoder = new Decoder({ config, weights, kernels, ...memory });
    const choice = explainChoice(times);
    const description = `${kernels.description}, ${mode}${choice && `: ${choice}`}`;
    const setThreads = kernels.setThreads?.bind(kernels) ?? null;
    return { decoder, config, description, setThreads };
  } catch (error) {
    kernels[Symbol.dispose]();
    throw error;
  }
}
